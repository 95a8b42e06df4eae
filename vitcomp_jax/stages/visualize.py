"""Stage `visualize`: draws every plot for which the run has results, and writes the report."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from vitcomp_jax import api, multihost, paths, scoring
from vitcomp_jax.comparison.methods import file_name
from vitcomp_jax.data.transforms import normalize
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.build import build
from vitcomp_jax.models.spec import LayerSpec, ViTSpec, removes_tokens
from vitcomp_jax.plans import load_plan
from vitcomp_jax.reporting import model_plots, plots, report, run_plots
from vitcomp_jax.reporting.published import NUM_CLASSES, published_accuracies
from vitcomp_jax.results import Result, Row, VisualizeResult
from vitcomp_jax.runs import reports, table
from vitcomp_jax.runs.run import Run
from vitcomp_jax.runs.table import Candidate
from vitcomp_jax.stages import evaluate

_MOST_LAYERS = 14  # with the image itself, three rows of pictures


def check(run: Run) -> None:
  """Rejects what `evaluate` rejects, plans for another model, and layers that do not exist."""
  evaluate.check(run)
  for name in run.config.visualize.plans:
    load_plan(name).layers_for(run.inputs.spec)
  depth = run.inputs.spec.depth
  beyond = [layer for layer in run.config.visualize.layers if layer > depth]
  if beyond:
    raise UserError(f"config.visualize.layers: expected layers from 1 to {depth}, got {beyond[0]}.")


def run(run: Run) -> VisualizeResult:
  """Draws the plots as PNG and SVG, and writes `report.md` and `report.html`.

  Returns:
    The names of the plots in `figures/`.

  Raises:
    UserError: If the outputs of the drawn model are not finite.
  """
  rows = table.result_so_far(run).rows
  candidates = table.candidates(run) | _compared(run)
  models = {name: candidate.layers for name, candidate in candidates.items()}
  # The stage `compare` has already drawn its own rows, with the random schedules.
  reports.draw(run, models, () if run.workdir.is_finished("compare") else rows)
  _draw_plans(run, models)
  _draw_published(run, rows)
  _draw_images(run, candidates)
  multihost.meet("drawn")
  _write_report(run)
  plotted = (run.workdir.path / "figures").glob("*.svg")
  return VisualizeResult(tuple(sorted(path.stem for path in plotted)))


def made(run: Run) -> pathlib.Path:
  """Returns the path of `report.html`."""
  return run.workdir.path / "report.html"


def _write_report(run: Run) -> None:
  """Writes the report of the comparison if there is one, or else that of the other stages."""
  if compared := run.workdir.finished("compare", Result):
    report.write_comparison(run.workdir.path, compared, complete=True)
  else:
    reports.write_report(run, complete=True)


def _compared(run: Run) -> dict[str, Candidate]:
  """Returns the models that a comparison's searches found with the first seed, by row name."""
  compared, config = run.workdir.finished("compare", Result), run.config
  if compared is None:
    return {}
  searched = config.compare.searched
  folder = pathlib.Path(paths.expand(searched)) if searched else run.workdir.path / "plans"
  found = {}
  for row in compared.rows:
    path = folder / f"{file_name(row.name)}-seed{config.seed}.json"
    plan = load_plan(str(path)) if path.is_file() else None
    if plan and not plan.has_own_widths:  # such a plan's weights stay with its search
      layers = plan.layers_for(run.inputs.spec)
      found[row.name] = Candidate(row, layers, run.artefacts.dense_params)
  return found


def _draw_plans(run: Run, models: Mapping[str, tuple[LayerSpec, ...]]) -> None:
  """Draws the run's schedules together with those of the other plans."""
  spec = run.inputs.spec
  others = {name: load_plan(name).layers_for(spec) for name in run.config.visualize.plans}
  schedules = run_plots.schedules_of(spec, {**models, **others})
  if others and schedules:
    figure = plots.schedules(schedules, spec.num_tokens)
    plots.save(figure, run.workdir.path / "figures", "plans")


def _draw_published(run: Run, rows: Sequence[Row]) -> None:
  """Draws the rows together with published results for the same model and task."""
  data = run.inputs.eval_data
  if run.config.visualize.published and data.name != "fake" and data.num_present == NUM_CLASSES:
    known = published_accuracies(run.inputs.spec)
    if known:
      figure = plots.accuracy_against_gmacs(rows, published=known)
      plots.save(figure, run.workdir.path / "figures", "published")


def _draw_images(run: Run, candidates: Mapping[str, Candidate]) -> None:
  """Draws token and attention maps of the current plan, or of the first that removes tokens."""
  inputs, config = run.inputs, run.config.visualize
  folder = run.workdir.path / "figures"
  if not config.images or not candidates:
    return
  batch, chosen = inputs.eval_data.sample(config.images), _shown(run, candidates)
  model, images = build(inputs.spec, chosen.layers), batch["image"]
  outputs = api.apply(model, chosen.params, normalize(images, inputs.preprocess))
  scoring.check_finite(np.asarray(outputs), f"stage visualize: row {chosen.name}")
  about = f"Model: {chosen.name}."
  shown = model, chosen.params, images, reports.titles(run, batch)
  if removes_tokens(chosen.layers):
    layers = config.layers or _some(_removing(inputs.spec, chosen.layers))
    plots.save(model_plots.token_maps(*shown, layers, about), folder, "token_maps_by_layer")
  layers = config.layers or _some(range(1, inputs.spec.depth + 1))
  plots.save(model_plots.cls_attention(*shown, layers, about), folder, "attention")


def _shown(run: Run, candidates: Mapping[str, Candidate]) -> Candidate:
  """Returns the model whose maps are drawn."""
  if run.artefacts.plan:
    return candidates[table.plan_row(run, run.artefacts.plan).name]
  reduced = [found for found in candidates.values() if removes_tokens(found.layers)]
  return [*reduced, *candidates.values()][0]


def _removing(spec: ViTSpec, layers: tuple[LayerSpec, ...]) -> list[int]:
  """Returns the layers that remove tokens, counted from 1."""
  left = plots.tokens_left(run_plots.kept_counts(spec, layers), spec.num_tokens)
  before, found = spec.num_tokens, []
  for layer, (_, after) in enumerate(left, 1):
    if after < before:
      found.append(layer)
    before = after
  return found


def _some(layers: Sequence[int]) -> list[int]:
  """Returns all layers, or as many evenly spaced ones as fit in a plot."""
  return [layers[i - 1] for i in model_plots.spaced(len(layers), min(_MOST_LAYERS, len(layers)))]
