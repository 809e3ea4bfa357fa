"""Decode speed over the cache's size, own and shared slots, at the best batch within 6 GiB.

python launch/benchmark.py --config=experiments/benchmarks/cache_sweep.py --workdir=runs/bench_cache_sweep
"""

from cartridges_jax.benchmarks.cache_sweep import default_config


def get_config():
    return default_config()
