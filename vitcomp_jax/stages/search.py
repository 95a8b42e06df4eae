"""Stage `search`: learns a plan by gradient, training only the rates."""

import dataclasses
import itertools
import logging
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from vitcomp_jax import multihost, strict_json
from vitcomp_jax.atomic import write_json
from vitcomp_jax.config import Loss, SearchConfig
from vitcomp_jax.cost.cost_models import MACS, Latency
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.base import Layers
from vitcomp_jax.methods.diffrate.search import DiffRate
from vitcomp_jax.models.reducers import StaticReducer
from vitcomp_jax.models.spec import ViTSpec, removes_tokens
from vitcomp_jax.plans import Plan, load_plan, make_plan, save_plan
from vitcomp_jax.results import SearchResult
from vitcomp_jax.runs.run import Run
from vitcomp_jax.training import loop
from vitcomp_jax.training.search import Found, SearchTrainer
from vitcomp_jax.training.search_loss import best_loss


def loss_of(run: Run) -> Loss:
  """Returns the loss of the search, not `auto`."""
  return best_loss(run.config.search, run.inputs.spec)


def run(run: Run) -> SearchResult:
  """Searches for a plan that meets the budget, or for one plan per budget.

  Several budgets are met in turn: each search continues from the rates of the previous one.
  Together they take 1.5 times the steps of a single search.

  Returns:
    The steps, time and result of the search, before and after the adjustment to the budget. With
    several budgets these are for the last one, and `front` holds those of all. The last plan is in
    `plan.json`; with several budgets, all plans are in `plans/`.
  """
  if isinstance(run.inputs.cost, Latency):
    # A resumed run uses the table that it began with.
    write_json(run.workdir.path / "latency.json", run.inputs.cost.to_json())
  learnt, results = None, []
  for suffix in run.inputs.targets:
    learnt, result = _searched(run, suffix, learnt)
    if suffix:
      run.workdir.finish(f"search{suffix}", result)
    results.append(result)
  front = None if "" in run.inputs.targets else tuple(results)
  return dataclasses.replace(results[-1], front=front)


def _searched(
  run: Run, suffix: str, learnt: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any], SearchResult]:
  """Returns the learnt rates and the result for one budget, and saves its plan.

  Args:
    run: The run.
    suffix: Suffix of the budget, see `Inputs.targets`.
    learnt: Rates to continue from; None: those of the best of several starts.
  """
  begin = time.monotonic()
  sorted_widths = factors(run)
  arch = _first_rates(run, suffix, learnt, sorted_widths)
  trained = task(run, suffix, arch, sorted_widths)
  preparing = time.monotonic() - begin
  state, seconds = loop.train(
    trained, run.workdir.path, run.inputs.layout, run.config.profile.steps
  )
  result = run.workdir.finished(trained.stage, SearchResult)
  if result is None:
    begin = time.monotonic()
    params, images = run.artefacts.params, _held_back(run, suffix)
    found = trainer(run, suffix).choose(state, params, sorted_widths, images)
    seconds += preparing + time.monotonic() - begin
    _save(run, suffix, found)
    result = _result(run, suffix, found, seconds)
  return run.inputs.layout.get(state.arch), result


def steps_of(run: Run) -> int:
  """Returns the number of steps per budget."""
  steps, budgets = run.config.search.steps, len(run.inputs.targets)
  return steps if budgets == 1 else 3 * steps // (2 * budgets)


def trainer(run: Run, suffix: str | None = None) -> SearchTrainer:
  """Returns the search for one budget, with the importance that it chose if it has begun.

  Args:
    run: The run.
    suffix: Suffix of the budget, see `Inputs.targets`; None: that of the first.
  """
  search, path = _configured(run, suffix), _choice_file(run)
  return search.with_importance(strict_json.read(path)["importance"]) if path.exists() else search


def _configured(run: Run, suffix: str | None) -> SearchTrainer:
  suffix = next(iter(run.inputs.targets)) if suffix is None else suffix
  config = dataclasses.replace(run.config.search, steps=steps_of(run), loss=loss_of(run))
  return SearchTrainer(
    method_of(run, suffix), config, run.inputs.preprocess, run.inputs.layout, run.config.seed
  )


def _choice_file(run: Run) -> pathlib.Path:
  """Returns the file that records what a search chose before its first step."""
  return run.workdir.path / "search_start.json"


def task(
  run: Run,
  suffix: str | None = None,
  arch: Mapping[str, Any] | None = None,
  factors: Any = None,
) -> loop.Task:
  """Returns the training task of the search for one budget.

  Args:
    run: The run.
    suffix: Suffix of the budget, as in `trainer`.
    arch: Rates to start from; None: those of `DiffRate.init`.
    factors: Sorted lists of the widths, if they are searched.
  """
  suffix = next(iter(run.inputs.targets)) if suffix is None else suffix
  config, before, search = run.config.search, _steps_before(run, suffix), trainer(run, suffix)
  epoch_steps = config.epoch_steps or max(
    1, run.inputs.train_data.num_examples // config.batch_size
  )
  return search.task(
    f"search{suffix}",
    run.artefacts.params,
    lambda done: run.inputs.train_batches(config.batch_size, before + done),
    epoch_steps,
    search.method.init() if arch is None else arch,
    factors,
  )


def _first_rates(
  run: Run, suffix: str, learnt: Mapping[str, Any] | None, factors: Any
) -> Mapping[str, Any] | None:
  """Returns the rates to start from, and records the importance chosen before the first step.

  Args:
    run: The run.
    suffix: Suffix of the budget.
    learnt: Rates of another budget to continue from; None: those of the best of several starts.
    factors: Sorted lists of the widths, if they are searched.
  """
  if learnt is not None:
    return trainer(run, suffix).method.init(learnt)
  if _is_begun(run, f"search{suffix}"):
    return None  # the rates come from a checkpoint
  search, arch = _configured(run, suffix).start(
    run.artefacts.params, factors, _held_back(run, suffix)
  )
  write_json(_choice_file(run), {"importance": search.importance})
  multihost.meet("importance")  # before another process looks for the file
  return arch


def _is_begun(run: Run, stage: str) -> bool:
  """Returns whether a stage has left a checkpoint in the workdir."""
  folder = run.workdir.path / "checkpoints" / stage
  return any(child.name.isdigit() for child in folder.glob("*"))


def factors(run: Run) -> Any:
  """Returns the sorted lists of the model's widths; None if only tokens are searched."""
  config = run.config.search
  if config.what == "tokens":
    return None
  count = _batches(config.calibration_images, config)
  images = itertools.islice(_batches_behind(run, 0), count)
  return trainer(run).factors(run.artefacts.dense_params, images)


def unused_batches(run: Run) -> Iterator[Mapping[str, Any]]:
  """Returns the batches that follow all those that a search uses, in training order."""
  return _batches_behind(run, _batches(run.config.search.calibration_images, run.config.search))


def _batches_behind(run: Run, skipped: int) -> Iterator[Mapping[str, Any]]:
  """Returns the batches after those for the steps and the choice, without the first `skipped`."""
  config = run.config.search
  used = steps_of(run) * len(run.inputs.targets) + _batches(config.choose_images, config)
  return run.inputs.train_batches(config.batch_size, used + skipped)


def _batches(images: int, config: SearchConfig) -> int:
  return math.ceil(images / config.batch_size)


def _steps_before(run: Run, suffix: str) -> int:
  """Returns the number of steps that precede those for a budget."""
  return steps_of(run) * list(run.inputs.targets).index(suffix)


def _held_back(run: Run, suffix: str) -> Any:
  """Returns the batches for choosing a plan, which follow the search's in training order."""
  config = run.config.search
  start = _steps_before(run, suffix) + steps_of(run)
  batches = run.inputs.train_batches(config.batch_size, start)
  return itertools.islice(batches, _batches(config.choose_images, config))


def method_of(run: Run, suffix: str) -> DiffRate:
  """Returns the method for one budget, as configured."""
  return DiffRate(
    run.inputs.spec, run.inputs.targets[suffix], run.config.search, _base(run), run.inputs.cost
  )


def _save(run: Run, suffix: str, found: Found) -> None:
  """Saves the plan for one budget."""
  spec, cost, target = run.inputs.spec, run.inputs.cost, run.inputs.targets[suffix]
  spent = cost.static(spec, found.layers)
  if abs(spent - target) > 0.01 * target:
    logging.warning("the nearest plan has %.4g %s, the budget is %.4g", spent, cost.unit, target)
  base = run.artefacts.base_plan
  made_by = {
    "method": _name(run),
    "loss": loss_of(run),
    "steps": steps_of(run),
    "images": _images(run),
    "weights": run.config.model.weights,
    "data": run.inputs.train_data.name,
    "seed": run.config.seed,
  }
  if isinstance(cost, Latency):
    made_by |= {cost.key: round(spent, 3), **_where(cost)}
  plan = make_plan(spec, found.layers, made_by, base.indices if base else None)
  if found.params is not None:
    run.artefacts.save(found.params, run.workdir.path / "slimmed.safetensors")
  save_plan(plan, run.workdir.path / "plan.json")
  if suffix:
    (run.workdir.path / "plans").mkdir(exist_ok=True)
    save_plan(plan, run.workdir.path / "plans" / f"{_name(run)}{suffix}.json")


def _name(run: Run) -> str:
  """Returns the name of the plan's method, which has two parts for a search on slimmed layers."""
  base, method = run.artefacts.base_plan, run.config.search.method
  return f"vit_slim+{method}" if base and base.indices else method


def _images(run: Run) -> int:
  """Returns the number of images that the search for one budget uses, for any purpose."""
  config = run.config.search
  batches = steps_of(run)
  if trainer(run).chooses:
    batches += _batches(config.choose_images, config)
  if config.what != "tokens":
    batches += _batches(config.calibration_images, config)
  return batches * config.batch_size


def _where(cost: Latency) -> dict[str, Any]:
  """Returns the runtime, the device and the batch size of a latency table."""
  return {"runtime": cost.runtime, "device": cost.about["device"], "batch": cost.about["batch"]}


def _result(run: Run, suffix: str, found: Found, seconds: float) -> SearchResult:
  """Returns the steps, time and result of the search for one budget."""
  spec, cost = run.inputs.spec, run.inputs.cost
  spent: dict[str, Any] = {f"budget_{cost.key}": run.inputs.targets[suffix]}
  for each in (MACS, cost):
    spent[f"raw_{each.key}"] = round(each.static(spec, found.raw), 6)
    spent[each.key] = round(each.static(spec, found.layers), 6)
  if isinstance(cost, Latency):
    spent |= _where(cost)
  return SearchResult(
    plan=f"{_name(run)}{suffix}",
    steps=steps_of(run),
    images=_images(run),
    minutes=round(seconds / 60, 2),
    offset=round(found.offset, 3),
    chosen_step=found.step,
    tried=tuple((each.step, each.loss) for each in found.passed),
    raw_counts=_counts(spec, found.raw),
    counts=_counts(spec, found.layers),
    **spent,
  )


def made(run: Run) -> Plan:
  """Returns the searched plan."""
  return load_plan(str(run.workdir.path / "plan.json"))


def _base(run: Run) -> Layers:
  """Returns the layers to search on: dense layers, or slimmed layers that keep all tokens."""
  if run.artefacts.base_plan is None:
    return run.inputs.spec.dense_layers
  layers = run.artefacts.base_plan.layers_for(run.inputs.spec)
  if removes_tokens(layers):
    raise no_positions()
  return layers


def no_positions() -> UserError:
  """Returns the error for a search on slimmed layers that remove patches by position."""
  return UserError(
    "stage search: expected a plan that keeps all tokens, got one that removes some; sorting loses "
    "the positions that a slimmed plan names: slim with config.slim.w_patch=0."
  )


def _counts(spec: ViTSpec, layers: Layers) -> tuple[tuple[int, int], ...]:
  """Returns the tokens that each layer keeps after pruning and after merging, as configured."""
  counts = []
  for layer in layers:
    assert isinstance(layer.reduce, StaticReducer)
    counts.append(layer.reduce.counts(spec.num_tokens))
  return tuple(counts)
