"""Stage `compare`: one table of methods and budgets, on the same weights and the same examples.

Whatever a method has to learn, it learns in a run of its own in `compare/NAME` of the workdir.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vitcomp_jax import multihost, paths, scoring
from vitcomp_jax.atomic import replacing, write_json
from vitcomp_jax.comparison import random_schedules
from vitcomp_jax.config import (
  BudgetConfig,
  Config,
  Stage,
  from_config_dict,
  to_dict,
  with_overrides,
)
from vitcomp_jax.cost import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.registry import schedules, untrained_schedules, within
from vitcomp_jax.models.build import build
from vitcomp_jax.models.spec import LayerSpec
from vitcomp_jax.ownership import owned
from vitcomp_jax.plans import load_plan, make_plan, save_plan
from vitcomp_jax.reporting import plots, report
from vitcomp_jax.runs.run import Run, open_run, read_json
from vitcomp_jax.scoring import Outcomes
from vitcomp_jax.stages import evaluate, finetune, search, slim
from vitcomp_jax.weights.loading import Params

_STAGES = {"search": search.search, "slim": slim.slim, "finetune": finetune.finetune}
_REFERENCE = "diffrate"
_PAIRED = ("top1", "loss")
_METHOD = re.compile(r"(\w+)(?:\[([^\[\]]+)\])?")

Model = tuple[tuple[LayerSpec, ...], Params]


def check(run: Run) -> None:
  """Refuses methods that do not exist or cannot be compared as asked for."""
  config = run.config.compare
  run.check_trainable("compare")
  run.open_data("eval")
  for key, methods, more in (
    ("methods", config.methods, ("diffrate",)),
    ("finetuned", config.finetuned, ("diffrate", "vit_slim")),
  ):
    for text in methods:
      name, parsed = _parsed(text, run.config)
      run.spec.importance(parsed.search.importance)  # raises
      if name not in {*schedules(), *more}:
        known = ", ".join((*more, *schedules()))
        raise UserError(f"config.compare.{key}: expected some of {known}, got {text}.")
      if key == "methods" and name not in (*more, *untrained_schedules()):
        raise UserError(
          f"config.compare.methods: {name} has to be trained; name it in `finetuned`."
        )
  if config.random_schedules:
    run.spec.check_plain("config.compare.random_schedules")
  if config.random_schedules and jax.process_count() > 1:
    raise UserError(
      "config.compare.random_schedules: expected 0 with several processes; measure them in one."
    )
  for name in config.plans:
    load_plan(name).layers_for(run.spec)
  for budget in config.budgets if config.searched else ():
    for text in config.methods:
      _searched_before(run, text, budget)


def _parsed(text: str, config: Config) -> tuple[str, Config]:
  """A method's name, and the config with the keys that stand in brackets behind it."""
  match = _METHOD.fullmatch(text)
  if not match:
    raise UserError(
      f"config.compare: expected a method such as diffrate[importance=cls], got {text!r}."
    )
  name, changes = match.groups()
  overrides = {}
  for change in changes.split(",") if changes else ():
    key, _, value = change.partition("=")
    overrides[key if "." in key else f"search.{key}"] = value
  return name, from_config_dict(with_overrides(to_dict(config), overrides))


def compare(run: Run) -> dict[str, Any]:
  """Measures every method at every budget, and writes `result.json`, `report.md` and a figure.

  Returns:
    The content of `result.json`.
  """
  config, spec = run.config.compare, run.spec
  rows = [_row(run, "dense", [(spec.dense_layers, run.dense_params)])]
  for name in config.plans:
    layers = load_plan(name).layers_for(spec)
    rows.append(_row(run, name, [(layers, run.dense_params)]))
  searches = _REFERENCE in config.methods or not config.plans
  for budget in config.budgets:
    reference = f"{_REFERENCE}@{budget:g}" if searches else config.plans[0]
    for method in config.methods:
      models = _off_the_shelf(run, method, budget)
      rows.append(_row(run, f"{method}@{budget:g}", models, reference))
  for method in config.finetuned:
    name = f"+finetune@{config.finetune_budget:g}"
    rows.append(_row(run, method + name, [_trained(run, method)], _REFERENCE + name))
  clouds = {}
  if config.random_schedules:
    folder = _made(run.workdir / "compare")
    for budget in config.budgets:
      path = folder / f"random@{budget:g}.jsonl"
      clouds[budget] = random_schedules.points(run, _gmacs(run, budget), path)
  result = {
    **evaluate.empty_result(run),
    "rows": rows,
    "random": {f"{budget:g}": _rank(run, budget, points) for budget, points in clouds.items()},
  }
  write_json(run.workdir / "result.json", result)
  points = [(p["gmacs"], p["top1"]) for c in clouds.values() for p in c]
  figure = plots.accuracy_against_gmacs(rows, points)
  plots.save(figure, run.workdir / "figures", "accuracy")
  report.write_comparison(run.workdir, result)
  return result


def made(run: Run) -> dict[str, Any]:
  """The content of `result.json`."""
  return read_json(run.workdir / "result.json")


def _off_the_shelf(run: Run, text: str, budget: float) -> list[Model]:
  """The layers of a method with the run's own weights; of a search, one for each seed."""
  method, config = _parsed(text, run.config)
  if method in schedules():
    layers = within(method, run.spec, _gmacs(run, budget), config.search.importance)
    return [(layers, run.dense_params)]
  if config.compare.searched:
    plans = [load_plan(str(path)) for path in _searched_before(run, text, budget)]
    return [(plan.layers_for(run.spec), run.dense_params) for plan in plans]
  models = []
  for seed in range(config.seed, config.seed + config.compare.seeds):
    name = f"{text}@{budget:g}-seed{seed}"
    child = _child(run, name, dataclasses.replace(config, seed=seed), ("search",), budget)
    assert child.plan is not None
    save_plan(child.plan, _made(run.workdir / "plans") / f"{name}.json")
    models.append((child.layers, run.dense_params))
  return models


def _searched_before(run: Run, text: str, budget: float) -> list[pathlib.Path]:
  """The plans that an earlier comparison found for a method that searches.

  Raises:
    UserError: If there are none.
  """
  folder = pathlib.Path(paths.expand(run.config.compare.searched or ""))
  if _parsed(text, run.config)[0] in schedules():
    return []
  # Not `glob`, to which the brackets of a method mean something.
  start = f"{text}@{budget:g}-seed"
  names = (
    [path for path in folder.iterdir() if path.name.startswith(start)] if (folder.is_dir()) else []
  )
  if not names:
    raise UserError(
      f"config.compare.searched: expected plans {start}*.json in {folder}, got none; leave it out "
      "to search."
    )
  return sorted(names)


def _trained(run: Run, text: str) -> Model:
  """The layers of a method, and weights that were trained under them."""
  method, config = _parsed(text, run.config)
  budget = config.compare.finetune_budget
  name = f"{text}+finetune@{budget:g}"
  if method in schedules():
    path = _made(run.workdir / "plans") / f"{name}.json"
    layers = within(method, run.spec, _gmacs(run, budget), config.search.importance)
    save_plan(make_plan(run.spec, layers, {"method": method}), path)
    model = dataclasses.replace(config.model, plan=str(path))
    child = _child(run, name, dataclasses.replace(config, model=model), ("finetune",), budget)
  else:
    first: Stage = "slim" if method == "vit_slim" else "search"
    child = _child(run, name, config, (first, "finetune"), budget)
  return child.layers, child.params


def _child(run: Run, name: str, config: Config, stages: tuple[Stage, ...], budget: float) -> Run:
  """A run of its own at a budget, which goes on where it was cut off."""
  config = dataclasses.replace(config, stages=stages, budget=BudgetConfig(fraction=budget))
  workdir = run.workdir / "compare" / name
  with owned(workdir):
    child = open_run(config, workdir, stages)
    child.begin()
    for stage in stages:
      if child.finished(stage) is None:
        child.finish(stage, _STAGES[stage](child))
  return child


def _gmacs(run: Run, budget: float) -> float:
  return budget * macs.static_macs(run.spec, run.spec.dense_layers) / 1e9


def _row(
  run: Run, name: str, models: Sequence[Model], reference: str | None = None
) -> dict[str, Any]:
  """Means over examples and seeds, their standard errors, and the paired difference from a row.

  The standard error is that of the examples: what other test images would have changed.
  """
  found = [
    _outcomes(run, f"{name}-{i}" if len(models) > 1 else name, *model)
    for i, model in enumerate(models)
  ]
  mean = {key: np.mean([f[key] for f in found], axis=0) for key in found[0]}
  _save(_path(run, f"{name}.mean"), mean)
  row = scoring.row(mean, build(run.spec, models[0][0]), name)
  for key in _PAIRED:
    row |= _standard_error(key, mean[key])
  if len(models) > 1:
    row["top1_of_seeds"] = [round(float(f["top1"].mean()), 4) for f in found]
  path = _path(run, f"{reference}.mean")
  if reference and reference != name and path.exists():
    row["reference"] = reference
    with np.load(path) as other:
      for key in _PAIRED:
        difference = mean[key] - other[key]
        row[f"{key}_over_reference"] = round(float(difference.mean()), 6)
        row |= _standard_error(f"{key}_over_reference", difference)
  return row


def _standard_error(key: str, values: np.ndarray) -> dict[str, float]:
  """By its key in a row; a single example has none."""
  if values.size < 2:
    return {}
  return {
    f"{key}_se": round(float(values.std(ddof=1, dtype=np.float64) / math.sqrt(values.size)), 6)
  }


def _outcomes(run: Run, name: str, layers: tuple[LayerSpec, ...], params: Params) -> Outcomes:
  """Measured once, then kept."""
  path = _path(run, name)
  if not path.exists():
    _save(path, scoring.outcomes(build(run.spec, layers), params, run, name))
  with np.load(path) as arrays:
    return dict(arrays)


def _save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  with replacing(path) as unfinished, unfinished.open("wb") as stream:
    np.savez_compressed(stream, allow_pickle=False, **arrays)
  multihost.meet(f"saved {path.name}")  # or another process would look for it too early


def _path(run: Run, name: str) -> pathlib.Path:
  """Returns the file of a row's outcomes; a plan's name may be a path itself."""
  return _made(run.workdir / "compare" / "outcomes") / f"{name.replace('/', ':')}.npz"


def _made(folder: pathlib.Path) -> pathlib.Path:
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def _rank(run: Run, budget: float, points: Sequence[Mapping[str, float]]) -> dict[str, Any]:
  """Summarises random schedules, and the share that the search beats on the same examples."""
  values = {key: np.array([point[key] for point in points]) for key in _PAIRED}
  examples = min(run.config.compare.random_examples, run.eval_data.num_examples)
  summary: dict[str, Any] = {"schedules": len(points), "examples": examples}
  for key, found in values.items():
    summary[key] = {q: round(float(np.quantile(found, q)), 4) for q in (0.01, 0.5, 0.99)}
  path = _path(run, f"{_REFERENCE}@{budget:g}.mean")
  if path.exists():
    with np.load(path) as arrays:
      mine = {key: float(arrays[key][:examples].mean()) for key in _PAIRED}
    summary[_REFERENCE] = {key: round(value, 4) for key, value in mine.items()}
    summary["beaten_by_top1"] = round(float(np.mean(values["top1"] < mine["top1"])), 4)
    summary["beaten_by_loss"] = round(float(np.mean(values["loss"] > mine["loss"])), 4)
  return summary
