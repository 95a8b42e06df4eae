"""DiffRate's search: reducers that mask and learn their counts, and the method that builds them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vitcomp_jax.costs import MACS, Cost
from vitcomp_jax.methods.budget import bracket
from vitcomp_jax.methods.diffrate.reducer import PruneMerge
from vitcomp_jax.methods.handmade import compressed_layers
from vitcomp_jax.models.spec import LayerSpec, ViTSpec, of_layer, to_tree
from vitcomp_jax.models.tokens import AttentionStats, Aux, Output, Tokens, mark_pruned
from vitcomp_jax.ops import merge, select
from vitcomp_jax.ops.straight_through import ste_ceil, ste_mask, ste_min

# The paper's coefficient is for DeiT-S, whose 4.6 GMACs the relative budget term refers to.
REFERENCE_GMACS = 4.6

# How steeply the logits of an action that begins by keeping all tokens rise, from no token kept to
# all. Adam moves a logit by the learning rate in a step, however small its gradient: the steeper
# the start, the later a count leaves it.
_STEEP = 300.0

# Float noise of an expected count, relative to the patches: a few units in the last place.
_NOISE = 2.0**-22


def candidates(num_patches: int, granularity: int) -> np.ndarray:
  """Kept patch tokens to choose among, most first: n, n - g, ... down to at least 1."""
  return np.arange(num_patches, 0, -granularity)


def expected_count(logits: Float[Array, " c"], options: np.ndarray) -> Float[Array, ""]:
  """The expectation of the kept patch tokens under the softmax of the logits (Eq. 4)."""
  return jnp.sum(jax.nn.softmax(logits) * options.astype(logits.dtype))


def kept_count(expected: Float[Array, ""], num_patches: int) -> Float[Array, ""]:
  """The expectation rounded up, with a straight-through gradient.

  An expectation that is whole in exact arithmetic, such as the start's, may come out a few units
  in the last place higher; it must not be rounded up for that.
  """
  return ste_ceil(expected, tolerance=num_patches * _NOISE)


def keep_probability(
  logits: Float[Array, " c"], options: np.ndarray, num_prefix: int, num_tokens: int
) -> Float[Array, " n"]:
  """Probability that the token at each rank is kept: that of choosing a count above its rank."""
  covered = np.arange(num_tokens)[:, None] < options + num_prefix  # [n c]
  return jnp.asarray(covered, logits.dtype) @ jax.nn.softmax(logits)


class PruneMergeSearch(nn.Module):
  """DiffRate's reduction with learnable counts: masks tokens instead of removing them.

  Both counts live in the collection `arch`. Tokens come out sorted by importance, the dropped
  ones last.

  Attributes:
    num_patches: Patch tokens of the model.
    num_prefix: Prefix tokens of the model.
    granularity: Distance between candidate counts of pruning and of merging; `num_patches + 1`
      leaves the single candidate that keeps all.
    clamp_size: Clamp sizes to 1 wherever a merge happens, as the authors do while searching (and
      not when deployed).
    mask_follows: A token takes its mask along when the tokens are sorted. In CAFormer's authors'
      code the mask stays at its rank: no value differs, as dropped tokens stay behind the kept
      ones, but a rate gets the gradient of whichever dropped token stands there later.
    signed_similarity: The authors' merge weight, see `PruneMerge`.
    importance: See `PruneMerge`.
    whole_sizes: See `PruneMerge`.
    first_receives: See `PruneMerge`.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Sec. 3.3 and Eq. 4-7.
  """

  num_patches: int
  num_prefix: int
  granularity: tuple[int, int] = (1, 1)
  clamp_size: bool = False
  mask_follows: bool = True
  signed_similarity: bool = False
  importance: str = "cls"
  whole_sizes: bool = False
  first_receives: bool = True

  @nn.compact
  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]:
    assert stats is not None, "PruneMergeSearch needs the attention's statistics"
    tokens = self._sorted(tokens, stats)
    n = tokens.x.shape[1]
    assert tokens.keep is not None
    prune_probability, prune_count = self._choice("prune")
    merge_probability, merge_count = self._choice("merge")
    before = self._before(tokens, prune_count.dtype)
    pruned = jnp.minimum(before, prune_count)
    keep = tokens.keep * _rank_mask(prune_probability[:n], prune_count, before)[None]
    rank = jnp.arange(n, dtype=pruned.dtype)[None]
    tokens = mark_pruned(tokens, (rank >= pruned) & (rank < before))
    if self.granularity[1] <= self.num_patches:
      tokens = self._merged(tokens, merge_count, pruned)
    keep = keep * _rank_mask(merge_probability[:n], merge_count, pruned)[None]
    count = ste_min(before, prune_count, merge_count)
    return tokens.replace(keep=keep, num_kept=jax.lax.stop_gradient(count)), Aux(count)

  def count(self, n: int) -> int:
    """Returns `n`: all tokens stay, masked or not."""
    return n

  def _before(self, tokens: Tokens, dtype: jnp.dtype) -> Array:
    # Not counted in `keep`: one image's mask would have to reach every device.
    total = self.num_patches + self.num_prefix
    return jnp.asarray(total if tokens.num_kept is None else tokens.num_kept, dtype)

  def _choice(self, what: str) -> tuple[Array, Array]:
    """The probability that each rank is kept, and the kept count, prefix included."""
    options = candidates(self.num_patches, self.granularity[what == "merge"])
    logits = self.variable("arch", f"{what}_logits", jnp.zeros, options.shape).value
    if len(options) == 1:  # nothing to learn, so that no backward pass has to come here
      logits = jax.lax.stop_gradient(logits)
    count = kept_count(expected_count(logits, options), self.num_patches) + self.num_prefix
    num_tokens = self.num_patches + self.num_prefix
    return keep_probability(logits, options, self.num_prefix, num_tokens), count

  def _sorted(self, tokens: Tokens, stats: AttentionStats) -> Tokens:
    n = tokens.x.shape[1]
    importance = stats.importance(self.importance, tokens)
    ones = jnp.ones(tokens.x.shape[:2], importance.dtype)
    keep = ones if tokens.keep is None else tokens.keep
    order = select.importance_order(importance, tokens.num_prefix, n)
    return tokens.replace(
      x=select.permute(tokens.x, order),
      size=select.take(ones if tokens.size is None else tokens.size, order),
      keep=select.take(keep, order) if self.mask_follows else keep,
      source=select.follow(tokens.source, order, n),
      place=None if tokens.place is None else select.follow(tokens.place, order, n),
    )

  def _merged(self, tokens: Tokens, start: Array, stop: Array) -> Tokens:
    """Adds the tokens of rank [start, stop) to their receivers; they stay where they are."""
    assert tokens.size is not None
    rank = jnp.arange(tokens.x.shape[1], dtype=start.dtype)[None]
    joins = (rank >= start) & (rank < stop)
    first = jnp.minimum(tokens.num_prefix + (not self.first_receives), start - 1)
    receives = (rank >= first) & (rank < start)
    scores = jnp.where(receives[:, None], merge.similarity(tokens.x, tokens.x), -jnp.inf)
    receiver, weight = merge.best(scores)
    weight = jnp.ones_like(weight) if self.whole_sizes else weight
    weight = jnp.where(joins, weight, 0).astype(tokens.size.dtype)
    weight = weight if self.signed_similarity else jnp.maximum(weight, 0)
    joined = merge.joins(receiver, rank.size, tokens.x.dtype)
    joined = joined * joins[:, None].astype(joined.dtype)
    total = tokens.x + merge.join(tokens.x, receiver, joins)
    size, share = tokens.size, tokens.size * weight
    if self.clamp_size:
      share = jnp.where(joins, jnp.maximum(share, 1), 0)
      size = jnp.where(joins, share, size)
    size = size + jnp.einsum("bts,bs->bt", joined.astype(size.dtype), share)
    return tokens.replace(
      x=total / (1 + jnp.sum(joined, axis=2))[..., None],
      size=jax.lax.stop_gradient(size),
      source=_follow_join(tokens.source, receiver, joins[0]),
    )


class PruneMergeCounts(PruneMergeSearch):
  """The counts of a last layer of which only the prefix is left: no token needs to be masked."""

  @nn.compact
  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]:
    (_, prune_count), (_, merge_count) = self._choice("prune"), self._choice("merge")
    before = self._before(tokens, prune_count.dtype)
    return tokens, Aux(ste_min(before, prune_count, merge_count))


class PruneMergeMasked(PruneMergeSearch):
  """`PruneMerge` by masking: its counts are variables, so that plans are tried without compiling.

  The collection `arch` holds the counts themselves, `prune_keep` and `merge_keep`.

  Attributes:
    limit: Tokens that go on, of which the kept ones are the first; None: all, masked or not.
  """

  limit: int | None = None

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]:
    tokens, aux = super().__call__(tokens, stats)
    if self.limit is not None:  # The others hold no patches any more.
      parts = {k: getattr(tokens, k)[:, : self.limit] for k in ("x", "size", "keep")}
      tokens = tokens.replace(**parts)
    return tokens, aux

  def count(self, n: int) -> int:
    return n if self.limit is None else min(n, self.limit)

  def _choice(self, what: str) -> tuple[Array, Array]:
    count = self.variable("arch", f"{what}_keep", jnp.zeros, ()).value
    rank = jnp.arange(self.num_patches + self.num_prefix, dtype=count.dtype)
    return (rank < count).astype(count.dtype), count


_KEEPS = ("prune_keep", "merge_keep")


def _rank_mask(probability: Array, count: Array, stop: Array) -> Array:
  """0 for ranks in [count, stop), 1 elsewhere; the probability's gradient, unless none is 0.

  Ranks past `stop` were dropped earlier. They are 1 here: their 0 is the earlier mask's, which
  this one then lets the gradient pass to.
  """
  rank = jnp.arange(probability.shape[0], dtype=count.dtype)
  mask = ste_mask(probability, (rank >= count) & (rank < stop))
  return jnp.where(count < stop, mask, 1.0)


def _follow_join(source: Array, receiver: Array, joins: Array) -> Array:
  position = jnp.maximum(source, 0)
  moved = jnp.take_along_axis(receiver, position, axis=1)
  return jnp.where((source >= 0) & joins[position], moved, source)


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
  cost: Cost = MACS
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
    whole = np.ceil(expected - patches * _NOISE)
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
