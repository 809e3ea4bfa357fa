"""Llama-3.2-3B on 8 H100.

python launch/aot.py --config=experiments/pods/llama32_3b_h100x8.py
python launch/train.py --config=experiments/pods/llama32_3b_h100x8.py --config.corpus=my.txt --workdir=DIR
"""

from cartridges_jax.pipeline.pod import pod_config


def get_config():
    return pod_config("meta-llama/Llama-3.2-3B-Instruct", topology="h100:8", mesh="data:8", micro_batches=4)
