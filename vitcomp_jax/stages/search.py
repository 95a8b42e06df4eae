"""Stage `search`: learns a plan by gradient; only the rates are trained."""

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from vitcomp_jax.atomic import write_json
from vitcomp_jax.config import SearchConfig
from vitcomp_jax.cost.cost_models import MACS, CostModel, Latency
from vitcomp_jax.data.mixing import training_inputs
from vitcomp_jax.data.transforms import Preprocess
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.methods.diffrate.search import REFERENCE_GMACS, DiffRate
from vitcomp_jax.metrics import read_metrics
from vitcomp_jax.models.build import build
from vitcomp_jax.models.spec import LayerSpec, ViTSpec, removes_tokens, with_drop_path
from vitcomp_jax.models.tokens import Output
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.ops import losses
from vitcomp_jax.plans import Plan, load_plan, make_plan, save_plan
from vitcomp_jax.runs.run import Run
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
  run.open_data("train")
  slim = run.config.slim
  cuts_patches = slim.w_patch > 0 and (slim.budgets is None or slim.budgets[-1] < 1)
  if "slim" in run.config.stages and cuts_patches:
    raise _no_positions()
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
  if run.config.budget.latency_ms is not None:
    _check_latency(run)
  for suffix in run.targets:
    _method(run, suffix)
  if not steps_of(run):
    raise UserError(
      f"config.search.steps: expected at least one for each of {len(run.targets)} budgets, "
      f"got {run.config.search.steps} for all."
    )


def _check_latency(run: Run) -> None:
  """Refuses what no latency table is measured for."""
  run.spec.check_plain("config.budget.latency_ms")
  if run.base_plan is not None or "slim" in run.config.stages:
    raise UserError(
      "config.budget.latency_ms: expected a search on the dense model, got one on slimmed layers; "
      "give fraction or gmacs."
    )
  if run.config.search.budget_scale != "relative":
    raise UserError(
      f"config.search.budget_scale: expected relative for a budget in ms, got "
      f"{run.config.search.budget_scale}."
    )


def search(run: Run) -> dict[str, Any]:
  """Searches a plan that meets the budget, or one for each of several budgets.

  Several are met one after the other: from the second on, a search goes on from the rates of the
  one before. They share half as many steps again as one search has.

  Returns:
    What the search took and found, before and after the adjustment to the budget; of several, the
    last one's, and all under `front`. The plan is in `plan.json`; those of several budgets are in
    `plans/` besides, the last one in both.
  """
  if isinstance(run.cost, Latency):
    # A run that goes on counts by the very table that it began with.
    write_json(run.workdir / "latency.json", run.cost.to_json())
  learnt, summaries = None, []
  for suffix in run.targets:
    state, seconds = loop.train(
      task(run, suffix, learnt), run.workdir, run.layout, run.config.profile.steps
    )
    learnt = run.layout.get(state.arch)
    summary = run.finished(f"search{suffix}") or _deployed(run, suffix, learnt, seconds)
    if suffix:
      run.finish(f"search{suffix}", summary)
    summaries.append(summary)
  run.forget()
  return summaries[-1] | ({} if "" in run.targets else {"front": summaries})


def steps_of(run: Run) -> int:
  """Steps for each budget."""
  steps, budgets = run.config.search.steps, len(run.targets)
  return steps if budgets == 1 else 3 * steps // (2 * budgets)


def task(run: Run, suffix: str | None = None, learnt: Mapping[str, Any] | None = None) -> loop.Task:
  """Returns the training task of the search.

  Args:
    run: The run.
    suffix: Of the budget, see `Run.targets`; None: the first.
    learnt: The rates to go on from; None: the method's start.
  """
  suffix = next(iter(run.targets)) if suffix is None else suffix
  config, spec, steps = run.config.search, run.spec, steps_of(run)
  config = dataclasses.replace(config, steps=steps)
  method = _method(run, suffix)
  epoch_steps = config.epoch_steps or max(1, run.train_data.num_examples // config.batch_size)
  tx = optimizer.search_optimizer(config, epoch_steps)
  loss_fn = search_loss(config, method, spec, run.preprocess)
  step_fn = make_step(loss_fn, tx, ("arch",), run.layout, parts=config.parts)
  before = _steps_before(run, suffix)
  arch = method.initial_arch(spec, learnt)
  return loop.Task(
    stage=f"search{suffix}",
    state=init_state(run.params, arch, tx, ("arch",), run.config.seed),
    step_at=lambda _: step_fn,
    batches=lambda done: run.train_batches(config.batch_size, before + done),
    steps=steps,
    log_every=config.log_every,
    checkpoint_every=config.checkpoint_every,
    schedule=optimizer.search_schedule(config, epoch_steps),
  )


def _steps_before(run: Run, suffix: str) -> int:
  """Steps for the budgets before one."""
  return steps_of(run) * list(run.targets).index(suffix)


def _method(run: Run, suffix: str) -> DiffRate:
  return make_method(run.config.search, run.spec, run.targets[suffix], _base(run), run.cost)


def _deployed(run: Run, suffix: str, arch: Mapping[str, Any], seconds: float) -> dict[str, Any]:
  """Saves the plan for one budget; returns what the search for it took and found."""
  config, spec, cost, target = run.config.search, run.spec, run.cost, run.targets[suffix]
  method, steps = _method(run, suffix), steps_of(run)
  begin = time.monotonic()
  step, expected, tried = _best(run, suffix, method, method.expected_counts(spec, arch))
  seconds += time.monotonic() - begin
  raw = method.static_layers(spec, expected)
  layers, offset = method.deploy_within(spec, expected)
  spent = cost.static(spec, layers)
  if abs(spent - target) > 0.01 * target:
    logging.warning("the nearest plan has %.4g %s, the budget is %.4g", spent, cost.unit, target)
  images = steps * config.batch_size + config.choose_images
  indices = run.base_plan.indices if run.base_plan else None
  name = f"vit_slim+{config.method}" if indices else config.method
  made_by = {"method": name, "steps": steps, "images": images}
  made_by |= {
    "weights": run.config.model.weights,
    "data": run.train_data.name,
    "seed": run.config.seed,
  }
  where = {}
  if isinstance(cost, Latency):
    where = {key: cost.about[key] for key in ("device", "batch")}
    made_by |= {cost.key: round(spent, 3), **where}
  plan = make_plan(spec, layers, made_by, indices)
  save_plan(plan, run.workdir / "plan.json")
  if suffix:
    (run.workdir / "plans").mkdir(exist_ok=True)
    save_plan(plan, run.workdir / "plans" / f"{name}{suffix}.json")
  summary: dict[str, Any] = {
    "plan": f"{name}{suffix}",
    "steps": steps,
    "images": images,
    "minutes": round(seconds / 60, 2),
    f"budget_{cost.key}": target,
    **where,
  }
  for each in (MACS, cost):
    found = {f"raw_{each.key}": raw, each.key: layers}
    summary |= {key: round(each.static(spec, of), 6) for key, of in found.items()}
  return summary | {
    "offset": round(offset, 3),
    "chosen_step": step,
    "tried": tried,
    "raw_counts": _counts(raw),
    "counts": _counts(layers),
  }


def _best(
  run: Run, suffix: str, method: DiffRate, learnt: np.ndarray
) -> tuple[int, np.ndarray, list[tuple[int, float]]]:
  """The rates that the search passed through whose adjusted plan has the least task loss.

  A gradient tells what one token more or less costs a layer, not what many in several layers do: a
  search may leave a good plan behind. So a few of them, the start and the end included, are tried
  on images that come next in the order of training.

  Args:
    run: With the metrics of the search.
    suffix: Of the budget.
    method: Of the search.
    learnt: The expected counts at the end.

  Returns:
    The step, its expected counts, and step and loss of all that were tried and have a finite loss.

  Raises:
    UserError: If none has.
  """
  config, spec, last = run.config.search, run.spec, steps_of(run)
  if not config.choose_images:
    return last, learnt, []
  records = read_metrics(run.workdir, f"search{suffix}")
  passed = {r["step"] - 1: np.array(r["expected"]) for r in records}
  passed[last] = learnt
  steps = sorted(passed)
  picked = [steps[i * (len(steps) - 1) // _TRIED] for i in range(_TRIED + 1)]
  model = build(spec, method.masked_layers(spec))
  task_of = task_loss(config, model, run.preprocess, method.base)

  @jax.jit
  def loss(variables, batch):
    return task_of(variables, with_rows(batch), jax.random.key(0))[0]

  batches = itertools.islice(
    run.train_batches(config.batch_size, _steps_before(run, suffix) + last),
    math.ceil(config.choose_images / config.batch_size),
  )
  placed = [run.layout.put_batch(batch) for batch in batches]
  measured = []
  for step in dict.fromkeys(picked):
    arch = method.counts_arch(spec, method.deploy_within(spec, passed[step])[0])
    variables = run.layout.put({"params": run.params, "arch": arch})
    # One by one: with many programs under way XLA's CPU devices may wait for each other for good.
    found = [float(run.layout.get(loss(variables, batch))) for batch in placed]
    measured.append((step, float(np.mean(found))))
    logging.info("search: the plan of step %d has a loss of %.4f", *measured[-1])
  finite = [pair for pair in measured if math.isfinite(pair[1])]
  if not finite:
    raise UserError(
      f"stage search: expected plans with a finite loss, got {len(measured)} of {len(measured)} "
      "that have none; start from other weights, or set config.model.dtype=float32."
    )
  best = min(finite, key=lambda pair: pair[1])[0]
  return best, passed[best], finite


def made(run: Run) -> Plan:
  """The plan that was found."""
  return load_plan(str(run.workdir / "plan.json"))


def _base(run: Run) -> tuple[LayerSpec, ...]:
  """The layers to search on: dense ones, or slimmed ones whose tokens are all there."""
  if run.base_plan is None:
    return run.spec.dense_layers
  layers = run.base_plan.layers_for(run.spec)
  if removes_tokens(layers):
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
  target: float,
  base: tuple[LayerSpec, ...] | None = None,
  cost: CostModel = MACS,
) -> DiffRate:
  """The method of a search.

  Args:
    config: Of the search.
    spec: The model.
    target: The budget.
    base: The layers to search on; None: dense ones.
    cost: What it limits.

  Raises:
    UserError: For a granularity above the model's patches, or a budget below the smallest plan.
  """
  if config.granularity > spec.num_patches:
    raise UserError(
      f"config.search.granularity: expected 1 to {spec.num_patches}, got {config.granularity}."
    )
  spec.importance(config.importance)  # raises
  dense = cost.static(spec, spec.dense_layers)
  unit = cost.scale * dense / REFERENCE_GMACS if config.budget_scale == "relative" else 1e9
  method = DiffRate(
    target=target,
    granularity=config.granularity,
    init=config.init,
    budget_weight=config.budget_weight,
    budget_unit=unit,
    warmup_steps=config.warmup_steps,
    compress_first=config.compress_first,
    compress_last=config.compress_last,
    clamp_size=config.clamp_size,
    mask_follows=config.mask_follows,
    signed_similarity=config.signed_similarity,
    importance=config.importance,
    whole_sizes=config.whole_sizes,
    first_receives=config.first_receives,
    actions=config.actions,
    mask_eps=config.mask_eps,
    tile=config.tile,
    base=base,
    cost=cost,
  )
  smallest = method.smallest(spec)
  if target < smallest:
    raise UserError(
      f"config.budget: expected at least {smallest:.4g} {cost.unit} (fraction "
      f"{smallest / dense:.3g}), what the smallest plan of {spec.name} costs, got {target:.4g} "
      f"(fraction {target / dense:.3g})."
    )
  return method


def search_loss(
  config: SearchConfig, method: DiffRate, spec: ViTSpec, preprocess: Preprocess
) -> LossFn:
  """The task loss of the masked model plus the method's penalty, as a function of the rates."""
  layers = method.layers(spec, logits_only=True)
  model = build(spec, with_drop_path(layers, config.drop_path), config.remat)
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
    base: Layers of the model that keeps all tokens; None: dense ones.
  """
  spec = model.spec
  whole = build(spec, base or spec.dense_layers)

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
