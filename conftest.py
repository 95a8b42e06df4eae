"""Compiles fast; examples in docstrings promote dtypes as JAX does by default, as users' do."""

import os
import pathlib

# Before JAX is imported, which reads them. Tests compile more than they compute, so that compiling
# fast is worth more than fast code; of two workers each compiles on a core of its own.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
  "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
  "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one test, worker, process or run has compiled serves all others.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent / ".pytest_cache/xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import contextlib
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def example_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
  is_example = isinstance(request.node, pytest.DoctestItem)
  with jax.numpy_dtype_promotion("standard") if is_example else contextlib.nullcontext():
    yield
