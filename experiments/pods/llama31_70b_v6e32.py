"""Llama-3.1-70B on 32 TPU v6e (4x8).

python launch/aot.py --config=experiments/pods/llama31_70b_v6e32.py
python launch/train.py --config=experiments/pods/llama31_70b_v6e32.py --config.corpus=my.txt --workdir=DIR
"""

from cartridges_jax.pipeline.pod import pod_config


def get_config():
    return pod_config("meta-llama/Llama-3.1-70B-Instruct", topology="v6e:4x8", mesh="data:4,tensor:8", micro_batches=8)
