"""Qwen3-32B on 16 TPU v5p (2x2x4).

python launch/aot.py --config=experiments/pods/qwen3_32b_v5p16.py
python launch/train.py --config=experiments/pods/qwen3_32b_v5p16.py --config.corpus=my.txt --workdir=DIR
"""

from cartridges_jax.pipeline.pod import pod_config


def get_config():
    return pod_config("Qwen/Qwen3-32B", topology="v5p:2x2x4", mesh="data:8,tensor:2", micro_batches=4)
