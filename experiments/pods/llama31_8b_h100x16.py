"""Llama-3.1-8B on 16 H100.

python launch/aot.py --config=experiments/pods/llama31_8b_h100x16.py
python launch/train.py --config=experiments/pods/llama31_8b_h100x16.py --config.corpus=my.txt --workdir=DIR
"""

from cartridges_jax.pipeline.pod import pod_config


def get_config():
    return pod_config("meta-llama/Llama-3.1-8B-Instruct", topology="h100:16", mesh="data:16", micro_batches=2)
