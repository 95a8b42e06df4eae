"""DiffRate's search: builds layers with learnable counts, penalises their cost, deploys plans."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
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
from vitcomp_jax.methods.diffrate.counts import GivenCounts
from vitcomp_jax.methods.diffrate.deployment import Deployment
from vitcomp_jax.methods.diffrate.masking import HeadOnlyPruneMerge, MaskedPruneMerge
from vitcomp_jax.methods.diffrate.rates import LogitRates, Rates, ShareRates
from vitcomp_jax.methods.diffrate.recipe import Recipe
from vitcomp_jax.methods.diffrate.reducer import PruneMerge
from vitcomp_jax.methods.diffrate.starts import STRONGEST, starts
from vitcomp_jax.methods.widths.factors import LayerFactors
from vitcomp_jax.methods.widths.lists import sorted_lists
from vitcomp_jax.methods.widths.masking import masked_params
from vitcomp_jax.models.layer_trees import to_tree
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.tokens import Output

_REFERENCE_GMACS = 4.6  # of DeiT-S, the model that the paper's coefficient is for
Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class DiffRate:
  """Learns how many tokens each layer of a model prunes and merges, under a budget.

  Your training loop applies a model with `layers()`, adds `penalty` to its loss and trains the
  collection `arch`, starting from `init()`; `deploy` turns it into static layers.

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

  @functools.cached_property
  def rates(self) -> Rates:
    """Returns the rates that are learnt, of the recipe's kind."""
    kind = ShareRates if self.recipe.learns_shares else LogitRates
    return kind(self.spec, self.options)

  @functools.cached_property
  def deployment(self) -> Deployment:
    """Returns the object that turns tables of counts into static layers."""
    return Deployment(self.spec, self.options, self.rates, self.dense)

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
    """Rejects a search that cannot succeed.

    Raises:
      UserError: For a granularity that the recipe does not allow, an unsupported importance metric,
        a budget below the smallest plan's cost or above the dense model's, or a budget in ms with a
        recipe that counts MACs.
    """
    options, patches = self.options, self.spec.num_patches
    largest = 1 if self.recipe.learns_shares else patches
    if options.granularity > largest:
      raise UserError(
        f"config.search.granularity: expected 1 to {largest} with recipe={options.recipe}, got "
        f"{options.granularity}; search.tile makes the counts of a plan multiples."
      )
    self.spec.importance(options.importance, "config.search.importance")  # raises
    if self.cost is not MACS and not self.recipe.relative_budget:
      raise UserError(
        f"config.search.recipe: expected ours for a budget in {self.cost.unit}, got "
        f"{options.recipe}."
      )
    self._check_widths()
    smallest, dense = self._smallest(), self._dense_cost
    if not smallest <= self.target <= dense * (1 + 1e-9):
      raise UserError(
        f"config.budget: expected {smallest:.4g} to {dense:.4g} {self.cost.unit} (fraction "
        f"{smallest / dense:.3g} to 1), from the smallest plan to the dense model, got "
        f"{self.target:.4g} (fraction {self.target / dense:.3g})."
      )

  def _check_widths(self) -> None:
    """Rejects a search of widths that the recipe, cost, layers or model do not allow."""
    what, got = self.options.what, ""
    if what == "tokens":
      return
    if not self.recipe.learns_shares:
      got = f"recipe={self.options.recipe}, which searches tokens only"
    elif self.cost is not MACS:
      got = f"a budget in {self.cost.unit}"
    elif self.base is not None and self.base != self.spec.dense_layers:
      got = "layers that are slimmed already"
    if got:
      raise UserError(f"config.search.what: expected tokens, got {what} with {got}.")
    if not sorted_lists(self.spec):
      raise UserError(
        f"config.search.what: expected tokens for {self.spec.name}, whose norms read all widths "
        f"together, got {what}."
      )

  def _smallest(self) -> float:
    """Returns the cost of the cheapest plan, which keeps one element of every learnt list."""
    least = self.rates.shifted(self.rates.table(jax.device_get(self.rates.init())), -1.0)
    return self._cost(least)

  def layers(self, logits_only: bool = False) -> Layers:
    """Returns layers that learn their token counts, each with its own reducer.

    Args:
      logits_only: Whether the last layer computes only the tokens that the head reads. Logits,
        counts and their gradients are the same.
    """
    spec, eps = self.spec, self.recipe.mask_eps
    reads_prefix = logits_only and not spec.pools_patches
    layers = list(self.dense)
    if self.options.what != "widths":
      importance = spec.importance(self.options.importance)
      for i, layer in enumerate(layers):
        reduce = MaskedPruneMerge(self.rates.counts(i), importance, self.recipe)
        layers[i] = dataclasses.replace(layer, reduce=reduce, mask_eps=eps)
      if reads_prefix:
        reduce = HeadOnlyPruneMerge(self.rates.counts(spec.depth - 1))
        layers[-1] = dataclasses.replace(layers[-1], reduce=reduce)
    if reads_prefix:
      layers[-1] = dataclasses.replace(layers[-1], queries=spec.num_prefix)
    return tuple(layers)

  def masked(
    self, params: Params, arch: Mapping[str, Any], factors: Sequence[LayerFactors] | None
  ) -> Params:
    """Returns the weights with which `layers()` compute the same as layers of the learnt widths.

    Args:
      params: Weights of the dense model.
      arch: Rates.
      factors: Sorted lists of the model's units, see `methods.widths.factors.factorise`; None:
        widths are not searched.
    """
    if factors is None:
      return params
    assert isinstance(self.rates, ShareRates), "only shares have widths"
    return masked_params(params, factors, self.rates.masks(arch)[0])

  def replayed_layers(self, limits: Sequence[int | None] | None = None) -> Layers:
    """Returns layers that run any plan by masking, with its token counts as variables.

    Plans can thus be compared without compiling each of them.

    Args:
      limits: Number of tokens that each layer passes on, at least the kept ones; None: all.
    """
    importance = self.spec.importance(self.options.importance)
    layers = []
    for i, layer in enumerate(self.dense):
      limit = limits[i] if limits else None
      reduce = MaskedPruneMerge(GivenCounts(), importance, self.recipe, limit)
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
      arch: Rates.
      out: Output of the model with `layers()`.
      step: Step, from 0; the warm-up has no budget term.

    Returns:
      The term, and metrics: the cost, the tokens left by each layer, and its widths.
    """
    metrics: Metrics = {}
    if self.options.what == "tokens":
      widths = None
    else:
      assert isinstance(self.rates, ShareRates), "only shares have widths"
      widths = self.rates.masks(arch)[1]
      metrics["widths"] = jnp.stack([jnp.stack(list(each)) for each in widths])
    counts = search_counts(self.spec, out)
    spent = {c.key: c.count(self.spec, self.dense, counts, widths) for c in (MACS, self.cost)}
    distance = (spent[self.cost.key] - self.target * self.cost.scale) / self.budget_unit
    weight = jnp.where(step < self.options.warmup_steps, 0.0, self.options.budget_weight)
    metrics |= {c.key: spent[c.key] / c.scale for c in (MACS, self.cost)}
    metrics |= {"tokens": jnp.stack([after for _, after in counts]), "budget_loss": distance**2}
    return weight * distance**2, metrics

  def init(self, learnt: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the initial rates: the collection `arch`.

    They are those of the first of `starts`, which meet the budget. With the authors' recipe, all
    logits are zero as in their code, which keeps half of the tokens in every layer, whatever the
    budget.

    Args:
      learnt: Rates of a search at another budget to continue from, which are moved together to this
        budget; None: start afresh.
    """
    if learnt is not None:
      return self.rates.moved(learnt, self._is_above)
    if isinstance(self.rates, LogitRates):
      return self.rates.init()
    return self.rates.arch(next(iter(self.starts().values())))

  def starts(self) -> dict[str, np.ndarray]:
    """Returns schedules to start from, by name, as tables of counts that meet the budget."""
    assert isinstance(self.rates, ShareRates), "the authors start from zeros"
    found, strongest = {}, STRONGEST * self.spec.depth
    for name, at in starts(self.rates).items():
      below, _ = bracket(functools.partial(self._is_strength_above, at), strongest, 0.0)
      table = at(below)
      if not self._is_above(table):
        found[name] = table
    return found

  def _is_strength_above(self, at: Callable[[float], np.ndarray], strength: float) -> bool:
    return self._is_above(at(strength))

  def _is_above(self, table: np.ndarray) -> bool:
    return self._cost(table) > self.target

  def _cost(self, table: np.ndarray) -> float:
    return self.cost.static(self.spec, self.static_layers(table))

  def expected_counts(self, arch: Mapping[str, Any]) -> np.ndarray:
    """Computes the expected counts under learnt rates (Eq. 4), on the host.

    Args:
      arch: Learnt rates.

    Returns:
      float64[layers lists]: patch tokens after pruning and after merging, unless only widths are
      searched; then the searched ones among hidden units and the dimensions of each head's queries
      and values.
    """
    return self.rates.table(arch)

  def deploy(self, arch: Mapping[str, Any]) -> Layers:
    """Returns static layers with the learnt counts, adjusted to the budget."""
    return self.static_layers(self.adjusted(self.expected_counts(arch))[0])

  def adjusted(self, expected: np.ndarray) -> tuple[np.ndarray, float]:
    """Adjusts expected counts to the budget, by one offset to all that are learnt.

    Args:
      expected: Result of `expected_counts`.

    Returns:
      The counts whose plan is nearest to the budget, and the offset as a share of each list.
    """
    # Equal counts would all step at once and miss the budget; tiny differences separate them.
    hair = np.linspace(0, 1e-3, expected.size).reshape(expected.shape)

    def shifted(offset: float) -> np.ndarray:
      return self.rates.shifted(expected + hair, offset)

    found = bracket(lambda offset: self._is_above(shifted(offset)), -1.0, 1.0)
    offset = min(found, key=lambda offset: abs(self._cost(shifted(offset)) - self.target))
    return shifted(offset), offset

  def static_layers(self, expected: np.ndarray) -> Layers:
    """Returns static layers that keep the expected counts, rounded up to multiples of the tile."""
    return self.deployment.layers(expected)


def search_counts(spec: ViTSpec, out: Output) -> list[tuple[Array, Array]]:
  """Returns the traced tokens at attention and at the MLP of each layer.

  Each layer's count gets the gradient of its own MLP and of the next layer's attention.
  """
  counts: list[tuple[Array, Array]] = []
  for i, tokens in enumerate(out.layers):
    before = jnp.asarray(float(spec.starts[i])) if i in spec.starts else counts[-1][1]
    counts.append((before, before if tokens.num_kept is None else tokens.num_kept))
  return counts
