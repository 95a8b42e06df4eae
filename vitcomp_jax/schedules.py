"""Schedules without a search: hand-made ones, and those of ToMe and EViT."""

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from vitcomp_jax import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.predictor import PredictorSelect
from vitcomp_jax.models.reducers import AttentiveSelect, BipartiteMerge, PruneMerge
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import TokenReducer

Layers = tuple[LayerSpec, ...]
_BISECTIONS = 40
_TOLERANCE = 0.01  # of a budget
_WARMUP_PHASES = 7
_DRAWS = 10_000  # random schedules at once
_MISSES = 100  # times that many without one near the budget


def within(name: str, spec: ViTSpec, target_gmacs: float, importance: str = "auto") -> Layers:
  """A schedule by name, as strong as a budget asks for.

  Args:
    name: One of `SCHEDULES`.
    spec: The model.
    target_gmacs: The budget; the strength that comes nearest is taken.
    importance: What tells the important tokens of hand-made schedules, see
      `ViTSpec.importance`.

  Raises:
    UserError: For an unknown name, or a budget below what the schedule costs at its strongest.
  """
  if name not in SCHEDULES:
    raise UserError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {name!r}.")
  importance = spec.importance(importance)
  make = SCHEDULES[name]
  least = macs.static_macs(spec, make(spec, 1.0)) / 1e9
  if target_gmacs < (1 - _TOLERANCE) * least:
    raise UserError(
      f"config.budget: expected at least {least:.4g} GMACs, what {name} costs {spec.name} at its "
      f"strongest, got {target_gmacs:.4g}."
    )
  low, high = 0.0, 1.0
  for _ in range(_BISECTIONS):
    middle = (low + high) / 2
    is_above = macs.static_macs(spec, make(spec, middle)) > target_gmacs * 1e9
    low, high = (middle, high) if is_above else (low, middle)
  found = [make(spec, strength) for strength in (low, high)]
  nearest = min(found, key=lambda layers: abs(macs.static_macs(spec, layers) - target_gmacs * 1e9))
  gmacs = macs.static_macs(spec, nearest) / 1e9
  if abs(gmacs - target_gmacs) > _TOLERANCE * target_gmacs:
    logging.warning("%s: the nearest has %.4g GMACs, not %.4g", name, gmacs, target_gmacs)
  return nearest if name == "random" else with_importance(nearest, importance)


def with_importance(layers: Layers, importance: str) -> Layers:
  """The same layers, whose pruning and merging go by another importance."""
  return tuple(
    dataclasses.replace(layer, reduce=dataclasses.replace(layer.reduce, importance=importance))
    if isinstance(layer.reduce, PruneMerge)
    else layer
    for layer in layers
  )


def tome_counts(r: int | Sequence[float], depth: int) -> list[int]:
  """Tokens that ToMe is asked to merge away in each layer.

  Args:
    r: The same in every layer; or a list, filled up with 0; or, as a tuple of two, the mean and an
      inflection from -1 (falling to 0) over 0 (constant) to 1 (rising from 0).
    depth: Layers.

  References:
    Bolya et al., `ToMe <https://arxiv.org/abs/2210.09461>`_, 2022, Sec. 4.1 (schedules).
  """
  if isinstance(r, int):
    return [r] * depth
  if isinstance(r, tuple) and len(r) == 2:
    mean, inflection = r
    least = int(mean * (1 - inflection))
    step = (2 * mean - least - least) / (depth - 1)
    return [int(least + step * layer) for layer in range(depth)]
  return [int(count) for count in r] + [0] * (depth - len(r))


def tome(spec: ViTSpec, r: int | Sequence[float], prop_attn: bool = True) -> Layers:
  """ToMe's layers.

  Args:
    spec: The model.
    r: See `tome_counts`; never more than half of a layer's tokens behind the prefix are merged.
    prop_attn: Whether merged tokens weigh as much as their patches in attention; ToMe's authors do
      without for MAE.
  """
  layers, n = [], 0
  for i, (layer, asked) in enumerate(
    zip(spec.dense_layers, tome_counts(r, spec.depth), strict=True)
  ):
    n = spec.starts.get(i, n)
    remove = min(asked, (n - spec.num_prefix) // 2)
    n -= remove
    reduce = BipartiteMerge(remove) if remove else layer.reduce
    layers.append(dataclasses.replace(layer, reduce=reduce, size_bias=prop_attn))
  return tuple(layers)


def evit(
  spec: ViTSpec,
  keep_rate: Sequence[float],
  fuse: bool = True,
  tokens: Sequence[int | None] | None = None,
) -> Layers:
  """EViT's layers.

  Args:
    spec: The model.
    keep_rate: Of each layer, the share of the tokens behind the prefix that is kept, rounded up; a
      fused token of an earlier layer is one of them.
    fuse: Whether the others are fused into one token.
    tokens: Of each layer, how many are kept, whatever the rate; none: as the rate says.

  References:
    Liang et al., `EViT <https://arxiv.org/abs/2202.07800>`_, 2022, Sec. 3.
  """
  layers, n = [], 0
  for i, (layer, rate, count) in enumerate(
    zip(spec.dense_layers, keep_rate, tokens or [None] * spec.depth, strict=True)
  ):
    n = spec.starts.get(i, n)
    left = math.ceil(rate * (n - spec.num_prefix)) if count is None else count
    reduce: TokenReducer = layer.reduce
    if left < n - spec.num_prefix:
      reduce = AttentiveSelect(left + spec.num_prefix, fuse, spec.importance())
    n = reduce.count(n)
    layers.append(dataclasses.replace(layer, reduce=reduce))
  return tuple(layers)


def evit_warmup(spec: ViTSpec, layers: Layers, steps: int) -> list[tuple[int, Layers]]:
  """Layers for the steps in which EViT's keep rates fall from 1 to those of a plan, by a cosine.

  The authors change the rates at every step; each set of rates is compiled, so here there are
  eight, the plan's included.

  Args:
    spec: The model.
    layers: The plan's.
    steps: Of the warm-up.

  Returns:
    The first step of each phase, and its layers.
  """
  rates, n = [], 0
  for i, layer in enumerate(layers):
    n = spec.starts.get(i, n)
    kept = layer.reduce.keep if isinstance(layer.reduce, AttentiveSelect) else n
    rates.append(min(1.0, (kept - spec.num_prefix) / (n - spec.num_prefix)))
    n = layer.reduce.count(n)
  fuse = any(isinstance(layer.reduce, AttentiveSelect) and layer.reduce.fuse for layer in layers)
  phases = []
  for phase in range(_WARMUP_PHASES):
    share = (1 - math.cos(math.pi * phase / _WARMUP_PHASES)) / 2
    softened = evit(spec, [1 - share * (1 - rate) for rate in rates], fuse)
    mixed = (
      dataclasses.replace(layer, reduce=soft.reduce)
      for layer, soft in zip(layers, softened, strict=True)
    )
    phases.append((steps * phase // _WARMUP_PHASES, tuple(mixed)))
  return [*phases, (steps, layers)]


def dynamicvit(spec: ViTSpec, places: Sequence[int], ratios: Sequence[float]) -> Layers:
  """DynamicViT's layers, whose prediction modules have to be trained.

  Args:
    spec: The model.
    places: Layers before which tokens are dropped.
    ratios: Share of all patches that each of them keeps, rounded down.

  References:
    Rao et al., `DynamicViT <https://arxiv.org/abs/2106.02034>`_, 2021, Sec. 3.
  """
  spec.check_plain("dynamicvit")
  layers = list(spec.dense_layers)
  for place, ratio in zip(places, ratios, strict=True):
    keep = max(int(spec.num_patches * ratio), 1) + spec.num_prefix
    layers[place] = dataclasses.replace(layers[place], select=PredictorSelect(keep, float(ratio)))
  return tuple(layers)


def compressed_layers(
  spec: ViTSpec, first: bool = False, last: bool | None = None
) -> tuple[bool, ...]:
  """Which layers may lose tokens.

  Args:
    spec: The model.
    first: Whether the first may.
    last: Whether the last may; none: unless the head pools over the patches it leaves.
  """
  last = not spec.pools_patches if last is None else last
  starts = [*spec.starts, spec.depth]
  ends = dict.fromkeys((start - 1 for start in starts[1:]), last)
  ends |= dict.fromkeys(starts[:-1], first)
  return tuple(ends.get(i, True) for i in range(spec.depth))


def _counted(merges: bool, importance: str = "auto") -> Callable[[ViTSpec, np.ndarray], Layers]:
  """Layers that prune, or merge, to given counts."""

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
  """Patch tokens of each layer that may lose some, if none is removed."""
  compressed = enumerate(compressed_layers(spec))
  return np.array([spec.patches_at(i) for i, yes in compressed if yes])


def _uniform(merges: bool, importance: str = "auto") -> Callable[[ViTSpec, float], Layers]:
  """One count for all layers; where it is no whole number, earlier layers keep one token more."""
  make = _counted(merges, importance)

  def at(spec: ViTSpec, strength: float) -> Layers:
    patches = _patches(spec)
    count = spec.num_prefix + patches - strength * (patches - 1)
    return make(spec, np.floor(count + 1 - np.arange(1, patches.size + 1) / patches.size))

  return at


def _linear(merges: bool) -> Callable[[ViTSpec, float], Layers]:
  """Counts that fall linearly with the depth, to no less than one patch token."""
  make = _counted(merges)

  def at(spec: ViTSpec, strength: float) -> Layers:
    patches = _patches(spec)
    removed = strength * (patches - 1) * np.arange(1, patches.size + 1)
    least = spec.num_prefix + 1
    return make(spec, np.maximum(np.round(spec.num_prefix + patches - removed), least))

  return at


def _tome(power: float) -> Callable[[ViTSpec, float], Layers]:
  """ToMe whose r grows with a power of the depth; whole numbers by rounding the running sum."""

  def at(spec: ViTSpec, strength: float) -> Layers:
    weights = np.arange(1, spec.depth + 1) ** power
    # At full strength even the first layer merges half of its tokens.
    removed = np.round(strength * spec.num_patches / 2 * np.cumsum(weights))
    # MAE's authors of ToMe do without proportional attention.
    r = np.diff(removed, prepend=0).astype(int).tolist()
    return tome(spec, r, prop_attn=spec.pool != "size_mean")

  return at


def _evit(fuse: bool) -> Callable[[ViTSpec, float], Layers]:
  """EViT with one keep rate after each quarter of the layers, as its authors for depth 12."""

  def at(spec: ViTSpec, strength: float) -> Layers:
    places = _quarters(spec)
    return evit(spec, [1 - strength if i in places else 1 for i in range(spec.depth)], fuse)

  return at


def _dynamicvit(spec: ViTSpec, strength: float) -> Layers:
  """A ratio, its square and its cube after each quarter of the layers, as the authors."""
  return dynamicvit(spec, _quarters(spec), [(1 - strength) ** power for power in (1, 2, 3)])


def _quarters(spec: ViTSpec) -> list[int]:
  return [spec.depth * quarter // 4 for quarter in (1, 2, 3)]


SCHEDULES: dict[str, Callable[[ViTSpec, float], Layers]] = {
  "uniform": _uniform(merges=False),
  "uniform_merge": _uniform(merges=True),
  "linear": _linear(merges=False),
  "linear_merge": _linear(merges=True),
  "random": _uniform(merges=False, importance="random"),
  "tome": _tome(power=0),
  "tome_late": _tome(power=2),
  "evit": _evit(fuse=True),
  "evit_nofuse": _evit(fuse=False),
  "dynamicvit": _dynamicvit,
}
"""Each makes layers from a model and a strength, 0 (all tokens stay) to 1 (as few as can be)."""


def random_counts(
  spec: ViTSpec, target_gmacs: float, count: int, seed: int, tolerance: float = _TOLERANCE
) -> Iterator[Layers]:
  """Random schedules near a budget: sorted uniform counts, those that meet it.

  Args:
    spec: The model.
    target_gmacs: The budget.
    count: Schedules to give.
    seed: Of the counts; the first schedules of a longer series are those of a shorter one.
    tolerance: Distance from the budget, as a share of it.

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
  """Which of many schedules meet a budget, by the tokens that each compressed layer leaves."""
  left = iter(after.T.astype(float))
  n: np.ndarray = np.full(len(after), float(spec.num_tokens))
  counts = []
  for yes in compressed_layers(spec):
    before, n = n, next(left) if yes else n
    counts.append((before, n))
  spent = macs.macs(spec, spec.dense_layers, counts) / 1e9
  return np.asarray(np.abs(spent - target_gmacs) <= tolerance * target_gmacs)
