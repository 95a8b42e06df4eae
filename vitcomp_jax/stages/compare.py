"""Stage `compare`: one table of methods and budgets, on the same weights and the same examples.

A method that has to be trained or searched gets its own run, in `compare/NAME` of the workdir.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

import jax

from vitcomp_jax import strict_json
from vitcomp_jax.comparison import random_schedules, rows
from vitcomp_jax.comparison.methods import (
  SEARCHED,
  SLIMMED,
  check_methods,
  file_name,
  parse,
  searched_before,
)
from vitcomp_jax.config import BudgetConfig, CompareConfig, Config, Stage
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate.search import DiffRate
from vitcomp_jax.methods.registry import schedules, within
from vitcomp_jax.plans import Plan, load_plan, make_plan, save_plan
from vitcomp_jax.reporting import plots, report
from vitcomp_jax.results import Result, Row, SearchResult, SlimResult, TrainResult
from vitcomp_jax.runs import table
from vitcomp_jax.runs.child import finished_child
from vitcomp_jax.runs.run import Run
from vitcomp_jax.stages import finetune, search, slim

_STAGES = {"search": search.run, "slim": slim.run, "finetune": finetune.run}
_RESULTS: dict[str, type[SearchResult | SlimResult | TrainResult]] = {
  "search": SearchResult,
  "slim": SlimResult,
  "finetune": TrainResult,
}


def check(run: Run) -> None:
  """Rejects methods that do not exist or cannot be compared with this config."""
  config, spec = run.config.compare, run.inputs.spec
  run.inputs.check_trainable("compare")
  run.inputs.check_data("eval")
  check_methods(run.config, spec)
  if config.random_schedules:
    spec.check_plain("config.compare.random_schedules")
  if config.random_schedules and jax.process_count() > 1:
    raise UserError(
      "config.compare.random_schedules: expected 0 with several processes; measure them in one."
    )
  for name in config.plans:
    plan = load_plan(name)
    plan.layers_for(spec)
    _check_widths("plans", name, plan)
  for budget in config.budgets:
    for text in config.methods:
      if config.searched:
        for path in searched_before(run.config, text, budget):
          _check_widths("searched", str(path), load_plan(str(path)))
      else:
        _check_search(run, text, budget)
  for budget in config.finetune_budgets:
    for text in config.finetuned:
      _check_search(run, text, budget)


def _check_widths(key: str, name: str, plan: Plan) -> None:
  """Rejects a plan that needs weights of its own."""
  if plan.is_slimmed:
    raise UserError(
      f"config.compare.{key}: expected plans of tokens, got {name}, whose widths need weights of "
      "their own; search again instead, in `methods`."
    )


def _check_search(run: Run, text: str, budget: float) -> None:
  """Rejects a search that cannot succeed, before any other row is measured."""
  method, config = parse(text, run.config)
  if method == SEARCHED:
    DiffRate(run.inputs.spec, run.inputs.gmacs_of(budget), config.search).check()


def run(run: Run) -> Result:
  """Measures every method at every budget, and writes `result.json`, `report.md` and a plot.

  Returns:
    The content of `result.json`.
  """
  config, path = run.config.compare, run.workdir.path
  dense = run.inputs.spec.dense_layers, run.artefacts.dense_params
  found = [rows.measured(run, Row(method="dense"), [dense])]
  found += [_plan_row(run, name) for name in config.plans]
  for budget in config.budgets:
    found += [_method_row(run, text, budget) for text in config.methods]
  for budget in config.finetune_budgets:
    found += [_trained_row(run, text, budget) for text in config.finetuned]
  there = {row.name for row in found}
  found = [_compared(run, row, there) for row in found]
  cloud, random = [], {}
  for budget in config.budgets if config.random_schedules else ():
    points = random_schedules.points(run, budget)
    searched = Row(method=SEARCHED, budget=budget)
    random[f"{budget:g}"] = rows.rank(run, searched if searched.name in there else None, points)
    cloud += [(point["gmacs"], point["top1"]) for point in points]
  result = dataclasses.replace(table.empty_result(run), rows=tuple(found), random=random or None)
  result.write(path / "result.json")
  plots.save(plots.accuracy_against_gmacs(found, cloud), path / "figures", "accuracy")
  report.write_comparison(path, result)
  return result


def made(run: Run) -> dict[str, Any]:
  """Returns the content of `result.json`."""
  return strict_json.read(run.workdir.path / "result.json")


def _plan_row(run: Run, name: str) -> Row:
  """Measures a plan listed in the config."""
  plan = load_plan(name)
  row = Row(method=table.method_of(plan), plan=name)
  model = plan.layers_for(run.inputs.spec), run.artefacts.dense_params
  return rows.measured(run, row, [model])


def _compared(run: Run, row: Row, there: Collection[str]) -> Row:
  """Adds the differences from the dense model, and from the row's reference if it is in the table.

  Args:
    run: The run.
    row: A measured row.
    there: Names of all rows.
  """
  dense = Row(method="dense")
  if row.name != dense.name:
    row = rows.with_differences(run, row, dense, "dense")
  reference = _reference(run, row, there)
  if reference is None or reference.name == row.name or reference.name not in there:
    return row
  row = rows.with_differences(run, row, reference, "reference")
  return dataclasses.replace(row, reference=reference.name)


def _reference(run: Run, row: Row, there: Collection[str]) -> Row | None:
  """Returns the search's row at the same budget, or the first plan's row if there is no search.

  A trained row is compared with the trained search; without one, with itself before training.
  """
  config = run.config.compare
  if row.variant == "finetune":
    trained = dataclasses.replace(row, method=SEARCHED)
    return trained if trained.name in there else dataclasses.replace(row, variant=None)
  if row.budget is not None:
    if SEARCHED not in config.methods and config.plans:
      return Row(method=SEARCHED, plan=config.plans[0])
    return Row(method=SEARCHED, budget=row.budget)
  if row.plan is None or row.gmacs is None:
    return None
  for budget in config.budgets:  # finds the budget that the plan's cost matches
    if abs(row.gmacs / run.inputs.gmacs_of(budget) - 1) < 0.01:
      return Row(method=SEARCHED, budget=budget)
  return None


def _method_row(run: Run, text: str, budget: float) -> Row:
  """Measures a method with the run's weights; for a search, takes the mean over its seeds."""
  method, config = parse(text, run.config)
  row = Row(method=text, budget=budget)
  if method in schedules():
    spec, importance = run.inputs.spec, config.search.importance
    layers = within(method, spec, run.inputs.gmacs_of(budget), importance)
    return rows.measured(run, row, [(layers, run.artefacts.dense_params)])
  if config.compare.searched:
    plans = [load_plan(str(path)) for path in searched_before(run.config, text, budget)]
    row = dataclasses.replace(row, seed=table.seed_of(plans[0]))
    models = [(plan.layers_for(run.inputs.spec), run.artefacts.dense_params) for plan in plans]
    return rows.measured(run, row, models)
  seeds = range(config.seed, config.seed + config.compare.seeds)
  children = [_searched(run, text, budget, seed) for seed in seeds]
  row = dataclasses.replace(row, seed=config.seed, minutes=_mean_minutes(children))
  models = [(each.artefacts.layers, each.artefacts.params_before_finetune) for each in children]
  return rows.measured(run, row, models)


def _searched(
  run: Run, text: str, budget: float, seed: int, stages: tuple[Stage, ...] = ("search",)
) -> Run:
  """Returns the finished search of a method with one seed; its plan is saved in `plans/`."""
  config = dataclasses.replace(parse(text, run.config)[1], seed=seed)
  name = f"{text}@{budget:g}-seed{seed}"
  child = _child(run, name, config, stages, budget)
  save_plan(search.made(child), _plan_path(run, name))
  return child


def _mean_minutes(children: Sequence[Run]) -> float:
  """Returns the mean time that the runs spent on searching and training, in minutes."""
  found = []
  for child in children:
    done = [child.workdir.finished(stage, _RESULTS[stage]) for stage in child.config.stages]
    found.append(sum(result.minutes for result in done if result))
  return round(sum(found) / len(found), 2)


def _trained_row(run: Run, text: str, budget: float) -> Row:
  """Measures a method with weights trained for its layers, with the first seed."""
  method, config = parse(text, run.config)
  row = Row(method=text, budget=budget, variant="finetune")
  if method == SEARCHED:
    child = _searched(run, text, budget, config.seed, ("search", "finetune"))
  elif method == SLIMMED:
    child = _child(run, row.name, config, ("slim", "finetune"), budget)
  else:
    path, spec = _plan_path(run, row.name), run.inputs.spec
    layers = within(method, spec, run.inputs.gmacs_of(budget), config.search.importance)
    save_plan(make_plan(spec, layers, {"method": method}), path)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, plan=str(path)))
    child = _child(run, row.name, config, ("finetune",), budget)
  row = dataclasses.replace(row, minutes=_mean_minutes([child]))
  return rows.measured(run, row, [(child.artefacts.layers, child.artefacts.params)])


def _child(run: Run, name: str, config: Config, stages: tuple[Stage, ...], budget: float) -> Run:
  budgets = BudgetConfig(fraction=budget)
  # The table's rows are left out, as they may differ when the run resumes.
  config = dataclasses.replace(config, stages=stages, budget=budgets, compare=CompareConfig())
  return finished_child(run, name, config, _STAGES)


def _plan_path(run: Run, name: str) -> pathlib.Path:
  folder = run.workdir.path / "plans"
  folder.mkdir(exist_ok=True)
  return folder / f"{file_name(name)}.json"
