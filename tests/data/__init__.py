"""Tests of fastssl/data."""
