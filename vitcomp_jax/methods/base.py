"""Interfaces of a method: static reducers, schedules without a search, and optionally a search."""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array

from vitcomp_jax.models.reducers import StaticReducer
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import Output

Metrics = dict[str, Array]
Layers = tuple[LayerSpec, ...]
# Makes layers from a model and a strength, from 0 (all tokens stay) to 1 (as few as possible).
Schedule = Callable[[ViTSpec, float], Layers]


@dataclasses.dataclass(frozen=True)
class Method:
  """A method's entry in the registry.

  Attributes:
    reducers: Static reducers that plans may hold.
    schedules: Schedules without a search, by row name.
    is_trained: Whether the schedules need trained weights before they can be measured.
  """

  reducers: tuple[type[StaticReducer], ...] = ()
  schedules: Mapping[str, Schedule] = dataclasses.field(
    default_factory=lambda: types.MappingProxyType({})
  )
  is_trained: bool = False


def quarters(spec: ViTSpec) -> list[int]:
  """Returns the layers that start at a quarter, a half and three quarters of the depth."""
  return [spec.depth * quarter // 4 for quarter in (1, 2, 3)]


@runtime_checkable
class SearchMethod(Protocol):
  """Builds the layers of a search for one model, and penalises their cost.

  A training loop applies `layers()` with the collections `params` and `arch`.
  """

  def layers(self) -> Layers:
    """Returns the layers to search with."""
    ...

  def init(self) -> dict[str, Any]:
    """Returns the initial search variables: the collection `arch`."""
    ...

  def penalty(self, arch: Mapping[str, Any], out: Output, step: Array) -> tuple[Array, Metrics]:
    """Computes the term added to the task loss, and metrics to log."""
    ...
