"""Qwen3-4B on 8 TPU v5e (2x4).

python launch/aot.py --config=experiments/pods/qwen3_4b_v5e8.py
python launch/train.py --config=experiments/pods/qwen3_4b_v5e8.py --config.corpus=my.txt --workdir=DIR
"""

from cartridges_jax.pipeline.pod import pod_config


def get_config():
    return pod_config("Qwen/Qwen3-4B", topology="v5e:2x4", mesh="data:2,tensor:4", micro_batches=8)
