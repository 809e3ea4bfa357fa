"""Measurements against other libraries on this machine; `launch/benchmark.py` runs them."""
