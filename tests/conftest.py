"""Strict dtypes and ranks, two CPU devices, shapes checked against their annotations."""

import os
import pathlib

# Tests compile more than they compute, so that compiling fast is worth more than fast code.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
  "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one test, worker, process or run has compiled serves all others.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache/xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import logging
from collections.abc import Iterator

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

jaxtyping.install_import_hook(
  ["vitcomp_jax.ops", "vitcomp_jax.models", "vitcomp_jax.methods", "vitcomp_jax.training"],
  "beartype.beartype",
)


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption("--golden", default=None, help="directory of golden fixtures to replay")
  parser.addoption("--all", action="store_true", help="run the slow proofs too")


def pytest_configure(config: pytest.Config) -> None:
  config.addinivalue_line("markers", "slow: a slow proof, run with --all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  if config.getoption("--all"):
    return
  slow = [item for item in items if item.get_closest_marker("slow")]
  config.hook.pytest_deselected(items=slow)
  items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def no_handlers_left() -> Iterator[None]:
  """The command logs to the standard error of the test that calls it, which is gone afterwards."""
  root = logging.getLogger()
  before = root.handlers[:]
  yield
  for handler in [h for h in root.handlers if h not in before]:
    root.removeHandler(handler)


@pytest.fixture
def optax_promotion() -> Iterator[None]:
  """Optax raises a float to an integer step, which strict promotion refuses."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def golden_dir(config: pytest.Config) -> pathlib.Path:
  given = config.getoption("--golden")
  return pathlib.Path(given) if given else pathlib.Path(__file__).parent / "golden"
