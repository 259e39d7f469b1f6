"""Tests of fastssl/methods."""
