"""Tests of what reads the results of the benchmarks."""
