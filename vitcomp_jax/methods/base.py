"""What a method is."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array

from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import Output

Metrics = dict[str, Array]


@runtime_checkable
class Method(Protocol):
  """Builds the layers of a search, penalises them, and turns what was learnt into static ones."""

  def layers(self, spec: ViTSpec) -> tuple[LayerSpec, ...]:
    """Layers to search with."""
    ...

  def penalty(self, spec: ViTSpec, out: Output, step: Array) -> tuple[Array, Metrics]:
    """What is added to the task loss, and figures to log."""
    ...

  def deploy(self, spec: ViTSpec, arch: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Static layers from the learnt variables."""
    ...
