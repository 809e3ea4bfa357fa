"""Llama-3.1-70B on 32 TPU v5e (4x8), its matrices kept in 8 bits.

python launch/aot.py --config=experiments/pods/llama31_70b_v5e32.py
python launch/train.py --config=experiments/pods/llama31_70b_v5e32.py --config.corpus=my.txt --workdir=DIR
"""

from cartridges_jax.pipeline.pod import pod_config


def get_config():
    return pod_config(
        "meta-llama/Llama-3.1-70B-Instruct", topology="v5e:4x8", mesh="data:4,tensor:8", micro_batches=8, weights="int8"
    )
