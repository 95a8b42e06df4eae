"""Hand-made schedules that meet a budget: what a search has to beat."""

import dataclasses

from vitcomp_jax import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.reducers import PruneMerge
from vitcomp_jax.models.spec import LayerSpec, ViTSpec

HAND_MADE = ("uniform", "uniform_merge")


def hand_made(name: str, spec: ViTSpec, target_gmacs: float) -> tuple[LayerSpec, ...]:
  """A hand-made schedule by name.

  Args:
    name: `uniform` prunes to the same count in every layer that a search compresses by default,
      `uniform_merge` merges.
    spec: The model.
    target_gmacs: The budget; the count that comes nearest is taken.

  Raises:
    UserError: For an unknown name.
  """
  if name not in HAND_MADE:
    raise UserError(f"config.evaluate.baselines: expected some of {HAND_MADE}, got {name!r}.")

  def layers(count: int) -> tuple[LayerSpec, ...]:
    reduce = PruneMerge(spec.num_tokens if name == "uniform_merge" else count, count)
    return tuple(
      dataclasses.replace(layer, reduce=reduce) if compressed else layer
      for layer, compressed in zip(spec.dense_layers, compressed_layers(spec), strict=True)
    )

  def distance(count: int) -> float:
    return abs(macs.static_macs(spec, layers(count)) - target_gmacs * 1e9)

  return layers(min(range(spec.num_prefix + 1, spec.num_tokens + 1), key=distance))


def compressed_layers(
  spec: ViTSpec, first: bool = False, last: bool | None = None
) -> tuple[bool, ...]:
  """Which layers may lose tokens.

  Args:
    spec: The model.
    first: Whether the first may.
    last: Whether the last may; none: unless the head pools over the patches it leaves.
  """
  last = spec.pool != "size_mean" if last is None else last
  ends = {spec.depth - 1: last, 0: first}
  return tuple(ends.get(i, True) for i in range(spec.depth))
