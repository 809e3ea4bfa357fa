"""Qwen3-4B on 8 TPU v6e (2x4).

python launch/aot.py --config=experiments/pods/qwen3_4b_v6e8.py
python launch/train.py --config=experiments/pods/qwen3_4b_v6e8.py --config.corpus=my.txt --workdir=DIR
"""

from cartridges_jax.pipeline.pod import pod_config


def get_config():
    return pod_config("Qwen/Qwen3-4B", topology="v6e:2x4", mesh="data:8", micro_batches=4)
