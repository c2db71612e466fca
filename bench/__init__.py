"""Benchmarks: `make bench`, or `python -m pytest bench`."""
