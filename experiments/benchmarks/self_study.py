"""Self-study of one chunk of 1,024 tokens, with and without sharing and refilling.

The run takes a while, because the peer is slow.

python launch/benchmark.py --config=experiments/benchmarks/self_study.py --workdir=runs/bench_self_study
"""

from cartridges_jax.benchmarks.self_study import default_config


def get_config():
    return default_config()
