"""Packaging. Tool settings are in pyproject.toml."""

import pathlib

import setuptools

# The one place of the address; README.md and colabs/ hold copies, which a test compares with it.
REPOSITORY = "https://github.com/vitcomp-jax/vitcomp_jax"

PACKAGES = setuptools.find_packages(include=["vitcomp_jax", "vitcomp_jax.*"])

REQUIRES = [
  "absl-py>=2",
  "filelock>=3.30",  # one run in a workdir; the first that can do without markers in place of locks
  "flatbuffers",  # of jax.export
  "flax>=0.12",
  "grain>=0.2.16",
  "huggingface_hub>=0.30",
  "jax>=0.10",
  "jaxtyping>=0.3",
  "matplotlib>=3.9",
  "ml_collections>=1.1",
  "ml_dtypes",
  "numpy>=2",
  "optax>=0.2.5",
  "orbax-checkpoint>=0.12",
  "Pillow>=11",
  "safetensors>=0.5",
  "tensorboardX>=2.6",
  "tqdm>=4.66",
]

# To read data sets that TFDS prepared; a fifth of all that would be installed.
TFDS_REQUIRES = ["array_record>=0.8", "tensorflow-datasets>=4.9.9"]

# jax2onnx 0.13 is the last that does not forbid Orbax 0.12, which it never imports.
ONNX_REQUIRES = ["jax2onnx>=0.13", "onnxruntime>=1.24"]

# To build the documents in docs/.
DOCS_REQUIRES = ["furo", "latex2mathml", "myst-parser", "sphinx>=8"]

# To run the notebooks in colabs/ outside of Colab.
NOTEBOOK_REQUIRES = ["ipykernel", "nbclient"]

# To compare with models that other libraries make now, beside those that are stored for tests.
PEERS_REQUIRES = ["open_clip_torch>=3.3", "timm>=1.0.31", "torch", "transformers>=5.24"]

TEST_REQUIRES = [
  *DOCS_REQUIRES,
  *NOTEBOOK_REQUIRES,
  *ONNX_REQUIRES,
  *TFDS_REQUIRES,
  "beartype",
  "hypothesis",
  "import-linter",
  "mypy",
  "pytest",
  "pytest-xdist",
  "ruff",
  "setuptools>=70.1",  # a test makes the wheel
]

setuptools.setup(
  name="vitcomp_jax",
  version="0.1.0",
  description="Compression of Vision Transformers in JAX and Flax",
  long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  url=REPOSITORY,
  python_requires=">=3.11",
  # The experiments lie at the top of the checkout, where people look for them.
  package_dir={"vitcomp_jax.configs": "configs"},
  packages=[*PACKAGES, "vitcomp_jax.configs"],
  package_data={
    "vitcomp_jax": ["py.typed", "*.pyi", "bundled/*", "data/bundled/*"],
    "vitcomp_jax.configs": ["plans/*/*.json"],
  },
  install_requires=REQUIRES,
  extras_require={
    "cuda": ["jax[cuda12]"],
    "docs": DOCS_REQUIRES,
    "notebooks": NOTEBOOK_REQUIRES,
    "onnx": ONNX_REQUIRES,
    "peers": PEERS_REQUIRES,
    "test": TEST_REQUIRES,
    "tfds": TFDS_REQUIRES,
    "tpu": ["jax[tpu]"],
  },
  classifiers=[
    "License :: OSI Approved :: Apache Software License",
    "Programming Language :: Python :: 3",
  ],
)
