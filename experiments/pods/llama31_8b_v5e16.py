"""Llama-3.1-8B on 16 TPU v5e (4x4).

python launch/aot.py --config=experiments/pods/llama31_8b_v5e16.py
python launch/train.py --config=experiments/pods/llama31_8b_v5e16.py --config.corpus=my.txt --workdir=DIR
"""

from cartridges_jax.pipeline.pod import pod_config


def get_config():
    return pod_config("meta-llama/Llama-3.1-8B-Instruct", topology="v5e:4x4", mesh="data:4,tensor:4", micro_batches=8)
