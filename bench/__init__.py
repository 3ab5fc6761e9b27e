"""Measurements, run by hand: `python -m bench.proxies`, `bench.counts`, `bench.correctness`; and `python bench/init.py`."""
