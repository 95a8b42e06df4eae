"""What a method that learns is."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array

from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import Output

Metrics = dict[str, Array]


@runtime_checkable
class Method(Protocol):
  """Builds the layers of a search and penalises them; its stage makes a plan of what was learnt."""

  def layers(self, spec: ViTSpec) -> tuple[LayerSpec, ...]:
    """Layers to search with."""
    ...

  def initial_arch(self, spec: ViTSpec) -> dict[str, Any]:
    """The search variables before the first step: the collection `arch`."""
    ...

  def penalty(
    self, spec: ViTSpec, arch: Mapping[str, Any], out: Output, step: Array
  ) -> tuple[Array, Metrics]:
    """What is added to the task loss, and figures to log."""
    ...
