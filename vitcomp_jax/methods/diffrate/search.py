"""DiffRate's search: builds layers with learnable counts, penalises them and deploys plans."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vitcomp_jax.config import DiffRateOptions
from vitcomp_jax.cost.cost_models import MACS, CostModel
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.base import Layers, Metrics
from vitcomp_jax.methods.bisection import bracket
from vitcomp_jax.methods.diffrate import recipe as recipes
from vitcomp_jax.methods.diffrate.masking import (
  NOISE,
  HeadOnlyPruneMerge,
  MaskedPruneMerge,
  ReplayedCounts,
  SearchedCounts,
  candidates,
)
from vitcomp_jax.methods.diffrate.recipe import Recipe
from vitcomp_jax.methods.diffrate.reducer import PruneMerge
from vitcomp_jax.methods.handmade import compressed_layers
from vitcomp_jax.models.layer_trees import of_layer, to_tree
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.tokens import Output

_REFERENCE_GMACS = 4.6  # of DeiT-S, the model of the paper's coefficient
# Slope of the initial logits that keep all tokens. Adam moves a logit by the learning rate in each
# step, however small its gradient: the steeper, the later a count changes.
_STEEP = 300.0
_ACTIONS = ("prune", "merge")


@dataclasses.dataclass(frozen=True)
class DiffRate:
  """Learns how many tokens each layer of a model prunes and merges, under a budget.

  Your training loop applies a model with `layers()`, adds `penalty` to its loss and trains the
  collection `arch`, starting from `init()`; `deploy` makes static layers of it.

  Attributes:
    spec: The model.
    target: Budget in the unit of `cost`, GMACs by default.
    options: Options of the method, such as `config.search`.
    base: Layers to search on, such as slimmed ones; None: the dense model's.
    cost: Cost that the budget limits.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023.

  Example:
    >>> import jax, optax, numpy as np
    >>> import vitcomp_jax as vc
    >>> model, params = vc.load("vit_mini_patch3_30", weights="bundled")
    >>> method = vc.methods.DiffRate(model.spec, target=0.7 * vc.count_cost(model).gmacs)
    >>> masked = model.clone(layers=method.layers())
    >>> arch, tx = method.init(), optax.adam(0.1)
    >>> state = tx.init(arch)
    >>> @jax.jit
    ... def step(arch, state, images, labels, i):
    ...   def loss_fn(arch):
    ...     out = masked.apply({"params": params, "arch": arch}, images, method="forward")
    ...     task = optax.softmax_cross_entropy_with_integer_labels(out.logits, labels).mean()
    ...     penalty, metrics = method.penalty(arch, out, i)
    ...     return task + penalty, metrics
    ...   grads, metrics = jax.grad(loss_fn, has_aux=True)(arch)
    ...   updates, state = tx.update(grads, state)
    ...   return optax.apply_updates(arch, updates), state, metrics
    >>> images, labels = np.ones((4, 30, 30, 3), np.float32), np.arange(4)
    >>> for i in range(2):
    ...   arch, state, metrics = step(arch, state, images, labels, i)
    >>> layers = method.deploy(jax.device_get(arch))
    >>> plan = vc.make_plan(model.spec, layers, {"method": "diffrate"})
    >>> small, small_params = vc.compress(model, params, plan)
  """

  spec: ViTSpec
  target: float
  options: DiffRateOptions = DiffRateOptions()
  base: Layers | None = None
  cost: CostModel = MACS

  @property
  def dense(self) -> Layers:
    """Returns the layers that keep all tokens."""
    return self.base or self.spec.dense_layers

  @property
  def recipe(self) -> Recipe:
    """Returns the recipe named by the options."""
    return recipes.recipe(self.options.recipe, self.spec)

  @property
  def is_compressed(self) -> tuple[bool, ...]:
    """Returns which layers may lose tokens."""
    return compressed_layers(self.spec, self.options.compress_first, self.options.compress_last)

  @property
  def budget_unit(self) -> float:
    """Returns the cost that counts as 1 in the budget term."""
    if not self.recipe.relative_budget:
      return 1e9
    return self.cost.scale * self._dense_cost / _REFERENCE_GMACS

  @property
  def _dense_cost(self) -> float:
    return self.cost.static(self.spec, self.spec.dense_layers)

  def check(self) -> None:
    """Refuses a search that cannot succeed.

    Raises:
      UserError: For a granularity above the model's patches, an unsupported importance metric, a
        budget below the smallest plan, or one in ms with a recipe that counts MACs.
    """
    patches, granularity = self.spec.num_patches, self.options.granularity
    if granularity > patches:
      raise UserError(f"config.search.granularity: expected 1 to {patches}, got {granularity}.")
    self.spec.importance(self.options.importance, "config.search.importance")  # raises
    if self.cost is not MACS and not self.recipe.relative_budget:
      raise UserError(
        f"config.search.recipe: expected ours for a budget in {self.cost.unit}, got "
        f"{self.options.recipe}."
      )
    smallest, dense = self._smallest(), self._dense_cost
    if not smallest <= self.target <= dense * (1 + 1e-9):
      raise UserError(
        f"config.budget: expected at least {smallest:.4g} {self.cost.unit} (fraction "
        f"{smallest / dense:.3g}), what the smallest plan of {self.spec.name} costs, got "
        f"{self.target:.4g} (fraction {self.target / dense:.3g})."
      )

  def _smallest(self) -> float:
    """Returns the cost of the cheapest plan: one patch token after each compressed layer."""
    least = np.where(np.array(self.is_compressed)[:, None], 1, self._patches())
    return self.cost.static(self.spec, self.static_layers(np.repeat(least, 2, axis=1)))

  def layers(self, logits_only: bool = False) -> Layers:
    """Returns layers that learn their counts, each with its own reducer.

    Args:
      logits_only: Whether the last layer computes only the tokens that the head reads. Logits,
        counts and their gradients are the same.
    """
    spec, eps = self.spec, self.recipe.mask_eps
    importance = spec.importance(self.options.importance)
    layers = []
    for i, layer in enumerate(self.dense):
      reduce = MaskedPruneMerge(self._counts(i), importance, self.recipe)
      layers.append(dataclasses.replace(layer, reduce=reduce, mask_eps=eps))
    if logits_only and not spec.pools_patches:
      reduce = HeadOnlyPruneMerge(self._counts(spec.depth - 1))
      layers[-1] = dataclasses.replace(layers[-1], reduce=reduce, queries=spec.num_prefix)
    return tuple(layers)

  def _counts(self, layer: int) -> SearchedCounts:
    prune, merge = (self._granularity(layer, action) for action in _ACTIONS)
    return SearchedCounts(self.spec.patches_at(layer), self.spec.num_prefix, (prune, merge))

  def _granularity(self, layer: int, action: str) -> int:
    """Returns the granularity; layers that keep all tokens have a single candidate."""
    learns = self.is_compressed[layer] and self.options.actions in ("both", action)
    return self.options.granularity if learns else self.spec.patches_at(layer) + 1

  @functools.cached_property
  def _candidates(self) -> list[dict[str, np.ndarray]]:
    """Returns the candidates of each layer, by the name of their logits."""
    return [
      {
        f"{a}_logits": candidates(self.spec.patches_at(i), self._granularity(i, a))
        for a in _ACTIONS
      }
      for i in range(self.spec.depth)
    ]

  def replayed_layers(self, limits: Sequence[int | None] | None = None) -> Layers:
    """Returns layers that run any plan by masking, with its counts as variables.

    This compares plans without compiling each of them.

    Args:
      limits: Number of tokens that each layer passes on, at least the kept ones; None: all.
    """
    spec, importance = self.spec, self.spec.importance(self.options.importance)
    layers = []
    for i, layer in enumerate(self.dense):
      counts = ReplayedCounts(spec.patches_at(i), spec.num_prefix)
      reduce = MaskedPruneMerge(counts, importance, self.recipe, limits[i] if limits else None)
      layers.append(dataclasses.replace(layer, reduce=reduce))
    return tuple(layers)

  def replayed_arch(self, layers: Layers) -> dict[str, Any]:
    """Returns the counts of a plan's layers as the variables of `replayed_layers`."""
    arch = []
    for layer in layers:
      assert isinstance(layer.reduce, PruneMerge)
      prune, merge = layer.reduce.prune_keep, layer.reduce.merge_keep
      arch.append({"reduce": {"prune_keep": jnp.float32(prune), "merge_keep": jnp.float32(merge)}})
    return to_tree(self.spec, arch)

  def penalty(self, arch: Mapping[str, Any], out: Output, step: Array) -> tuple[Array, Metrics]:
    """Computes the budget term (Eq. 9): lambda times the squared distance from the target.

    Args:
      arch: Rates; unused, as `out` reflects them.
      out: Output of the model with `layers()`.
      step: Step, from 0; the warm-up has no budget term.

    Returns:
      The term, and metrics: the cost, and the tokens left by each layer.
    """
    del arch
    reached = search_counts(self.spec, out)
    spent = {c.key: c.count(self.spec, self.dense, reached) for c in (MACS, self.cost)}
    distance = (spent[self.cost.key] - self.target * self.cost.scale) / self.budget_unit
    weight = jnp.where(step < self.options.warmup_steps, 0.0, self.options.budget_weight)
    counts = jnp.stack(_kept(out))
    metrics = {c.key: spent[c.key] / c.scale for c in (MACS, self.cost)}
    metrics |= {"tokens": counts, "budget_loss": distance**2}
    return weight * distance**2, metrics

  def init(self, learnt: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the initial rates: the collection `arch`.

    With `zeros`, the authors' choice, both pruning and merging keep half of the tokens in every
    layer. With `merge_first`, almost no token is pruned, and every layer merges as many as the
    budget requires; if only pruning is learnt, it prunes them instead.

    Args:
      learnt: Rates of a search at another budget to continue from: one slope is added to all
        logits to meet this budget. None: start afresh.
    """
    if learnt is None and self.options.init == "zeros":
      return self._sloped_arch(0.0, 0.0)

    def at(slope: float) -> dict[str, Any]:
      if learnt is not None:
        return jax.tree.map(jnp.add, dict(learnt), self._sloped_arch(slope, slope))
      slopes = (slope, _STEEP) if self.options.actions == "prune" else (_STEEP, slope)
      return self._sloped_arch(*slopes)

    def is_above(slope: float) -> bool:
      counts = self.expected_counts(jax.device_get(at(slope)))
      return self.cost.static(self.spec, self.static_layers(counts)) > self.target

    return at(bracket(is_above, -_STEEP, _STEEP)[0])

  def _sloped_arch(self, prune: float, merge: float) -> dict[str, Any]:
    """Returns logits that rise linearly with the share of tokens kept."""
    slopes = {"prune_logits": prune, "merge_logits": merge}
    arch = []
    for i, layer in enumerate(self._candidates):
      logits = {name: slopes[name] * c / self.spec.patches_at(i) for name, c in layer.items()}
      arch.append({"reduce": {k: jnp.asarray(v, jnp.float32) for k, v in logits.items()}})
    return to_tree(self.spec, arch)

  def expected_counts(self, arch: Mapping[str, Any]) -> np.ndarray:
    """Computes the expected number of patch tokens under learnt rates (Eq. 4), on the host.

    Args:
      arch: Learnt rates.

    Returns:
      float64[layers 2], after pruning and after merging.
    """
    rows = []
    for i, layer in enumerate(self._candidates):
      logits = of_layer(self.spec, arch, i)["reduce"]
      rows.append([_expectation(logits[k], options) for k, options in layer.items()])
    return np.array(rows)

  def deploy(self, arch: Mapping[str, Any]) -> Layers:
    """Returns static layers with the learnt counts, adjusted to the budget."""
    return self.deploy_counts(self.expected_counts(arch))[0]

  def deploy_counts(self, expected: np.ndarray) -> tuple[Layers, float]:
    """Makes static layers that meet the budget, by one offset to all expected counts.

    Args:
      expected: Result of `expected_counts`.

    Returns:
      The layers nearest to the budget, and the offset in tokens.
    """
    depth = self.spec.depth
    # Equal counts would all step at once, past the budget; a tiny difference separates them.
    hair = np.linspace(0, 1e-3, 2 * depth).reshape(depth, 2)
    learnt = [[options.size > 1 for options in o.values()] for o in self._candidates]

    def shifted(offset: float) -> Layers:
      return self.static_layers(np.where(learnt, expected + hair + offset, expected))

    def distance(layers: Layers) -> float:
      return self.cost.static(self.spec, layers) - self.target

    reach = float(self.spec.num_patches)
    found = bracket(lambda offset: distance(shifted(offset)) > 0, -reach, reach)
    offset = min(found, key=lambda offset: abs(distance(shifted(offset))))
    return shifted(offset), offset

  def static_layers(self, expected: np.ndarray) -> Layers:
    """Returns static layers that keep the expected counts, rounded up to multiples of the tile."""
    patches, prefix, tile = self._patches(), self.spec.num_prefix, self.options.tile
    whole = np.ceil(expected - patches * NOISE)
    counts = np.clip(whole, 1, patches).astype(int) + prefix
    counts = np.minimum(-(-counts // tile) * tile, patches + prefix)
    layers = []
    for layer, (prune_keep, merge_keep) in zip(self.dense, counts.tolist(), strict=True):
      reduce = PruneMerge(
        prune_keep,
        merge_keep,
        signed_similarity=self.recipe.signed_similarity,
        importance=self.spec.importance(self.options.importance),
        whole_sizes=self.recipe.whole_sizes,
        first_receives=self.recipe.first_receives,
      )
      layers.append(dataclasses.replace(layer, reduce=reduce))
    return tuple(layers)

  def _patches(self) -> np.ndarray:
    """Returns the patch tokens of each layer if none is removed, [layers 1]."""
    return np.array([[self.spec.patches_at(i)] for i in range(self.spec.depth)])


def search_counts(spec: ViTSpec, out: Output) -> list[tuple[Array, Array]]:
  """Returns the traced tokens at attention and at the MLP of each layer.

  Each layer's count takes the gradient of its own MLP and of the next layer's attention.
  """
  after = _kept(out)
  starts = {i: jnp.asarray(float(n)) for i, n in spec.starts.items()}
  return [(starts[i] if i in starts else after[i - 1], n) for i, n in enumerate(after)]


def _kept(out: Output) -> list[Array]:
  """Returns the number of tokens left by each layer of a search."""
  return [tokens.num_kept for tokens in out.layers if tokens.num_kept is not None]


def _expectation(logits: Array | np.ndarray, options: np.ndarray) -> float:
  values = np.asarray(logits, np.float64)
  weights = np.exp(values - values.max())
  return float(options @ weights / weights.sum())
