"""Llama-3.1-8B on 16 TPU v5p (2x2x4).

python launch/aot.py --config=experiments/pods/llama31_8b_v5p16.py
python launch/train.py --config=experiments/pods/llama31_8b_v5p16.py --config.corpus=my.txt --workdir=DIR
"""

from cartridges_jax.pipeline.pod import pod_config


def get_config():
    return pod_config("meta-llama/Llama-3.1-8B-Instruct", topology="v5p:2x2x4", mesh="data:16", micro_batches=2)
