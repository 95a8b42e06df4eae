"""Stage `compare`: one table of methods and budgets, on the same weights and the same examples.

A method that has to learn does so in its own run, in `compare/NAME` of the workdir.
"""

import dataclasses
import pathlib
from typing import Any

import jax

from vitcomp_jax import strict_json
from vitcomp_jax.comparison import random_schedules, rows
from vitcomp_jax.comparison.methods import SEARCHED, SLIMMED, check_methods, parse, searched_before
from vitcomp_jax.comparison.rows import Model
from vitcomp_jax.config import BudgetConfig, Config, Stage
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.registry import schedules, within
from vitcomp_jax.plans import Plan, load_plan, make_plan, save_plan
from vitcomp_jax.reporting import plots, report
from vitcomp_jax.results import Result, Row
from vitcomp_jax.runs import table
from vitcomp_jax.runs.child import finished_child
from vitcomp_jax.runs.run import Run
from vitcomp_jax.stages import finetune, search, slim

_STAGES = {"search": search.run, "slim": slim.run, "finetune": finetune.run}


def check(run: Run) -> None:
  """Refuses methods that do not exist or cannot be compared with this config."""
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
    load_plan(name).layers_for(spec)
  for budget in config.budgets if config.searched else ():
    for text in config.methods:
      searched_before(run.config, text, budget)


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
  found += [_trained_row(run, text) for text in config.finetuned]
  cloud, random = [], {}
  for budget in config.budgets if config.random_schedules else ():
    points = random_schedules.points(run, budget)
    random[f"{budget:g}"] = rows.rank(run, Row(method=SEARCHED, budget=budget), points)
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
  """Measures a plan that the config names."""
  plan = load_plan(name)
  row = Row(method=table.method_of(plan), plan=name)
  model = plan.layers_for(run.inputs.spec), run.artefacts.dense_params
  return rows.measured(run, row, [model])


def _method_row(run: Run, text: str, budget: float) -> Row:
  """Measures a method with the run's weights; a search as the mean over its seeds."""
  (method, config), spec, seed = parse(text, run.config), run.inputs.spec, None
  if method in schedules():
    layers = [within(method, spec, run.inputs.gmacs_of(budget), config.search.importance)]
  else:
    plans = _plans(run, text, config, budget)
    layers, seed = [plan.layers_for(spec) for plan in plans], table.seed_of(plans[0])
  row = Row(method=text, budget=budget, seed=seed)
  models = [(of_plan, run.artefacts.dense_params) for of_plan in layers]
  return rows.measured(run, row, models, _reference(run, budget))


def _reference(run: Run, budget: float) -> Row:
  """Returns the search's row at a budget; without a search, that of the first plan."""
  config = run.config.compare
  if SEARCHED in config.methods or not config.plans:
    return Row(method=SEARCHED, budget=budget)
  return Row(method=SEARCHED, plan=config.plans[0])


def _plans(run: Run, text: str, config: Config, budget: float) -> list[Plan]:
  """Returns the plans of a search, one per seed: from an earlier comparison, or searched now."""
  if config.compare.searched:
    return [load_plan(str(path)) for path in searched_before(run.config, text, budget)]
  found = []
  for seed in range(config.seed, config.seed + config.compare.seeds):
    name = f"{text}@{budget:g}-seed{seed}"
    child = _child(run, name, dataclasses.replace(config, seed=seed), ("search",), budget)
    plan = search.made(child)
    save_plan(plan, _plan_path(run, name))
    found.append(plan)
  return found


def _trained_row(run: Run, text: str) -> Row:
  """Measures a method with weights trained under its layers."""
  budget = run.config.compare.finetune_budget
  row = Row(method=text, budget=budget, variant="finetune")
  reference = dataclasses.replace(row, method=SEARCHED)
  return rows.measured(run, row, [_trained(run, row)], reference)


def _trained(run: Run, row: Row) -> Model:
  (method, config), budget = parse(row.method, run.config), run.config.compare.finetune_budget
  first: Stage = "slim" if method == SLIMMED else "search"
  stages: tuple[Stage, ...] = (first, "finetune")
  if method in schedules():
    path, stages, spec = _plan_path(run, row.name), ("finetune",), run.inputs.spec
    layers = within(method, spec, run.inputs.gmacs_of(budget), config.search.importance)
    save_plan(make_plan(spec, layers, {"method": method}), path)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, plan=str(path)))
  child = _child(run, row.name, config, stages, budget)
  return child.artefacts.layers, child.artefacts.params


def _child(run: Run, name: str, config: Config, stages: tuple[Stage, ...], budget: float) -> Run:
  config = dataclasses.replace(config, stages=stages, budget=BudgetConfig(fraction=budget))
  return finished_child(run, name, config, _STAGES)


def _plan_path(run: Run, name: str) -> pathlib.Path:
  folder = run.workdir.path / "plans"
  folder.mkdir(exist_ok=True)
  return folder / f"{name}.json"
