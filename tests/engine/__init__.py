"""Tests of fastssl/engine."""
