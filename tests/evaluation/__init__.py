"""Tests of fastssl/evaluation."""
