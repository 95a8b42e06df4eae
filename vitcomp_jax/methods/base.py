"""The interface of a method: static reducers, schedules without a search, optionally a search."""

import dataclasses
import types
from collections.abc import Callable, Mapping

from jaxtyping import Array

from vitcomp_jax.models.reducers import StaticReducer
from vitcomp_jax.models.spec import LayerSpec, ViTSpec

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
  """Returns the layers that start at one, two and three quarters of the depth."""
  return [spec.depth * quarter // 4 for quarter in (1, 2, 3)]
