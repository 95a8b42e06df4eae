"""Searches for a plan by gradient: trains rates, and chooses among the plans passed through."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax.config import Importance, SearchConfig
from vitcomp_jax.cost.cost_models import MACS
from vitcomp_jax.data.transforms import Preprocess, normalize
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.base import Layers
from vitcomp_jax.methods.diffrate.rates import ShareRates
from vitcomp_jax.methods.diffrate.search import DiffRate
from vitcomp_jax.methods.widths.calibration import calibrate
from vitcomp_jax.methods.widths.factors import LayerFactors, factorise
from vitcomp_jax.models.build import build
from vitcomp_jax.models.spec import with_drop_path
from vitcomp_jax.parallel import Layout
from vitcomp_jax.training import loop, optimizer
from vitcomp_jax.training.search_loss import TaskLoss
from vitcomp_jax.training.step import (
  LossFn,
  TrainState,
  init_state,
  make_step,
  random_streams,
  top1,
  with_rows,
)

_KEPT = 3  # plans to try at the end, besides the last one
# Mean attention replaces the first importance that a model supports only if its loss is below this
# share of the other's: it needs the full attention map, which fused attention does not provide.
_CLEARLY = 0.9

Batches = Iterable[Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Passed:
  """A plan that a search started from, or passed through.

  Attributes:
    step: Number of steps done.
    loss: Task loss of the deployed plan, on held-out images.
    layers: Layers of the plan, adjusted to the budget.
  """

  step: int
  loss: float
  layers: Layers


@dataclasses.dataclass(frozen=True)
class Found:
  """The outcome of a search.

  Attributes:
    step: Step of the chosen rates.
    raw: Layers with the learnt counts.
    layers: Layers adjusted to the budget.
    offset: Offset that the adjustment adds to every expected count, as a share of its list.
    params: Weights of the slimmed network; None if no widths were searched.
    passed: Plans that were tried and have a finite loss.
  """

  step: int
  raw: Layers
  layers: Layers
  offset: float
  params: Any = None
  passed: tuple[Passed, ...] = ()


@dataclasses.dataclass(frozen=True)
class SearchTrainer:
  """Searches with one method on one model.

  Attributes:
    method: Method, which holds the model and the budget.
    config: Options of the optimizer and the loss.
    preprocess: Preprocessing of uint8 images.
    layout: Layout on the devices.
    seed: Random seed.
  """

  method: DiffRate
  config: SearchConfig
  preprocess: Preprocess
  layout: Layout
  seed: int = 0

  def factors(self, params: Any, batches: Batches) -> Sequence[LayerFactors] | None:
    """Returns the sorted lists of the model's widths; None if only tokens are searched.

    Args:
      params: Weights of the model.
      batches: Images to calibrate on.
    """
    if self.config.what == "tokens":
      return None
    spec = self.method.spec
    images = (normalize(jnp.asarray(batch["image"]), self.preprocess) for batch in batches)
    return factorise(spec, params, calibrate(spec, params, images))

  def start(
    self, params: Any, factors: Any, batches: Batches
  ) -> tuple["SearchTrainer", Mapping[str, Any]]:
    """Returns this search with its importance metric chosen, and the rates to start from.

    The best start for one model is the worst for another. The schedules of `DiffRate.starts` are
    therefore tried on images, and the one with the least task loss is used. With `importance=auto`,
    all are also tried with mean attention: the best by one metric may be the worst by another.

    Args:
      params: Weights of the model.
      factors: Result of `factors`.
      batches: This process's rows of those images; without any, the first start is used.
    """
    batches = list(batches)
    if not self.chooses or not batches:
      return self, self.method.init()
    # Starts differ more than the plans that a search passes through, so half of the images suffice.
    batches = batches[: -(-len(batches) // 2)]
    least, table = self._best_start(params, factors, batches)
    chosen = self
    if self._tries_importance:
      other = self.with_importance("mean_attention")
      loss, other_table = other._best_start(params, factors, batches)
      if loss < _CLEARLY * least:
        logging.info("search: tokens are sorted by mean_attention, which loses clearly less")
        chosen, table = other, other_table
    rates = chosen.method.rates
    assert isinstance(rates, ShareRates)
    return chosen, rates.arch(table)

  def _best_start(
    self, params: Any, factors: Any, batches: Sequence[Mapping[str, np.ndarray]]
  ) -> tuple[float, np.ndarray]:
    """Returns the least task loss of the starts (infinite if none is finite) and its table."""
    starts = self.method.starts()
    losses = self._losses(list(starts.values()), params, factors, batches)
    for name, loss in zip(starts, losses, strict=True):
      logging.info("search: the start %s by %s has a loss of %.4f", name, self.importance, loss)
    pairs = zip(map(_finite, losses), starts.values(), strict=True)
    return min(pairs, key=lambda pair: pair[0])

  @property
  def _tries_importance(self) -> bool:
    config, method = self.config, self.method
    is_free = config.importance == "auto" and config.what != "widths"
    # A latency table is valid only for the importance that it was measured with.
    return is_free and method.cost is MACS and method.spec.importance() != "mean_attention"

  def with_importance(self, name: Importance) -> "SearchTrainer":
    """Returns the same search with tokens sorted by another importance metric."""
    config = dataclasses.replace(self.config, importance=name)
    return dataclasses.replace(
      self, config=config, method=dataclasses.replace(self.method, options=config)
    )

  @property
  def importance(self) -> str:
    """Returns the importance metric that tokens are sorted by."""
    return self.method.spec.importance(self.method.options.importance)

  @property
  def chooses(self) -> bool:
    """Returns whether plans are compared; the authors start from zeros and use the last rates."""
    return self.method.recipe.learns_shares and self.config.choose_images > 0

  def task(
    self,
    name: str,
    params: Any,
    batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
    epoch_steps: int,
    arch: Mapping[str, Any],
    factors: Any = None,
  ) -> loop.Task:
    """Returns the training task, which trains only the rates.

    Args:
      name: Name of the stage in logs and checkpoints.
      params: Weights of the model.
      batches: Returns this process's rows of the batches from a step on.
      epoch_steps: Steps per epoch, for the authors' schedule.
      arch: Initial rates.
      factors: Result of `factors`.
    """
    config, layout = self.config, self.layout
    tx = optimizer.search_optimizer(config, epoch_steps)
    keeps = self._kept_steps()
    step_fn = make_step(self.loss(), tx, ("arch",), layout, parts=config.parts, keeps=keeps)
    return loop.Task(
      stage=name,
      state=init_state(params, arch, tx, ("arch",), self.seed, keeps=len(keeps)),
      step_at=lambda _: step_fn,
      batches=batches,
      steps=config.steps,
      log_every=config.log_every,
      checkpoint_every=config.checkpoint_every,
      schedule=optimizer.search_schedule(config, epoch_steps),
      fixed=factors,
    )

  def _kept_steps(self) -> list[int]:
    """Returns the evenly spaced steps whose rates are kept, including the first."""
    if not self.chooses:
      return []
    return sorted({self.config.steps * i // _KEPT for i in range(_KEPT)})

  @property
  def _task_loss(self) -> TaskLoss:
    return TaskLoss(self.method.spec, self.method.dense, self.config, self.preprocess)

  def loss(self) -> LossFn:
    """Returns the task loss of the masked model plus the method's penalty."""
    layers = with_drop_path(self.method.layers(logits_only=True), self.config.drop_path)
    model = build(self.method.spec, layers, self.config.remat)
    task_loss = self._task_loss

    def loss_fn(params, arch, fixed, batch, key, step):
      images, labels = task_loss.inputs(batch, key)
      aim = task_loss.aim(params, images)
      variables = {"params": self.method.masked(params, arch, fixed), "arch": arch}
      rngs = random_streams(key, batch, ("drop_path",))
      out = model.apply(variables, images, method="forward", rngs=rngs)
      task = task_loss(out, labels, aim)
      penalty, of_method = self.method.penalty(arch, out, step)
      metrics = {"task_loss": task, **of_method}
      if aim is None:
        metrics["top1"] = top1(out.logits, labels)
      return task + penalty, metrics

    return loss_fn

  def choose(self, state: TrainState, params: Any, factors: Any, batches: Batches) -> Found:
    """Returns the plan with the least task loss among those that the search passed through.

    A gradient measures the effect of one token in a layer, not of many in several layers, so a
    search may pass through a better plan than its last. A few plans, including the first and the
    last, are therefore tried on held-out images.

    Args:
      state: State after the last step.
      params: Weights of the model.
      factors: Result of `factors`.
      batches: This process's rows of those images; unused if `choose_images` is 0.

    Raises:
      UserError: If no plan has a finite loss.
    """
    tables = self._tables(state)
    adjusted = {step: self.method.adjusted(table) for step, table in tables.items()}
    chosen: int = self.config.steps
    passed: tuple[Passed, ...] = ()
    if self.chooses:
      found = self._losses([table for table, _ in adjusted.values()], params, factors, batches)
      for step, loss in zip(tables, found, strict=True):
        logging.info("search: the plan of step %d has a loss of %.4f", step, loss)
      passed = tuple(
        Passed(step, loss, self.method.static_layers(adjusted[step][0]))
        for step, loss in zip(tables, found, strict=True)
        if math.isfinite(loss)
      )
      if not passed:
        raise UserError(
          f"stage search: expected plans with a finite loss, got {len(found)} of {len(found)} "
          "that have none; start from other weights, or set config.model.dtype=float32."
        )
      chosen = min(passed, key=lambda each: each.loss).step
    table, offset = adjusted[chosen]
    layers, small = self.method.deployment.slimmed(jax.device_get(params), table, factors)
    raw = self.method.static_layers(tables[chosen])
    return Found(chosen, raw, layers, offset, small, passed)

  def _tables(self, state: TrainState) -> dict[int, np.ndarray]:
    """Returns the expected counts of the steps whose rates were kept, and of the last one."""
    kept, found = self.layout.get(state.passed), {}
    for i, step in enumerate(self._kept_steps()):
      found[step] = self.method.expected_counts(jax.tree.map(lambda x, i=i: x[i], kept))
    found[self.config.steps] = self.method.expected_counts(self.layout.get(state.arch))
    return found

  @functools.partial(jax.jit, static_argnums=0)
  def _aim(self, params: Any, batch: Mapping[str, Any]) -> jax.Array | None:
    """Computes the aim of the task loss for a batch, once for all plans that are tried on it."""
    images, _ = self._task_loss.inputs(with_rows(batch), jax.random.key(0))
    return self._task_loss.aim(params, images)

  @functools.partial(jax.jit, static_argnums=0)
  def _score(
    self, params: Any, arch: Any, factors: Any, batch: Mapping[str, Any], aim: jax.Array | None
  ) -> jax.Array:
    """Computes the task loss of a batch; compiled once for starts and for passed plans."""
    images, labels = self._task_loss.inputs(with_rows(batch), jax.random.key(0))
    model = build(self.method.spec, self.method.layers(logits_only=True))
    variables = {"params": self.method.masked(params, arch, factors), "arch": arch}
    return self._task_loss(model.apply(variables, images, method="forward"), labels, aim)

  def _losses(
    self, tables: Sequence[np.ndarray], params: Any, factors: Any, batches: Batches
  ) -> list[float]:
    """Measures the task loss of tables of counts, with one compiled program."""
    params, factors = self.layout.put(params), self.layout.put(factors)
    placed = []
    for batch in batches:
      inputs = self.layout.put_batch(batch)
      placed.append((inputs, jax.block_until_ready(self._aim(params, inputs))))
    rates = self.method.rates
    assert isinstance(rates, ShareRates)
    found = []
    for table in tables:
      arch = self.layout.put(rates.arch(rates.clipped(self.method.deployment.whole(table))))
      # One at a time, as too many concurrent programs may deadlock XLA's CPU devices.
      parts = [self.layout.get(self._score(params, arch, factors, *each)) for each in placed]
      found.append(float(np.mean(parts)))
    return found


def _finite(loss: float) -> float:
  return loss if math.isfinite(loss) else math.inf
