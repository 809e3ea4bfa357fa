"""Qwen3-32B on 16 TPU v5e (4x4).

python launch/aot.py --config=experiments/pods/qwen3_32b_v5e16.py
python launch/train.py --config=experiments/pods/qwen3_32b_v5e16.py --config.corpus=my.txt --workdir=DIR
"""

from cartridges_jax.pipeline.pod import pod_config


def get_config():
    return pod_config("Qwen/Qwen3-32B", topology="v5e:4x4", mesh="data:2,tensor:8", micro_batches=16)
