"""Hand-made and random schedules: the same counts for every image, without any learning."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from vitcomp_jax.cost import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.base import Layers, Method, Schedule
from vitcomp_jax.methods.diffrate.reducer import PruneMerge
from vitcomp_jax.models.spec import ViTSpec

TOLERANCE = 0.01  # relative to a budget
_DRAWS = 10_000  # random schedules per batch
_MISSES = 100  # consecutive batches without a schedule near the budget


def compressed_layers(
  spec: ViTSpec, first: bool = False, last: bool | None = None
) -> tuple[bool, ...]:
  """Returns which layers may lose tokens.

  Args:
    spec: The model.
    first: Whether the first layer may.
    last: Whether the last layer may; None: only if the head does not pool over patches.
  """
  last = not spec.pools_patches if last is None else last
  starts = [*spec.starts, spec.depth]
  ends = dict.fromkeys((start - 1 for start in starts[1:]), last)
  ends |= dict.fromkeys(starts[:-1], first)
  return tuple(ends.get(i, True) for i in range(spec.depth))


def _counted(merges: bool, importance: str = "auto") -> Callable[[ViTSpec, np.ndarray], Layers]:
  """Returns a function that makes layers that prune, or merge, down to given counts."""

  def make(spec: ViTSpec, counts: np.ndarray) -> Layers:
    kept, metric = iter(counts), spec.importance(importance)
    layers = []
    for i, (layer, compressed) in enumerate(
      zip(spec.dense_layers, compressed_layers(spec), strict=True)
    ):
      if compressed:
        count = int(next(kept))
        prune_keep = spec.tokens_at(i) if merges else count
        layer = dataclasses.replace(layer, reduce=PruneMerge(prune_keep, count, importance=metric))
      layers.append(layer)
    return tuple(layers)

  return make


def _patches(spec: ViTSpec) -> np.ndarray:
  """Returns the number of patch tokens in each compressed layer if none are removed."""
  compressed = enumerate(compressed_layers(spec))
  return np.array([spec.patches_at(i) for i, yes in compressed if yes])


def _uniform(merges: bool, importance: str = "auto") -> Schedule:
  """Returns a schedule with one count; if it is fractional, earlier layers keep one token more."""
  make = _counted(merges, importance)

  def at(spec: ViTSpec, strength: float) -> Layers:
    patches = _patches(spec)
    count = spec.num_prefix + patches - strength * (patches - 1)
    return make(spec, np.floor(count + 1 - np.arange(1, patches.size + 1) / patches.size))

  return at


def _linear(merges: bool) -> Schedule:
  """Returns a schedule whose counts fall linearly with depth, to at least one patch token."""
  make = _counted(merges)

  def at(spec: ViTSpec, strength: float) -> Layers:
    patches = _patches(spec)
    removed = strength * (patches - 1) * np.arange(1, patches.size + 1)
    least = spec.num_prefix + 1
    return make(spec, np.maximum(np.round(spec.num_prefix + patches - removed), least))

  return at


def random_counts(
  spec: ViTSpec, target_gmacs: float, count: int, seed: int, tolerance: float = TOLERANCE
) -> Iterator[Layers]:
  """Yields random schedules near a budget: sorted uniform counts, filtered by cost.

  Args:
    spec: The model.
    target_gmacs: The budget in 1e9 multiply-accumulates.
    count: Number of schedules.
    seed: Seed of the counts; with the same seed, a longer series begins with a shorter one.
    tolerance: Relative distance from the budget.

  Raises:
    UserError: If none of a million schedules meets the budget.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Fig. 5.
  """
  rng = np.random.default_rng(seed)
  compressed, importance = compressed_layers(spec), spec.importance()
  everything = spec.num_tokens, spec.num_tokens
  given, found_in = 0, 0
  for drawn in itertools.count():
    if given == count:
      return
    if drawn - found_in > _MISSES:
      raise UserError(
        f"random schedules: expected some near {target_gmacs:.4g} GMACs for {spec.name}, got none "
        f"in {_MISSES * _DRAWS:,}; ask for another budget."
      )
    kept = rng.integers(spec.num_prefix + 1, spec.num_tokens + 1, (_DRAWS, 2 * sum(compressed)))
    kept = np.sort(kept, axis=1)[:, ::-1].reshape(_DRAWS, -1, 2)
    for index in np.flatnonzero(_is_near(spec, kept[..., 1], target_gmacs, tolerance)):
      if given == count:
        return
      pairs = iter(kept[index].tolist())
      yield tuple(
        dataclasses.replace(
          layer,
          reduce=PruneMerge(*(next(pairs) if yes else everything), importance=importance),  # type: ignore[misc]
        )
        for layer, yes in zip(spec.dense_layers, compressed, strict=True)
      )
      given, found_in = given + 1, drawn


def _is_near(spec: ViTSpec, after: np.ndarray, target_gmacs: float, tolerance: float) -> np.ndarray:
  """Returns which of many schedules meet a budget, given the tokens that each layer keeps."""
  left = iter(after.T.astype(float))
  n: np.ndarray = np.full(len(after), float(spec.num_tokens))
  counts = []
  for yes in compressed_layers(spec):
    before, n = n, next(left) if yes else n
    counts.append((before, n))
  spent = macs.macs(spec, spec.dense_layers, counts) / 1e9
  return np.asarray(np.abs(spent - target_gmacs) <= tolerance * target_gmacs)


def with_importance(layers: Layers, importance: str) -> Layers:
  """Returns the layers with another importance metric for pruning and merging."""
  return tuple(
    dataclasses.replace(layer, reduce=dataclasses.replace(layer.reduce, importance=importance))
    if isinstance(layer.reduce, PruneMerge)
    else layer
    for layer in layers
  )


METHOD = Method(
  schedules={
    "uniform": _uniform(merges=False),
    "uniform_merge": _uniform(merges=True),
    "linear": _linear(merges=False),
    "linear_merge": _linear(merges=True),
    "random": _uniform(merges=False, importance="random"),
  }
)
