"""Tests of fastssl/ops."""
