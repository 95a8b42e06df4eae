"""Rates that a search learns, in the collection `arch`, and the counts that they represent.

A table of counts, float64[layers lists], has a row for each layer and a column for each list that
is searched: patch tokens after pruning and after merging (`prune`, `merge`), and units of the
widths (`methods.widths.lists.sorted_lists`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vitcomp_jax.config import DiffRateOptions
from vitcomp_jax.methods.bisection import bracket
from vitcomp_jax.methods.diffrate.counts import (
  GivenCounts,
  LearntCounts,
  LogitCounts,
  candidates,
)
from vitcomp_jax.methods.handmade import compressed_layers
from vitcomp_jax.methods.proxy import learnt_count
from vitcomp_jax.methods.widths.lists import SortedList, sorted_lists
from vitcomp_jax.models.layer_spec import Widths
from vitcomp_jax.models.layer_trees import of_layer, to_tree
from vitcomp_jax.models.spec import ViTSpec

Arch = dict[str, Any]
ACTIONS = ("prune", "merge")
# Largest slope of logits that is tried; nearly all of the weight is then on the largest count.
_STEEP = 300.0


@dataclasses.dataclass(frozen=True)
class LogitRates:
  """The authors' rates: one logit for each candidate count.

  Attributes:
    spec: The model.
    options: Options of the search.
  """

  spec: ViTSpec
  options: DiffRateOptions
  tokens: ClassVar[tuple[str, ...]] = ACTIONS

  @property
  def widths(self) -> dict[str, SortedList]:
    """Returns the lists of widths that are searched, by name: none."""
    return {}  # the authors search tokens only

  def counts(self, layer: int) -> LogitCounts:
    """Returns the module that computes a layer's token counts."""
    prune, merge = (self._granularity(layer, action) for action in ACTIONS)
    return LogitCounts(self.spec.patches_at(layer), self.spec.num_prefix, (prune, merge))

  def _granularity(self, layer: int, action: str) -> int:
    """Returns the granularity; layers that keep all tokens have a single candidate."""
    learns = _compressed(self.spec, self.options)[layer]
    learns &= self.options.actions in ("both", action)
    return self.options.granularity if learns else self.spec.patches_at(layer) + 1

  @functools.cached_property
  def _candidates(self) -> list[dict[str, np.ndarray]]:
    """Returns the candidates of each layer, by the name of their logits."""
    found = []
    for i in range(self.spec.depth):
      patches = self.spec.patches_at(i)
      found.append({f"{a}_logits": candidates(patches, self._granularity(i, a)) for a in ACTIONS})
    return found

  def init(self) -> Arch:
    """Returns the initial rates."""
    return self._sloped(0.0)

  def _sloped(self, slope: float) -> Arch:
    """Returns logits that rise linearly with the share of tokens kept."""
    arch = []
    for i, layer in enumerate(self._candidates):
      logits = {name: slope * c / self.spec.patches_at(i) for name, c in layer.items()}
      arch.append({"reduce": {k: jnp.asarray(v, jnp.float32) for k, v in logits.items()}})
    return to_tree(self.spec, arch)

  def moved(self, arch: Mapping[str, Any], is_above: Callable[[np.ndarray], bool]) -> Arch:
    """Adds one slope to all logits, so that the cost of their table meets a budget."""

    def at(slope: float) -> Arch:
      return jax.tree.map(jnp.add, dict(arch), self._sloped(slope))

    found = bracket(lambda slope: is_above(self.table(jax.device_get(at(slope)))), -_STEEP, _STEEP)
    return at(found[0])

  def table(self, arch: Mapping[str, Any]) -> np.ndarray:
    """Computes the expected counts."""
    rows = []
    for i, layer in enumerate(self._candidates):
      logits = of_layer(self.spec, arch, i)["reduce"]
      rows.append([_expectation(logits[k], options) for k, options in layer.items()])
    return np.array(rows)

  def shifted(self, table: np.ndarray, offset: float) -> np.ndarray:
    """Adds an offset, as a share of each list, to all counts that are learnt."""
    learnt = [[options.size > 1 for options in layer.values()] for layer in self._candidates]
    patches = np.array([[self.spec.patches_at(i)] for i in range(self.spec.depth)])
    return np.where(learnt, table + offset * patches, table)


def _expectation(logits: Array | np.ndarray, options: np.ndarray) -> float:
  values = np.asarray(logits, np.float64)
  weights = np.exp(values - values.max())
  return float(options @ weights / weights.sum())


def _compressed(spec: ViTSpec, options: DiffRateOptions) -> tuple[bool, ...]:
  return compressed_layers(spec, options.compress_first, options.compress_last)


@dataclasses.dataclass(frozen=True)
class ShareRates:
  """Rates that are shares of sorted lists: one number for each layer and list.

  Attributes:
    spec: The model.
    options: Options of the search.
  """

  spec: ViTSpec
  options: DiffRateOptions

  @functools.cached_property
  def tokens(self) -> tuple[str, ...]:
    """Returns the lists of tokens that are searched."""
    return () if self.options.what == "widths" else ACTIONS

  @functools.cached_property
  def widths(self) -> dict[str, SortedList]:
    """Returns the lists of widths that are searched, by name."""
    return {} if self.options.what == "tokens" else sorted_lists(self.spec)

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """Returns the length of each list, i[layers lists]."""
    widths = [units.length for units in self.widths.values()]
    patches = [self.spec.patches_at(i) for i in range(self.spec.depth)]
    return np.array([[*[n] * len(self.tokens), *widths] for n in patches])

  @functools.cached_property
  def learns(self) -> np.ndarray:
    """Returns which counts are learnt, bool[layers lists].

    If the head reads only CLS, nothing reads the patches that the last layer passes on, so it
    keeps one of them.
    """
    learns = np.ones(self.lengths.shape, bool)
    count = len(self.tokens)
    learns[:, :count] = np.array(_compressed(self.spec, self.options))[:, None]
    if not self.spec.pools_patches:
      learns[-1, :count] = False
    return learns

  def counts(self, layer: int) -> LearntCounts | GivenCounts:
    """Returns the module that computes a layer's token counts."""
    spec = self.spec
    if self.learns[layer, 0]:
      return LearntCounts(spec.patches_at(layer), spec.num_prefix, self.options.actions)
    kept = spec.num_prefix + int(self._unlearnt[layer])
    return GivenCounts(fixed=(kept, kept))

  @functools.cached_property
  def _unlearnt(self) -> list[int]:
    """Returns the number of patch tokens of each layer that does not learn it."""
    return [
      1 if yes else self.spec.patches_at(i)
      for i, yes in enumerate(_compressed(self.spec, self.options))
    ]

  def masks(self, arch: Mapping[str, Any]) -> tuple[list[dict[str, Array]], list[Widths]]:
    """Returns the masks of each layer's lists of widths, and its traced widths."""
    masks: list[dict[str, Array]] = []
    widths: list[Widths] = []
    for i, layer in enumerate(self.spec.dense_layers):
      rates = of_layer(self.spec, arch, i)["widths"]
      masks.append({})
      total = layer.widths._asdict()  # by the names of the lists
      for name, units in self.widths.items():
        count = units.length // units.step
        one, all_of_them = jnp.asarray(1.0), jnp.asarray(float(count))
        mask, kept = learnt_count(rates[name], count, one, all_of_them)
        masks[i][name] = jnp.repeat(mask, units.step)
        total[name] = kept * (total[name] / count)
      widths.append(Widths(**{name: jnp.asarray(n, jnp.float32) for name, n in total.items()}))
    return masks, widths

  def init(self) -> Arch:
    """Returns rates that keep everything."""
    return self.arch(self.lengths.astype(np.float64))

  def arch(self, table: np.ndarray) -> Arch:
    """Returns the rates of a table."""
    layers = []
    # Round down to the next float, so that no rounding error raises a count past an integer.
    rounded = np.nextafter((table / self.lengths).astype(np.float32), np.float32(0))
    for learns, shares in zip(self.learns, rounded, strict=True):
      values = dict(zip((*self.tokens, *self.widths), shares.tolist(), strict=True))
      tokens = {name: values[name] for name in self.tokens if learns[0] and self._learns(name)}
      branches = {"reduce": tokens, "widths": {name: values[name] for name in self.widths}}
      layers.append(jax.tree.map(jnp.float32, {k: v for k, v in branches.items() if v}))
    return to_tree(self.spec, layers)

  def _learns(self, action: str) -> bool:
    """Returns whether an action has a rate; with a single action, only `merge` has one."""
    return action == "merge" or self.options.actions == "both"

  def table(self, arch: Mapping[str, Any]) -> np.ndarray:
    """Computes the expected counts."""
    rows = []
    for i, lengths in enumerate(self.lengths):
      branches = of_layer(self.spec, arch, i)
      rates = {**branches.get("reduce", {}), **branches.get("widths", {})}
      shares = [float(rates.get(name, 1.0)) for name in (*self.tokens, *self.widths)]
      rows.append(np.array(shares) * lengths)
    return self.clipped(np.array(rows))

  def clipped(self, table: np.ndarray) -> np.ndarray:
    """Clips counts to those that layers can keep: at least 1, at most those that enter or exist."""
    table = np.clip(np.asarray(table, np.float64), 1, self.lengths)
    if not self.tokens:
      return table
    before = float(self.spec.num_patches)
    for i, row in enumerate(table):
      before = float(self.spec.patches_at(i)) if i in self.spec.starts else before
      if not self.learns[i, 0]:
        row[:2] = self._unlearnt[i]
      row[1] = min(row[1], before)
      if self.options.actions == "prune":
        row[0] = row[1]
      elif self.options.actions == "merge":
        row[0] = before
      else:
        row[0] = np.clip(row[0], row[1], before)
      before = row[1]
    return table

  def moved(self, arch: Mapping[str, Any], is_above: Callable[[np.ndarray], bool]) -> Arch:
    """Adds one offset to all shares, so that the cost of their table meets a budget."""
    table = self.table(jax.device_get(arch))
    found = bracket(lambda offset: is_above(self.shifted(table, offset)), -1.0, 1.0)
    return self.arch(self.shifted(table, found[0]))

  def shifted(self, table: np.ndarray, offset: float) -> np.ndarray:
    """Adds an offset, as a share of each list, to all counts that are learnt."""
    return self.clipped(np.where(self.learns, table + offset * self.lengths, table))


Rates = LogitRates | ShareRates
