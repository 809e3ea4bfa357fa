"""A distillation step against transformers + PEFT, at P = 128 and 512.

python launch/benchmark.py --config=experiments/benchmarks/train_step.py --workdir=runs/bench_train_step
… --config.conversations=runs/quickstart/study      # the conversations of a finished run
"""

from cartridges_jax.benchmarks.train_step import default_config


def get_config():
    return default_config()
