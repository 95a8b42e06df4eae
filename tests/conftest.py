"""Strict dtypes and ranks, two CPU devices, shapes checked against their annotations."""

import gc
import logging
import pathlib
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


# Examples that compile the training of a model.
_SLOW_EXAMPLES = (
  "vitcomp_jax.exported.load_exported",
  "vitcomp_jax.methods.diffrate.search.DiffRate",
  "vitcomp_jax.searching.search",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  if config.getoption("--all"):
    return
  slow = [i for i in items if i.get_closest_marker("slow") or i.name in _SLOW_EXAMPLES]
  config.hook.pytest_deselected(items=slow)
  items[:] = [item for item in items if item not in slow]


def pytest_collection_finish() -> None:
  """What is imported stays: to look through it again and again for garbage takes time."""
  gc.collect()
  gc.freeze()


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
