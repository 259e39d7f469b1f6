"""Speed: ``pytest benchmarks/ --benchmark-only``. Read ratios within one run; machines differ."""
