"""Qwen3-32B on 8 H100.

python launch/aot.py --config=experiments/pods/qwen3_32b_h100x8.py
python launch/train.py --config=experiments/pods/qwen3_32b_h100x8.py --config.corpus=my.txt --workdir=DIR
"""

from cartridges_jax.pipeline.pod import pod_config


def get_config():
    return pod_config("Qwen/Qwen3-32B", topology="h100:8", mesh="data:2,tensor:4", micro_batches=8)
