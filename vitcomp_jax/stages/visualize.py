"""Stage `visualize`: all figures that the run has something for, and the report that holds them."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitcomp_jax import api, multihost, paths, scoring
from vitcomp_jax.data.transforms import normalize
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.build import build
from vitcomp_jax.models.spec import removes_tokens
from vitcomp_jax.plans import load_plan
from vitcomp_jax.reporting import model_plots, plots, report, run_plots
from vitcomp_jax.reporting.published import NUM_CLASSES, accuracies
from vitcomp_jax.runs.run import Run
from vitcomp_jax.stages import evaluate
from vitcomp_jax.stages.evaluate import Row

_MOST_LAYERS = 14  # with the image itself, three lines of pictures


def check(run: Run) -> None:
  """Refuses what `evaluate` refuses, plans for another model, and layers that do not exist."""
  evaluate.check(run)
  for name in run.config.visualize.plans:
    load_plan(name).layers_for(run.spec)
  beyond = [layer for layer in run.config.visualize.layers if layer > run.spec.depth]
  if beyond:
    raise UserError(
      f"config.visualize.layers: expected layers from 1 to {run.spec.depth}, got {beyond[0]}."
    )


def visualize(run: Run) -> dict[str, Any]:
  """Draws the figures, as PNG and SVG, and writes `report.md` and `report.html`.

  Returns:
    The names of the figures in `figures/`.

  Raises:
    UserError: If the outputs of the model whose inside is drawn are not finite.
  """
  measured = evaluate.result_so_far(run)["rows"]
  rows = evaluate.rows_of(run) | _compared(run)
  models = {name: row.layers for name, row in rows.items()}
  # A comparison has drawn its rows itself, among random schedules.
  run_plots.draw(run, models, [] if run.finished("compare") else measured)
  _draw_plans(run, models)
  _draw_published(run, measured)
  _draw_images(run, rows)
  multihost.meet("drawn")
  _write_report(run)
  return {"figures": sorted(path.stem for path in (run.workdir / "figures").glob("*.svg"))}


def made(run: Run) -> pathlib.Path:
  """The path of `report.html`."""
  return run.workdir / "report.html"


def _write_report(run: Run) -> None:
  """The comparison's report, or that of the other stages."""
  if run.finished("compare") is None:
    evaluate.write_report(run, complete=True)
  else:
    report.write_comparison(run.workdir, evaluate.made(run), complete=True)


def _compared(run: Run) -> dict[str, Row]:
  """Returns the plans of the first seed of a comparison's searches, by row name."""
  if run.finished("compare") is None:
    return {}
  config = run.config
  searched = config.compare.searched
  folder = pathlib.Path(paths.expand(searched)) if searched else run.workdir / "plans"
  ending = f"-seed{config.seed}.json"
  plans = {p.name.removesuffix(ending): p for p in folder.iterdir() if p.name.endswith(ending)}
  names = [row["name"] for row in evaluate.made(run)["rows"] if row["name"] in plans]
  layers = {name: load_plan(str(plans[name])).layers_for(run.spec) for name in names}
  return {name: Row(layers[name], run.dense_params) for name in names}


def _draw_plans(run: Run, models: Mapping[str, run_plots.Layers]) -> None:
  """The run's schedules beside those of other plans."""
  others = {name: load_plan(name).layers_for(run.spec) for name in run.config.visualize.plans}
  schedules = run_plots.schedules_of(run.spec, {**models, **others})
  if others and schedules:
    figure = plots.schedules(schedules, run.spec.num_tokens)
    plots.save(figure, run.workdir / "figures", "plans")


def _draw_published(run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
  """The rows beside what was published of the same model, if they are of the same task."""
  data = run.eval_data
  if run.config.visualize.published and data.name != "fake" and data.num_present == NUM_CLASSES:
    known = accuracies(run.spec)
    if known:
      figure = plots.accuracy_against_gmacs(rows, published=known)
      plots.save(figure, run.workdir / "figures", "published")


def _removing(run: Run, row: Row) -> list[int]:
  """The layers after which there are fewer tokens than before, from 1."""
  num_tokens = run.spec.num_tokens
  left = plots.tokens_left(run_plots.kept_counts(run.spec, row.layers), num_tokens)
  before = [num_tokens, *(after for _, after in left)]
  return [i for i, (_, after) in enumerate(left, 1) if after < before[i - 1]]


def _some(layers: Sequence[int]) -> list[int]:
  """Returns all layers, or evenly spaced ones, as many as a plot shows."""
  return [layers[i - 1] for i in model_plots.spaced(len(layers), min(_MOST_LAYERS, len(layers)))]


def _draw_images(run: Run, rows: Mapping[str, Row]) -> None:
  """Draws what the plan in force, or the first model that removes tokens, does to images."""
  config, folder = run.config.visualize, run.workdir / "figures"
  batch = run.eval_data.sample(config.images) if config.images else None
  if batch is None or not rows:
    return
  reduced = [name for name, row in rows.items() if removes_tokens(row.layers)]
  name = evaluate.plan_name(run, run.plan) if run.plan else [*reduced, *rows][0]
  row = rows[name]
  model, images = build(run.spec, row.layers), batch["image"]
  outputs = api.apply(model, row.params, normalize(images, run.preprocess))
  scoring.check_finite(np.asarray(outputs), f"stage visualize: row {name}")
  about = f"Model: {name}."
  shown = model, row.params, images, evaluate.titles(run, batch)
  if name in reduced:
    layers = config.layers or _some(_removing(run, row))
    plots.save(model_plots.token_maps(*shown, layers, about), folder, "token_maps_by_layer")
  layers = config.layers or _some(range(1, run.spec.depth + 1))
  plots.save(model_plots.cls_attention(*shown, layers, about), folder, "attention")
