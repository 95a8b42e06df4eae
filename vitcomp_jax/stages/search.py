"""Stage `search`: learns a plan by gradient; only the rates are trained."""

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from vitcomp_jax.atomic import write_json
from vitcomp_jax.cost.cost_models import MACS, Latency
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.base import Layers
from vitcomp_jax.methods.diffrate.search import DiffRate
from vitcomp_jax.models.reducers import StaticReducer
from vitcomp_jax.models.spec import removes_tokens
from vitcomp_jax.plans import Plan, load_plan, make_plan, save_plan
from vitcomp_jax.runs.run import Run
from vitcomp_jax.training import loop
from vitcomp_jax.training.search import Found, Search


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
    _method(run, suffix).check()
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
    engine = searcher(run, suffix)
    trained = task(run, suffix, learnt)
    state, seconds = loop.train(trained, run.workdir, run.layout, run.config.profile.steps)
    learnt = run.layout.get(state.arch)
    summary = run.finished(f"search{suffix}")
    if summary is None:
      begin = time.monotonic()
      found = engine.choose(state, run.params, _held_back(run, suffix))
      seconds += time.monotonic() - begin
      summary = _save(run, suffix, found, seconds)
    if suffix:
      run.finish(f"search{suffix}", summary)
    summaries.append(summary)
  run.forget()
  return summaries[-1] | ({} if "" in run.targets else {"front": summaries})


def steps_of(run: Run) -> int:
  """Returns the steps for each budget."""
  steps, budgets = run.config.search.steps, len(run.targets)
  return steps if budgets == 1 else 3 * steps // (2 * budgets)


def searcher(run: Run, suffix: str | None = None) -> Search:
  """Returns the search for one budget.

  Args:
    run: The run.
    suffix: Of the budget, see `Run.targets`; None: the first.
  """
  suffix = next(iter(run.targets)) if suffix is None else suffix
  config = dataclasses.replace(run.config.search, steps=steps_of(run))
  return Search(_method(run, suffix), config, run.preprocess, run.layout, run.config.seed)


def task(run: Run, suffix: str | None = None, learnt: Mapping[str, Any] | None = None) -> loop.Task:
  """Returns the training task of the search for one budget.

  Args:
    run: The run.
    suffix: As for `searcher`.
    learnt: The rates to go on from; None: the method's start.
  """
  suffix = next(iter(run.targets)) if suffix is None else suffix
  config, before = run.config.search, _steps_before(run, suffix)
  epoch_steps = config.epoch_steps or max(1, run.train_data.num_examples // config.batch_size)
  return searcher(run, suffix).task(
    f"search{suffix}",
    run.params,
    lambda done: run.train_batches(config.batch_size, before + done),
    epoch_steps,
    learnt,
  )


def _steps_before(run: Run, suffix: str) -> int:
  """Returns the steps for the budgets before one."""
  return steps_of(run) * list(run.targets).index(suffix)


def _held_back(run: Run, suffix: str) -> Any:
  """Returns the batches that come next in the order of training, to choose a plan by."""
  config = run.config.search
  start = _steps_before(run, suffix) + steps_of(run)
  batches = run.train_batches(config.batch_size, start)
  return itertools.islice(batches, math.ceil(config.choose_images / config.batch_size))


def _method(run: Run, suffix: str) -> DiffRate:
  return DiffRate(run.spec, run.targets[suffix], run.config.search, _base(run), run.cost)


def _save(run: Run, suffix: str, found: Found, seconds: float) -> dict[str, Any]:
  """Saves the plan for one budget; returns what the search for it took and found."""
  config, spec, cost, target = run.config.search, run.spec, run.cost, run.targets[suffix]
  spent = cost.static(spec, found.layers)
  if abs(spent - target) > 0.01 * target:
    logging.warning("the nearest plan has %.4g %s, the budget is %.4g", spent, cost.unit, target)
  images = steps_of(run) * config.batch_size + config.choose_images
  indices = run.base_plan.indices if run.base_plan else None
  name = f"vit_slim+{config.method}" if indices else config.method
  made_by = {"method": name, "steps": steps_of(run), "images": images}
  made_by |= {
    "weights": run.config.model.weights,
    "data": run.train_data.name,
    "seed": run.config.seed,
  }
  where = {}
  if isinstance(cost, Latency):
    where = {key: cost.about[key] for key in ("device", "batch")}
    made_by |= {cost.key: round(spent, 3), **where}
  plan = make_plan(spec, found.layers, made_by, indices)
  save_plan(plan, run.workdir / "plan.json")
  if suffix:
    (run.workdir / "plans").mkdir(exist_ok=True)
    save_plan(plan, run.workdir / "plans" / f"{name}{suffix}.json")
  summary: dict[str, Any] = {
    "plan": f"{name}{suffix}",
    "steps": steps_of(run),
    "images": images,
    "minutes": round(seconds / 60, 2),
    f"budget_{cost.key}": target,
    **where,
  }
  for each in (MACS, cost):
    reached = {f"raw_{each.key}": found.raw, each.key: found.layers}
    summary |= {key: round(each.static(spec, of), 6) for key, of in reached.items()}
  return summary | {
    "offset": round(found.offset, 3),
    "chosen_step": found.step,
    "tried": [[each.step, each.loss] for each in found.passed],
    "raw_counts": _counts(found.raw),
    "counts": _counts(found.layers),
  }


def made(run: Run) -> Plan:
  """The plan that was found."""
  return load_plan(str(run.workdir / "plan.json"))


def _base(run: Run) -> Layers:
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


def _counts(layers: Layers) -> list[list[int]]:
  """Returns the tokens that each layer keeps after pruning and after merging, as configured."""
  counts = []
  for layer in layers:
    assert isinstance(layer.reduce, StaticReducer)
    counts.append(list(layer.reduce.counts(0)))
  return counts
