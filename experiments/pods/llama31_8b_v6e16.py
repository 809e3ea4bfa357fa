"""Llama-3.1-8B on 16 TPU v6e (4x4).

python launch/aot.py --config=experiments/pods/llama31_8b_v6e16.py
python launch/train.py --config=experiments/pods/llama31_8b_v6e16.py --config.corpus=my.txt --workdir=DIR
"""

from cartridges_jax.pipeline.pod import pod_config


def get_config():
    return pod_config("meta-llama/Llama-3.1-8B-Instruct", topology="v6e:4x4", mesh="data:8,tensor:2", micro_batches=4)
