"""Tests of fastssl.planning."""
