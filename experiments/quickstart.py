"""The shipped handbook (or your own text) with SmolLM2-135M: minutes on two cores.

python launch/train.py --config=experiments/quickstart.py --workdir=runs/quickstart
"""

from cartridges_jax.pipeline.config import default_config


def get_config():
    # The sizes follow from the text.
    return default_config()
