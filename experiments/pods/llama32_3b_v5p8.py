"""Llama-3.2-3B on 8 TPU v5p (2x2x2).

python launch/aot.py --config=experiments/pods/llama32_3b_v5p8.py
python launch/train.py --config=experiments/pods/llama32_3b_v5p8.py --config.corpus=my.txt --workdir=DIR
"""

from cartridges_jax.pipeline.pod import pod_config


def get_config():
    return pod_config("meta-llama/Llama-3.2-3B-Instruct", topology="v5p:2x2x2", mesh="data:8", micro_batches=4)
