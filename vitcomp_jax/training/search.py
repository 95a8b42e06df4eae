"""Searches a plan by gradient: trains rates, and chooses among the plans passed through."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vitcomp_jax.config import Loss, SearchConfig
from vitcomp_jax.data.mixing import training_inputs
from vitcomp_jax.data.transforms import Preprocess
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.base import Layers, Metrics
from vitcomp_jax.methods.diffrate.search import DiffRate
from vitcomp_jax.models.backbone import Backbone
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

_KEPT = 7  # plans passed through, besides the last, to try at the end

Batches = Iterable[Mapping[str, np.ndarray]]


def best_loss(spec: ViTSpec, has_labels: bool) -> Loss:
  """Returns the first loss that a model and its data allow: labels, logits or features."""
  if has_labels and spec.num_classes:
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
  """A plan that a search passed through.

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
    offset: Tokens that the adjustment adds to every expected count.
    passed: Tried plans with a finite loss.
  """

  step: int
  raw: Layers
  layers: Layers
  offset: float
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

  def task(
    self,
    name: str,
    params: Any,
    batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
    epoch_steps: int,
    learnt: Mapping[str, Any] | None = None,
  ) -> loop.Task:
    """Returns the training task, which trains only the rates.

    Args:
      name: Name of the stage in logs and checkpoints.
      params: Weights of the model.
      batches: Returns this process's rows of the batches from a step on.
      epoch_steps: Steps per epoch, for the authors' schedule.
      learnt: Rates of a search at another budget to continue from; None: the initial ones.
    """
    config, layout = self.config, self.layout
    tx = optimizer.search_optimizer(config, epoch_steps)
    keeps = self._kept_steps()
    step_fn = make_step(self.loss(), tx, ("arch",), layout, parts=config.parts, keeps=keeps)
    arch = self.method.init(learnt)
    return loop.Task(
      stage=name,
      state=init_state(params, arch, tx, ("arch",), self.seed, keeps=len(keeps)),
      step_at=lambda _: step_fn,
      batches=batches,
      steps=config.steps,
      log_every=config.log_every,
      checkpoint_every=config.checkpoint_every,
      schedule=optimizer.search_schedule(config, epoch_steps),
    )

  def _kept_steps(self) -> list[int]:
    """Returns the evenly spaced steps whose rates are kept, including the first."""
    if not self.config.choose_images:
      return []
    return sorted({self.config.steps * i // _KEPT for i in range(_KEPT)})

  def loss(self) -> LossFn:
    """Returns the task loss of the masked model plus the method's penalty."""
    layers = with_drop_path(self.method.layers(logits_only=True), self.config.drop_path)
    model = build(self.method.spec, layers, self.config.remat)

    def loss_fn(params, arch, fixed, batch, key, step):
      del fixed
      task, out, metrics = self._task_loss(model, {"params": params, "arch": arch}, batch, key)
      penalty, of_method = self.method.penalty(arch, out, step)
      return task + penalty, {"task_loss": task, **metrics, **of_method}

    return loss_fn

  def _task_loss(
    self,
    model: Backbone,
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    key: jax.Array,
  ) -> tuple[jax.Array, Output, Metrics]:
    """Computes the cross-entropy, or the divergence from the model that keeps all tokens."""
    spec, config = model.spec, self.config
    images, targets = training_inputs(
      batch, self.preprocess, spec.num_classes, config.label_smoothing, key
    )
    rngs = random_streams(key, batch, ("drop_path",))
    out = model.apply(variables, images, method="forward", rngs=rngs)
    if config.loss == "labels":
      score = {"top1": top1(out.logits, targets)}
      return losses.soft_cross_entropy(out.logits, targets), out, score
    whole = build(spec, self.method.dense)
    teacher = whole.apply({"params": variables["params"]}, images, method="forward")
    if config.loss == "logits":
      return losses.logit_divergence(out.logits, teacher.logits), out, {}
    assert config.loss == "features", config.loss
    return losses.feature_divergence(out.features, teacher.features), out, {}

  def choose(self, state: TrainState, params: Any, batches: Batches) -> Found:
    """Returns the plan with the least task loss among those that the search passed through.

    A gradient measures the effect of one token in a layer, not of many in several layers: a search
    may pass through a better plan. So a few plans, including the first and the last, are tried on
    images that were not trained on.

    Args:
      state: State after the last step.
      params: Weights of the model.
      batches: This process's rows of those images; unused if `choose_images` is 0.

    Raises:
      UserError: If no plan has a finite loss.
    """
    rates = self._rates(state)
    if not self.config.choose_images:
      return self._found(*rates[-1])
    passed = self._tried(rates, params, batches)
    finite = [each for each in passed if math.isfinite(each.loss)]
    if not finite:
      raise UserError(
        f"stage search: expected plans with a finite loss, got {len(passed)} of {len(passed)} "
        "that have none; start from other weights, or set config.model.dtype=float32."
      )
    best = min(finite, key=lambda each: each.loss)
    found = self._found(best.step, dict(rates)[best.step])
    return dataclasses.replace(found, passed=tuple(finite))

  def _rates(self, state: TrainState) -> list[tuple[int, np.ndarray]]:
    """Returns the steps whose rates were kept and the last one, with their expected counts."""
    kept = self.layout.get(state.passed)
    found = []
    for i, step in enumerate(self._kept_steps()):
      arch = jax.tree.map(lambda x, i=i: x[i], kept)
      found.append((step, self.method.expected_counts(arch)))
    return [*found, (self.config.steps, self.method.expected_counts(self.layout.get(state.arch)))]

  def _found(self, step: int, expected: np.ndarray) -> Found:
    layers, offset = self.method.deploy_counts(expected)
    return Found(step, self.method.static_layers(expected), layers, offset)

  def _tried(
    self, rates: list[tuple[int, np.ndarray]], params: Any, batches: Batches
  ) -> list[Passed]:
    """Measures the task loss of the plans, with one compiled program."""
    model = build(self.method.spec, self.method.replayed_layers())

    @jax.jit
    def loss(variables: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
      return self._task_loss(model, variables, with_rows(batch), jax.random.key(0))[0]

    params = self.layout.put(params)
    placed = [self.layout.put_batch(batch) for batch in batches]
    passed = []
    for step, expected in rates:
      layers, _ = self.method.deploy_counts(expected)
      arch = self.layout.put(self.method.replayed_arch(layers))
      # One at a time, as many concurrent programs may deadlock XLA's CPU devices.
      found = [
        float(self.layout.get(loss({"params": params, "arch": arch}, batch))) for batch in placed
      ]
      passed.append(Passed(step, float(np.mean(found)), layers))
      logging.info("search: the plan of step %d has a loss of %.4f", step, passed[-1].loss)
    return passed
