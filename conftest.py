"""Examples in docstrings are users' programs, which promote dtypes as JAX does by default."""

import contextlib
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def example_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
  is_example = isinstance(request.node, pytest.DoctestItem)
  with jax.numpy_dtype_promotion("standard") if is_example else contextlib.nullcontext():
    yield
