"""Decoding after a cartridge at batch 1 to 128, and the time to the first token.

python launch/benchmark.py --config=experiments/benchmarks/decode.py --workdir=runs/bench_decode
… --config.vllm_python=$HOME/vllm/bin/python      # measures vLLM too (docs/benchmarks.md has the installation)
"""

from cartridges_jax.benchmarks.decode import default_config


def get_config():
    return default_config()
