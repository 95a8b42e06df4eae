"""Stage `search`: learns a plan by gradient; only the rates are trained."""

import itertools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vitcomp_jax import macs
from vitcomp_jax.config import SearchConfig
from vitcomp_jax.data.mixing import training_inputs
from vitcomp_jax.data.transforms import Preprocess
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate import REFERENCE_GMACS, DiffRate
from vitcomp_jax.metrics import read_metrics
from vitcomp_jax.models.reducers import PruneMerge, keep_all
from vitcomp_jax.models.spec import LayerSpec, ViTSpec, with_drop_path
from vitcomp_jax.models.tokens import Output
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.ops import losses
from vitcomp_jax.plans import Plan, load_plan, make_plan, save_plan
from vitcomp_jax.stages.run import Run
from vitcomp_jax.training import loop, optimizer
from vitcomp_jax.training.step import (
  LossFn,
  Metrics,
  init_state,
  make_step,
  random_streams,
  top1,
  with_rows,
)

_TRIED = 7  # plans that a search passed through, beside its last, that are tried at the end


def check(run: Run) -> None:
  """Refuses a budget that cannot be reached, and a loss that cannot be computed."""
  run.check_classes(run.train_data)
  slim = run.config.slim
  cuts_patches = slim.w_patch > 0 and (slim.budgets is None or slim.budgets[-1] < 1)
  if "slim" in run.config.stages and cuts_patches:
    raise _no_positions()
  make_method(run.config.search, run.spec, run.target_gmacs, _base(run))
  run.check_batches("search")
  loss, classes = run.config.search.loss, run.spec.num_classes
  if loss != "features" and not classes:
    raise UserError(
      f"config.search.loss: expected features for {run.spec.name}, which has no classifier, got "
      f"{loss}."
    )
  if loss == "labels" and not run.train_data.has_labels:
    raise UserError(
      f"config.search.loss: expected logits or features for {run.train_data.name}, which has no "
      "labels, got labels."
    )


def search(run: Run) -> dict[str, Any]:
  """Searches a plan that meets the budget.

  Returns:
    What the search took and found, before and after the adjustment to the budget. The plan is in
    `plan.json`.
  """
  config, spec = run.config.search, run.spec
  method = make_method(config, spec, run.target_gmacs, _base(run))
  state, seconds = loop.train(task(run), run.workdir, run.layout, run.config.profile.steps)
  learnt = method.expected_counts(spec, run.layout.get(state.arch))
  begin = time.monotonic()
  step, expected, tried = _best(run, method, learnt)
  seconds += time.monotonic() - begin
  raw = method.static_layers(spec, expected)
  layers, offset = method.deploy_within(spec, expected)
  gmacs = macs.static_macs(spec, layers) / 1e9
  if abs(gmacs - run.target_gmacs) > 0.01 * run.target_gmacs:
    logging.warning("the nearest plan has %.4g GMACs, the budget is %.4g", gmacs, run.target_gmacs)
  images = config.steps * config.batch_size + config.choose_images
  indices = run.base_plan.indices if run.base_plan else None
  name = f"vit_slim+{config.method}" if indices else config.method
  made_by = {"method": name, "steps": config.steps, "images": images}
  made_by |= {
    "weights": run.config.model.weights,
    "data": run.train_data.name,
    "seed": run.config.seed,
  }
  save_plan(make_plan(spec, layers, made_by, indices), run.workdir / "plan.json")
  run.forget()
  return {
    "steps": config.steps,
    "images": images,
    "minutes": round(seconds / 60, 2),
    "budget_gmacs": run.target_gmacs,
    "raw_gmacs": macs.static_macs(spec, raw) / 1e9,
    "gmacs": gmacs,
    "offset": round(offset, 3),
    "chosen_step": step,
    "tried": tried,
    "raw_counts": _counts(raw),
    "counts": _counts(layers),
  }


def task(run: Run) -> loop.Task:
  """What the search trains."""
  config, spec = run.config.search, run.spec
  method = make_method(config, spec, run.target_gmacs, _base(run))
  epoch_steps = config.epoch_steps or max(1, run.train_data.num_examples // config.batch_size)
  tx = optimizer.search_optimizer(config, epoch_steps)
  loss_fn = search_loss(config, method, spec, run.preprocess)
  step_fn = make_step(loss_fn, tx, ("arch",), run.layout, parts=config.parts)
  return loop.Task(
    stage="search",
    state=init_state(run.params, method.initial_arch(spec), tx, ("arch",), run.config.seed),
    step_at=lambda _: step_fn,
    batches=lambda done: run.train_batches(config.batch_size, done),
    steps=config.steps,
    log_every=config.log_every,
    checkpoint_every=config.checkpoint_every,
    schedule=optimizer.search_schedule(config, epoch_steps),
  )


def _best(
  run: Run, method: DiffRate, learnt: np.ndarray
) -> tuple[int, np.ndarray, list[tuple[int, float]]]:
  """The rates that the search passed through whose adjusted plan has the least task loss.

  A gradient tells what one token more or less costs a layer, not what many in several layers do: a
  search may leave a good plan behind. So a few of them, the start and the end included, are tried
  on images that come next in the order of training.

  Args:
    run: With the metrics of the search.
    method: Of the search.
    learnt: The expected counts at the end.

  Returns:
    The step, its expected counts, and step and loss of all that were tried.
  """
  config, spec = run.config.search, run.spec
  if not config.choose_images:
    return config.steps, learnt, []
  passed = {r["step"] - 1: np.array(r["expected"]) for r in read_metrics(run.workdir, "search")}
  passed[config.steps] = learnt
  steps = sorted(passed)
  picked = [steps[i * (len(steps) - 1) // _TRIED] for i in range(_TRIED + 1)]
  model = ViT(spec, method.masked_layers(spec))
  task_of = task_loss(config, model, run.preprocess, method.base)

  @jax.jit
  def loss(variables, batch):
    return task_of(variables, with_rows(batch), jax.random.key(0))[0]

  batches = itertools.islice(
    run.train_batches(config.batch_size, config.steps),
    math.ceil(config.choose_images / config.batch_size),
  )
  placed = [run.layout.put_batch(batch) for batch in batches]
  measured = []
  for step in dict.fromkeys(picked):
    arch = method.counts_arch(method.deploy_within(spec, passed[step])[0])
    variables = run.layout.put({"params": run.params, "arch": arch})
    # One by one: with many programs under way XLA's CPU devices may wait for each other for good.
    found = [float(run.layout.get(loss(variables, batch))) for batch in placed]
    measured.append((step, float(np.mean(found))))
    logging.info("search: the plan of step %d has a loss of %.4f", *measured[-1])
  best = min(measured, key=lambda pair: pair[1])[0]
  return best, passed[best], measured


def made(run: Run) -> Plan:
  """The plan that was found."""
  return load_plan(str(run.workdir / "plan.json"))


def _base(run: Run) -> tuple[LayerSpec, ...]:
  """The layers to search on: dense ones, or slimmed ones whose tokens are all there."""
  if run.base_plan is None:
    return run.spec.dense_layers
  layers = run.base_plan.layers_for(run.spec)
  if any(layer.select != keep_all or layer.reduce != keep_all for layer in layers):
    raise _no_positions()
  return layers


def _no_positions() -> UserError:
  return UserError(
    "stage search: expected a plan that keeps all tokens, got one that removes some; sorting loses "
    "the positions that a slimmed plan names: slim with config.slim.w_patch=0."
  )


def make_method(
  config: SearchConfig,
  spec: ViTSpec,
  target_gmacs: float,
  base: tuple[LayerSpec, ...] | None = None,
) -> DiffRate:
  """The method of a search.

  Args:
    config: Of the search.
    spec: The model.
    target_gmacs: The budget.
    base: The layers to search on; none: dense ones.

  Raises:
    UserError: For a granularity above the model's patches, or a budget below the smallest plan.
  """
  if config.granularity > spec.num_patches:
    raise UserError(
      f"config.search.granularity: expected 1 to {spec.num_patches}, got {config.granularity}."
    )
  dense = macs.static_macs(spec, spec.dense_layers)
  method = DiffRate(
    target_gmacs=target_gmacs,
    granularity=config.granularity,
    init=config.init,
    budget_weight=config.budget_weight,
    budget_unit=dense / REFERENCE_GMACS if config.budget_scale == "relative" else 1e9,
    warmup_steps=config.warmup_steps,
    compress_first=config.compress_first,
    compress_last=config.compress_last,
    clamp_size=config.clamp_size,
    signed_similarity=config.signed_similarity,
    importance=config.importance,
    actions=config.actions,
    mask_eps=config.mask_eps,
    base=base,
  )
  smallest = method.smallest_gmacs(spec)
  if target_gmacs < smallest:
    raise UserError(
      f"config.budget: expected at least {smallest:.4g} GMACs, what the smallest plan of "
      f"{spec.name} costs, got {target_gmacs:.4g}."
    )
  return method


def search_loss(
  config: SearchConfig, method: DiffRate, spec: ViTSpec, preprocess: Preprocess
) -> LossFn:
  """The task loss of the masked model plus the method's penalty, as a function of the rates."""
  model = ViT(spec, with_drop_path(method.layers(spec), config.drop_path), config.remat)
  task_of = task_loss(config, model, preprocess, method.base)

  def loss_fn(params, arch, fixed, batch, key, step):
    del fixed
    task, out, figures = task_of({"params": params, "arch": arch}, batch, key)
    penalty, of_method = method.penalty(spec, arch, out, step)
    return task + penalty, {"task_loss": task, **figures, **of_method}

  return loss_fn


def task_loss(
  config: SearchConfig,
  model: ViT,
  preprocess: Preprocess,
  base: tuple[LayerSpec, ...] | None = None,
) -> Callable[..., tuple[jax.Array, Output, Metrics]]:
  """The config's loss of a model as a function of variables, batch and random key.

  Args:
    config: Of the search.
    model: That removes tokens.
    preprocess: Of the images.
    base: Layers of the model that keeps all tokens; none: dense ones.
  """
  spec = model.spec
  whole = ViT(spec, base or spec.dense_layers)

  def task_of(variables, batch, key):
    smoothing = config.label_smoothing
    images, targets = training_inputs(batch, preprocess, spec.num_classes, smoothing, key)
    rngs = random_streams(key, batch, ("drop_path",))
    out = model.apply(variables, images, method="forward", rngs=rngs)
    if config.loss == "labels":
      return (
        losses.soft_cross_entropy(out.logits, targets),
        out,
        {"top1": top1(out.logits, targets)},
      )
    teacher = whole.apply({"params": variables["params"]}, images, method="forward")
    divergence = {"logits": losses.logit_divergence, "features": losses.feature_divergence}
    found = divergence[config.loss](getattr(out, config.loss), getattr(teacher, config.loss))
    return found, out, {}

  return task_of


def _counts(layers: tuple[LayerSpec, ...]) -> list[list[int]]:
  reducers = [layer.reduce for layer in layers]
  pairs = [[r.prune_keep, r.merge_keep] for r in reducers if isinstance(r, PruneMerge)]
  return np.array(pairs).tolist()
