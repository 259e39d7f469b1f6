"""Tests of fastssl/models."""
