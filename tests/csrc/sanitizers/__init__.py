"""What runs under sanitizers; test_sanitizers.py builds and starts it."""
