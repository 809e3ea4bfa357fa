"""Qwen3-32B on 16 TPU v6e (4x4).

python launch/aot.py --config=experiments/pods/qwen3_32b_v6e16.py
python launch/train.py --config=experiments/pods/qwen3_32b_v6e16.py --config.corpus=my.txt --workdir=DIR
"""

from cartridges_jax.pipeline.pod import pod_config


def get_config():
    return pod_config("Qwen/Qwen3-32B", topology="v6e:4x4", mesh="data:4,tensor:4", micro_batches=8)
