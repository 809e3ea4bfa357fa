"""The shipped handbook (or your own text) with SmolLM2-135M, in minutes on two cores.

python launch/train.py --config=experiments/quickstart.py --workdir=runs/quickstart
"""

from cartridges_jax.pipeline.config import default_config


def get_config():
    config = default_config()
    config.cartridge.num_slots = 144
    return config
