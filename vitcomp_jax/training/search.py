"""Searches a plan by gradient: trains rates, and chooses among the plans passed through."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax.config import Loss, SearchConfig
from vitcomp_jax.data.mixing import training_inputs
from vitcomp_jax.data.transforms import Preprocess, normalize
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.base import Layers
from vitcomp_jax.methods.diffrate.rates import ShareRates
from vitcomp_jax.methods.diffrate.search import DiffRate
from vitcomp_jax.methods.widths.calibration import calibrate
from vitcomp_jax.methods.widths.factors import LayerFactors, factorise
from vitcomp_jax.models.build import build
from vitcomp_jax.models.spec import ViTSpec, with_drop_path
from vitcomp_jax.models.tokens import Output
from vitcomp_jax.ops import losses
from vitcomp_jax.parallel import Layout
from vitcomp_jax.training import loop, optimizer
from vitcomp_jax.training.step import (
  LossFn,
  TrainState,
  init_state,
  make_step,
  random_streams,
  top1,
  with_rows,
)

_KEPT = 3  # plans passed through, besides the last, to try at the end

Batches = Iterable[Mapping[str, np.ndarray]]


def best_loss(config: SearchConfig, spec: ViTSpec) -> Loss:
  """Returns the loss of a search, with `auto` resolved.

  A plan that follows the dense model's outputs on a thousand images does as well on others as one
  that follows their labels, and fits these images less; see docs/results.md. The authors' recipe
  follows labels.
  """
  if config.loss != "auto":
    return config.loss
  if config.recipe == "paper":
    return "labels"
  return "logits" if spec.num_classes else "features"


def check_loss(loss: str, spec: ViTSpec, has_labels: bool, where: str) -> None:
  """Refuses a loss that a model or its data do not allow.

  Args:
    loss: The loss, not `auto`.
    spec: The model.
    has_labels: Whether the data have labels.
    where: Name of the option, for the error.
  """
  if loss != "features" and not spec.num_classes:
    raise UserError(
      f"{where}: expected features for {spec.name}, which has no classifier, got {loss}."
    )
  if loss == "labels" and not has_labels:
    raise UserError(
      f"{where}: expected logits or features for data that have no labels, got labels."
    )


@dataclasses.dataclass(frozen=True)
class Passed:
  """A plan that a search started from, or passed through.

  Attributes:
    step: Number of steps done.
    loss: Task loss of the deployed plan, on images that come after those of the steps.
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
    offset: What the adjustment adds to every expected count, as a share of its list.
    params: Weights of the slimmed network; None if no widths were searched.
    passed: Tried plans with a finite loss.
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

  def start(self, params: Any, factors: Any, batches: Batches) -> Mapping[str, Any]:
    """Returns the rates of the schedule with the least task loss, out of `DiffRate.starts`.

    What suits one model is the worst for another, so a few are tried on images.

    Args:
      params: Weights of the model.
      factors: Result of `factors`.
      batches: This process's rows of those images; the first start is taken if there are none.
    """
    batches = list(batches)
    if not self._chooses or not batches:
      return self.method.init()
    rates = self.method.rates
    assert isinstance(rates, ShareRates)
    starts = self.method.starts()
    # They differ more than the plans that a search passes through: half of the images tell.
    batches = batches[: -(-len(batches) // 2)]
    losses = self._losses(list(starts.values()), params, factors, batches)
    for name, loss in zip(starts, losses, strict=True):
      logging.info("search: the start %s has a loss of %.4f", name, loss)
    best = min(zip(losses, starts.values(), strict=True), key=lambda pair: _finite(pair[0]))
    return rates.arch(best[1])

  @property
  def _chooses(self) -> bool:
    """Returns whether plans are compared; the authors take zeros first and the last rates."""
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
    if not self._chooses:
      return []
    return sorted({self.config.steps * i // _KEPT for i in range(_KEPT)})

  def loss(self) -> LossFn:
    """Returns the task loss of the masked model plus the method's penalty."""
    layers = with_drop_path(self.method.layers(logits_only=True), self.config.drop_path)
    model = build(self.method.spec, layers, self.config.remat)

    def loss_fn(params, arch, fixed, batch, key, step):
      images, labels = self._inputs(batch, key)
      aim = self._dense_output(params, images)
      variables = {"params": self.method.masked(params, arch, fixed), "arch": arch}
      rngs = random_streams(key, batch, ("drop_path",))
      out = model.apply(variables, images, method="forward", rngs=rngs)
      task = self._distance(out, labels, aim)
      penalty, of_method = self.method.penalty(arch, out, step)
      metrics = {"task_loss": task, **of_method}
      if aim is None:
        metrics["top1"] = top1(out.logits, labels)
      return task + penalty, metrics

    return loss_fn

  @property
  def _kind(self) -> Loss:
    return best_loss(self.config, self.method.spec)

  def _inputs(self, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a batch's images and the probabilities of its labels."""
    classes, smoothing = self.method.spec.num_classes, self.config.label_smoothing
    return training_inputs(batch, self.preprocess, classes, smoothing, key)

  def _dense_output(self, params: Any, images: jax.Array) -> jax.Array | None:
    """Returns what the loss compares with of the model that keeps all; None: it needs labels."""
    if self._kind == "labels":
      return None
    whole = build(self.method.spec, self.method.dense)
    out = whole.apply({"params": params}, images, method="forward")
    return out.logits if self._kind == "logits" else out.features

  def _distance(self, out: Output, labels: jax.Array, aim: jax.Array | None) -> jax.Array:
    """Computes the cross-entropy, or the divergence from the model that keeps all."""
    if aim is None:
      return losses.soft_cross_entropy(out.logits, labels)
    if self._kind == "logits":
      return losses.logit_divergence(out.logits, aim)
    return losses.feature_divergence(out.features, aim)

  def choose(self, state: TrainState, params: Any, factors: Any, batches: Batches) -> Found:
    """Returns the plan with the least task loss among those that the search passed through.

    A gradient measures the effect of one token in a layer, not of many in several layers: a search
    may pass through a better plan. So a few plans, including the first and the last, are tried on
    images that were not trained on.

    Args:
      state: State after the last step.
      params: Weights of the model.
      factors: Result of `factors`.
      batches: This process's rows of those images; unused if `choose_images` is 0.

    Raises:
      UserError: If no plan has a finite loss.
    """
    tables = self._tables(state)
    step: int = self.config.steps
    passed: tuple[Passed, ...] = ()
    if self._chooses:
      adjusted = [self.method.adjusted(table)[0] for table in tables.values()]
      found = self._losses(adjusted, params, factors, batches)
      passed = tuple(
        Passed(step, loss, self.method.static_layers(table))
        for step, loss, table in zip(tables, found, adjusted, strict=True)
        if math.isfinite(loss)
      )
      if not passed:
        raise UserError(
          f"stage search: expected plans with a finite loss, got {len(found)} of {len(found)} "
          "that have none; start from other weights, or set config.model.dtype=float32."
        )
      step = min(passed, key=lambda each: each.loss).step
    table, offset = self.method.adjusted(tables[step])
    layers, small = self.method.deployment.slimmed(jax.device_get(params), table, factors)
    return Found(step, self.method.static_layers(tables[step]), layers, offset, small, passed)

  def _tables(self, state: TrainState) -> dict[int, np.ndarray]:
    """Returns the expected counts of the steps whose rates were kept, and of the last one."""
    kept, found = self.layout.get(state.passed), {}
    for i, step in enumerate(self._kept_steps()):
      found[step] = self.method.expected_counts(jax.tree.map(lambda x, i=i: x[i], kept))
    found[self.config.steps] = self.method.expected_counts(self.layout.get(state.arch))
    return found

  @functools.partial(jax.jit, static_argnums=0)
  def _aim(self, params: Any, batch: Mapping[str, Any]) -> jax.Array | None:
    """Computes `_dense_output` of a batch, once for all plans that are tried on it."""
    return self._dense_output(params, self._inputs(with_rows(batch), jax.random.key(0))[0])

  @functools.partial(jax.jit, static_argnums=0)
  def _score(
    self, params: Any, arch: Any, factors: Any, batch: Mapping[str, Any], aim: jax.Array | None
  ) -> jax.Array:
    """Computes the task loss of a batch; compiled once for starts and for passed plans."""
    images, labels = self._inputs(with_rows(batch), jax.random.key(0))
    model = build(self.method.spec, self.method.layers(logits_only=True))
    variables = {"params": self.method.masked(params, arch, factors), "arch": arch}
    return self._distance(model.apply(variables, images, method="forward"), labels, aim)

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
      # One at a time, as many concurrent programs may deadlock XLA's CPU devices.
      parts = [self.layout.get(self._score(params, arch, factors, *each)) for each in placed]
      found.append(float(np.mean(parts)))
      logging.info("search: a plan has a loss of %.4f", found[-1])
    return found


def _finite(loss: float) -> float:
  return loss if math.isfinite(loss) else math.inf
