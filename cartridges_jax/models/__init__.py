"""One functional Flax decoder, its config, and the loading of models from files."""

from cartridges_jax.models.cache import CACHE_AXES, Cache, empty_cache, row_as_prefix
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.decoder import Decoder, lm_head, lm_logits
from cartridges_jax.models.model import Model, load_model

__all__ = [
    "CACHE_AXES",
    "Cache",
    "Decoder",
    "Model",
    "ModelConfig",
    "empty_cache",
    "lm_head",
    "lm_logits",
    "load_model",
    "row_as_prefix",
]
