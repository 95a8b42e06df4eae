"""DiffRate's search: builds the layers that learn, penalises them, and deploys what they learnt."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vitcomp_jax.cost.cost_models import MACS, CostModel
from vitcomp_jax.methods.budget import bracket
from vitcomp_jax.methods.diffrate.masking import (
  NOISE,
  PruneMergeCounts,
  PruneMergeMasked,
  PruneMergeSearch,
  candidates,
  expected_count,
)
from vitcomp_jax.methods.diffrate.reducer import PruneMerge
from vitcomp_jax.methods.handmade import compressed_layers
from vitcomp_jax.models.spec import LayerSpec, ViTSpec, of_layer, to_tree
from vitcomp_jax.models.tokens import Output

# The paper's coefficient is for DeiT-S, whose 4.6 GMACs the relative budget term refers to.
REFERENCE_GMACS = 4.6

# How steeply the logits of an action that begins by keeping all tokens rise, from no token kept to
# all. Adam moves a logit by the learning rate in a step, however small its gradient: the steeper
# the start, the later a count leaves it.
_STEEP = 300.0

_KEEPS = ("prune_keep", "merge_keep")


@dataclasses.dataclass(frozen=True)
class DiffRate:
  """The method.

  Attributes:
    target: The budget, in the cost's unit.
    granularity: Distance between candidate counts.
    init: Where the rates start: `zeros` is the authors', see `initial_arch`.
    budget_weight: Lambda of the budget term.
    budget_unit: What counts as 1 in the budget term: MACs, or milliseconds.
    warmup_steps: Steps without the budget term.
    compress_first: May the first layer lose tokens.
    compress_last: May the last layer lose tokens; None: unless the head pools over patches.
    clamp_size: See `PruneMergeSearch`.
    mask_follows: See `PruneMergeSearch`.
    signed_similarity: See `PruneMerge`.
    importance: See `ViTSpec.importance`.
    whole_sizes: See `PruneMerge`.
    first_receives: See `PruneMerge`.
    actions: What is learnt: `both`, or `prune` or `merge` alone.
    mask_eps: See `LayerSpec`.
    base: The layers to search on, such as slimmed ones; None: the dense model's.
    cost: What the budget limits.
    tile: The counts of a plan are multiples of it, but for those that keep all tokens.
  """

  target: float
  granularity: int = 1
  init: str = "merge_first"
  budget_weight: float = 5.0
  budget_unit: float = 1e9
  warmup_steps: int = 0
  compress_first: bool = False
  compress_last: bool | None = None
  clamp_size: bool = False
  mask_follows: bool = True
  signed_similarity: bool = False
  importance: str = "auto"
  whole_sizes: bool = False
  first_receives: bool = True
  actions: str = "both"
  mask_eps: float = 0.0
  base: tuple[LayerSpec, ...] | None = None
  cost: CostModel = MACS
  tile: int = 1

  def _base(self, spec: ViTSpec) -> tuple[LayerSpec, ...]:
    return self.base or spec.dense_layers

  def is_compressed(self, spec: ViTSpec) -> tuple[bool, ...]:
    """Returns which layers may lose tokens."""
    return compressed_layers(spec, self.compress_first, self.compress_last)

  def layers(self, spec: ViTSpec, logits_only: bool = False) -> tuple[LayerSpec, ...]:
    """Layers whose reducers learn their counts; one reducer per layer, as each has its own.

    Args:
      spec: The model.
      logits_only: Of the last layer, only what the head reads is computed. Logits, counts and their
        gradients are the same.
    """
    layers = [
      dataclasses.replace(layer, reduce=self._reducer(spec, i), mask_eps=self.mask_eps)
      for i, layer in enumerate(self._base(spec))
    ]
    if logits_only and not spec.pools_patches:
      whole = self._reducer(spec, spec.depth - 1)
      counts = PruneMergeCounts(whole.num_patches, whole.num_prefix, whole.granularity)
      layers[-1] = dataclasses.replace(layers[-1], reduce=counts, queries=spec.num_prefix)
    return tuple(layers)

  def masked_layers(
    self, spec: ViTSpec, limits: Sequence[int | None] | None = None
  ) -> tuple[LayerSpec, ...]:
    """Layers that run any plan, given as `counts_arch`, by masking.

    Args:
      spec: The model.
      limits: Of each layer, the tokens that go on, at least those that are kept; None: all.
    """
    options = self._merging(spec)
    reducers = [
      PruneMergeMasked(spec.patches_at(i), spec.num_prefix, limit=limit, **options)
      for i, limit in enumerate(limits or [None] * spec.depth)
    ]
    return tuple(
      dataclasses.replace(layer, reduce=reducer)
      for layer, reducer in zip(self._base(spec), reducers, strict=True)
    )

  def _merging(self, spec: ViTSpec) -> dict[str, Any]:
    """The options that a search and its plan have in common."""
    return {
      "signed_similarity": self.signed_similarity,
      "importance": spec.importance(self.importance),
      "whole_sizes": self.whole_sizes,
      "first_receives": self.first_receives,
    }

  def counts_arch(self, spec: ViTSpec, layers: tuple[LayerSpec, ...]) -> dict[str, Any]:
    """A plan's counts, for `masked_layers`."""
    reducers = [layer.reduce for layer in layers]
    assert all(isinstance(reducer, PruneMerge) for reducer in reducers)
    return to_tree(
      spec, [{"reduce": {k: jnp.float32(getattr(r, k)) for k in _KEEPS}} for r in reducers]
    )

  def _reducer(self, spec: ViTSpec, layer: int) -> PruneMergeSearch:
    return PruneMergeSearch(
      spec.patches_at(layer),
      spec.num_prefix,
      (self._granularity(spec, layer, "prune"), self._granularity(spec, layer, "merge")),
      self.clamp_size,
      self.mask_follows,
      **self._merging(spec),
    )

  def _granularity(self, spec: ViTSpec, layer: int, action: str) -> int:
    """Returns the granularity; layers that keep all tokens have a single candidate."""
    learns = self.is_compressed(spec)[layer] and self.actions in ("both", action)
    return self.granularity if learns else spec.patches_at(layer) + 1

  def _candidates(self, spec: ViTSpec) -> list[dict[str, np.ndarray]]:
    """The candidates of each layer, by the name of their logits."""
    return [
      {
        f"{action}_logits": candidates(spec.patches_at(i), self._granularity(spec, i, action))
        for action in ("prune", "merge")
      }
      for i in range(spec.depth)
    ]

  def penalty(
    self, spec: ViTSpec, arch: Mapping[str, Any], out: Output, step: Array
  ) -> tuple[Array, dict[str, Array]]:
    """The budget term (Eq. 9): lambda times the squared distance from the target, in units."""
    reached = search_counts(spec, out)
    spent = {c.key: c.count(spec, self._base(spec), reached) for c in (MACS, self.cost)}
    distance = (spent[self.cost.key] - self.target * self.cost.scale) / self.budget_unit
    weight = jnp.where(step < self.warmup_steps, 0.0, self.budget_weight)
    counts = jnp.stack([jnp.asarray(reduced.count) for _, reduced in out.aux])
    figures = {c.key: spent[c.key] / c.scale for c in (MACS, self.cost)}
    figures |= {"tokens": counts, "budget_loss": distance**2}
    figures["expected"] = self.traced_counts(spec, arch)
    return weight * distance**2, figures

  def initial_arch(self, spec: ViTSpec, learnt: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The rates before the first step.

    `zeros`, the authors' start, keeps half of the tokens in every layer, by pruning and merging
    alike. `merge_first` is all but sure to prune none, and merges as many in every layer as the
    budget asks for; where only pruning is learnt, it prunes them.

    Args:
      spec: The model.
      learnt: Rates of a search at another budget, from which this one goes on: one slope is added
        to all logits, such that the budget is met. None: a start of its own.
    """
    if learnt is None and self.init == "zeros":
      return self._sloped_arch(spec, 0.0, 0.0)

    def at(slope: float) -> dict[str, Any]:
      if learnt is not None:
        return jax.tree.map(jnp.add, dict(learnt), self._sloped_arch(spec, slope, slope))
      slopes = (slope, _STEEP) if self.actions == "prune" else (_STEEP, slope)
      return self._sloped_arch(spec, *slopes)

    def is_above(slope: float) -> bool:
      return self.cost.static(spec, self.deploy(spec, jax.device_get(at(slope)))) > self.target

    return at(bracket(is_above, -_STEEP, _STEEP)[0])

  def _sloped_arch(self, spec: ViTSpec, prune: float, merge: float) -> dict[str, Any]:
    """Logits that rise by a slope from no token kept to all."""
    slopes = {"prune_logits": prune, "merge_logits": merge}
    arch = []
    for i, layer in enumerate(self._candidates(spec)):
      logits = {name: slopes[name] * c / spec.patches_at(i) for name, c in layer.items()}
      arch.append({"reduce": {k: jnp.asarray(v, jnp.float32) for k, v in logits.items()}})
    return to_tree(spec, arch)

  def traced_counts(self, spec: ViTSpec, arch: Mapping[str, Any]) -> Array:
    """`expected_counts` inside of a step, f32[layers 2]."""
    rows = [
      expected_count(of_layer(spec, arch, i)["reduce"][name], options)
      for i, layer in enumerate(self._candidates(spec))
      for name, options in layer.items()
    ]
    return jnp.stack(rows).reshape(-1, 2)

  def expected_counts(self, spec: ViTSpec, arch: Mapping[str, Any]) -> np.ndarray:
    """Expected kept patch tokens, float64[layers 2]: after pruning and after merging."""
    return np.array(
      [
        [_expectation(of_layer(spec, arch, i)["reduce"][k], options) for k, options in o.items()]
        for i, o in enumerate(self._candidates(spec))
      ]
    )

  def deploy(self, spec: ViTSpec, arch: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Static layers that keep what was learnt, unadjusted."""
    return self.static_layers(spec, self.expected_counts(spec, arch))

  def deploy_within(
    self, spec: ViTSpec, expected: np.ndarray
  ) -> tuple[tuple[LayerSpec, ...], float]:
    """Static layers that meet the budget: one offset is added to all expected counts.

    Args:
      spec: The model.
      expected: From `expected_counts`.

    Returns:
      The layers that come nearest to the budget, and the offset in tokens.
    """
    # Counts that are equal would all step at once, past the budget; a hair between them.
    hair = np.linspace(0, 1e-3, 2 * spec.depth).reshape(spec.depth, 2)
    learnt = [[options.size > 1 for options in o.values()] for o in self._candidates(spec)]

    def shifted(offset: float) -> tuple[LayerSpec, ...]:
      return self.static_layers(spec, np.where(learnt, expected + hair + offset, expected))

    def distance(layers: tuple[LayerSpec, ...]) -> float:
      return self.cost.static(spec, layers) - self.target

    reach = float(spec.num_patches)
    found = bracket(lambda offset: distance(shifted(offset)) > 0, -reach, reach)
    offset = min(found, key=lambda offset: abs(distance(shifted(offset))))
    return shifted(offset), offset

  def static_layers(self, spec: ViTSpec, expected: np.ndarray) -> tuple[LayerSpec, ...]:
    """Static layers that keep the expected counts, rounded up, to a tile if there is one."""
    options, patches = self._merging(spec), _patches(spec)
    whole = np.ceil(expected - patches * NOISE)
    counts = np.clip(whole, 1, patches).astype(int) + spec.num_prefix
    counts = np.minimum(-(-counts // self.tile) * self.tile, patches + spec.num_prefix)
    return tuple(
      dataclasses.replace(layer, reduce=PruneMerge(int(p), int(m), **options))
      for layer, (p, m) in zip(self._base(spec), counts, strict=True)
    )

  def smallest(self, spec: ViTSpec) -> float:
    """Returns the cost of the cheapest plan: one patch token after each compressed layer."""
    least = np.where(np.array(self.is_compressed(spec))[:, None], 1, _patches(spec))
    return self.cost.static(spec, self.static_layers(spec, np.repeat(least, 2, axis=1)))


def search_counts(spec: ViTSpec, out: Output) -> list[tuple[Array, Array]]:
  """Traced tokens at attention and at the MLP of each layer; each layer's count takes the gradient
  of its own MLP and of the next layer's attention."""
  after = [jnp.asarray(reduced.count) for _, reduced in out.aux]
  starts = {i: jnp.asarray(float(n)) for i, n in spec.starts.items()}
  return [(starts[i] if i in starts else after[i - 1], n) for i, n in enumerate(after)]


def _patches(spec: ViTSpec) -> np.ndarray:
  """Patch tokens of each layer if none is removed, [layers 1]."""
  return np.array([[spec.patches_at(i)] for i in range(spec.depth)])


def _expectation(logits: Array | np.ndarray, options: np.ndarray) -> float:
  values = np.asarray(logits, np.float64)
  weights = np.exp(values - values.max())
  return float(options @ weights / weights.sum())
