"""Stages `pretrain` and `finetune`: train the weights of the dense or the compressed model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from vitcomp_jax.config import FinetuneConfig, TrainConfig
from vitcomp_jax.data.mixing import training_inputs
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods import dynamicvit, evit
from vitcomp_jax.models.build import build
from vitcomp_jax.models.spec import LayerSpec, with_drop_path
from vitcomp_jax.ops import losses
from vitcomp_jax.results import TrainResult
from vitcomp_jax.runs.run import Run
from vitcomp_jax.training import loop, optimizer
from vitcomp_jax.training.step import (
  LossFn,
  StepFn,
  init_state,
  make_step,
  random_streams,
  top1,
)
from vitcomp_jax.weights import writing_back
from vitcomp_jax.weights.loading import Params


def check(run: Run) -> None:
  """Rejects data, a model or a batch size that cannot be used for training."""
  distill = run.config.distill
  if distill.kind == "none" or distill.weight < 1:
    run.inputs.check_trainable("finetune")
  elif distill.kind != "features" and not run.inputs.spec.has_classifier:
    raise UserError(
      f"config.distill.kind: expected features for {run.inputs.spec.name}, which has no "
      f"classifier, got {distill.kind}."
    )
  run.inputs.check_batches("finetune")


def run(run: Run) -> TrainResult:
  """Trains the model under the current plan, starting from the current weights.

  Returns:
    Steps, images and minutes taken. The weights are written to `finetuned.safetensors`.
  """
  result, params = fit(run, task(run), run.config.finetune, made(run))
  plan = run.artefacts.plan
  if plan and plan.is_slimmed:
    timm = writing_back.write(run.inputs.named_spec, run.artefacts.layers, params, run.workdir.path)
    return dataclasses.replace(result, timm=timm)
  return result


def task(run: Run) -> loop.Task:
  """Returns the training task."""
  artefacts = run.artefacts
  teacher = artefacts.dense_params if run.config.distill.kind != "none" else None
  start = artefacts.params_before_finetune
  return weights_task(run, "finetune", run.config.finetune, artefacts.layers, start, teacher)


def made(run: Run) -> str:
  """Returns the path of the weights."""
  return str(run.workdir.path / "finetuned.safetensors")


def fit(run: Run, task: loop.Task, config: TrainConfig, path: str) -> tuple[TrainResult, Params]:
  """Trains and writes the weights with timm's names; returns the result and the weights."""
  layout = run.inputs.layout
  state, seconds = loop.train(task, run.workdir.path, layout, run.config.profile.steps)
  trained = layout.get(state.params if state.ema is None else state.ema)
  run.artefacts.save(trained, path)
  images = task.steps * config.batch_size
  return TrainResult(task.steps, images, round(seconds / 60, 2)), trained


def weights_task(
  run: Run,
  stage: str,
  config: TrainConfig,
  layers: tuple[LayerSpec, ...],
  params: Params,
  teacher: Params | None = None,
) -> loop.Task:
  """Returns the task that trains weights on labels and, optionally, on a teacher's outputs.

  Args:
    run: The run, which holds the data.
    stage: Name of the stage in checkpoints and metrics.
    config: Training options.
    layers: Layers of the model.
    params: Initial weights.
    teacher: Weights of the dense model; None: no teacher.
  """
  inputs = run.inputs
  count = inputs.train_data.num_examples
  tx = optimizer.train_optimizer(config, count)
  if isinstance(config, FinetuneConfig) and config.trains == "norms":
    tx = optimizer.per_group(_group, {"norms": tx})

  @functools.cache
  def step_fn(phase: tuple[LayerSpec, ...]) -> StepFn:
    loss_fn = _loss(run, config, phase, teacher is not None)
    return make_step(loss_fn, tx, ("params",), inputs.layout, config.ema, config.parts)

  phases = [(0, layers)]
  if config.keep_rate_epochs:
    warmup = round(config.keep_rate_epochs * count / config.batch_size)
    phases = evit.warmup(inputs.spec, layers, warmup)
  return loop.Task(
    stage=stage,
    state=init_state(params, {}, tx, ("params",), run.config.seed, config.ema is not None),
    step_at=lambda step: step_fn(next(p for start, p in reversed(phases) if step >= start)),
    batches=lambda done: inputs.train_batches(config.batch_size, done),
    steps=optimizer.train_steps(config, count),
    log_every=config.log_every,
    checkpoint_every=config.checkpoint_every,
    schedule=optimizer.train_schedule(config, count),
    fixed=teacher,
  )


def _group(path: tuple[str, ...]) -> str:
  """Returns the optimizer group of a weight when only norms and biases are trained."""
  is_small = "bias" in path[-1] or optimizer.is_of_norm(path)
  return "norms" if is_small else optimizer.FROZEN


def _loss(
  run: Run, config: TrainConfig, layers: tuple[LayerSpec, ...], has_teacher: bool
) -> LossFn:
  spec, distill = run.inputs.spec, run.config.distill
  trained = with_drop_path(dynamicvit.training_layers(layers), config.drop_path)
  model, dense = build(spec, trained), build(spec, spec.dense_layers)
  places = dynamicvit.places(layers)

  def loss_fn(params, arch, fixed, batch, key, step):
    del arch, step
    images, targets = training_inputs(
      batch, spec.preprocess, spec.num_classes, config.label_smoothing, key
    )
    rngs = random_streams(key, batch, ("drop_path", "gumbel"))
    out = model.apply({"params": params}, images, method="forward", rngs=rngs)
    learns_labels = not has_teacher or distill.weight < 1
    loss, metrics = jnp.zeros(()), {}
    if learns_labels:
      loss = losses.soft_cross_entropy(out.logits, targets)
      metrics["top1"] = top1(out.logits, targets)
    if has_teacher:
      whole = jax.lax.stop_gradient(dense.apply({"params": fixed}, images, method="forward"))
      if distill.kind == "features":
        pair = (each.representation(spec.projection) for each in (out, whole))
        learnt = losses.feature_divergence(*pair)
      else:
        learnt = losses.distillation(out.logits, whole.logits, distill.kind, distill.temperature)
      loss = (1 - distill.weight) * loss + distill.weight * learnt
      if places:
        # Masked tokens stay in place, so all tokens correspond to the teacher's.
        loss = loss + distill.tokens * dynamicvit.token_distance(out.tokens, whole.tokens)
    if places:
      metrics["ratio_loss"] = dynamicvit.ratio_loss(spec, layers, out)
      loss = loss + dynamicvit.RATIO_WEIGHT / len(places) * metrics["ratio_loss"]
    return loss, metrics

  return loss_fn
