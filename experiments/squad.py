"""A real article with other people's questions, from a SQuAD JSON file of yours.

    python launch/train.py --config=experiments/squad.py --config.corpus=dev-v2.0.json \
        --config.article=Normans --workdir=runs/normans
"""

from cartridges_jax.pipeline.config import default_config


def get_config():
    config = default_config()
    config.max_tokens = 1200
    return config
