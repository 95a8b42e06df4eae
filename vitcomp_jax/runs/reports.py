"""Draws and reports the results of a run so far."""

from collections.abc import Mapping, Sequence

from vitcomp_jax.data.dataset import Batch
from vitcomp_jax.models.spec import LayerSpec
from vitcomp_jax.reporting import report, run_plots
from vitcomp_jax.reporting.report import Findings
from vitcomp_jax.results import BenchmarkResult, Row, SearchResult, SlimResult
from vitcomp_jax.runs.run import Run
from vitcomp_jax.runs.table import result_so_far


def draw(run: Run, models: Mapping[str, tuple[LayerSpec, ...]], rows: Sequence[Row]) -> None:
  """Writes the plots for which the run has results.

  Args:
    run: The run, whose `figures/` holds the plots.
    models: Layers by row name.
    rows: Measured rows.
  """
  inputs, path, plan = run.inputs, run.workdir.path, run.artefacts.plan
  folder = path / "figures"
  run_plots.draw_schedules(folder, inputs.spec, models)
  if run.workdir.is_finished("search"):
    run_plots.draw_search(folder, path, inputs.targets, inputs.cost)
  if plan and plan.indices:
    run_plots.draw_slimming(folder, inputs.spec, plan)
    if slim := run.workdir.finished("slim", SlimResult):
      run_plots.draw_masks(folder, path, slim)
  run_plots.draw_accuracy(folder, rows)


def write_report(run: Run, complete: bool = False) -> None:
  """Writes the report on the results and plots so far.

  Args:
    run: The run.
    complete: Whether the stage `visualize` has drawn all plots.
  """
  workdir, plan, spec = run.workdir, run.artefacts.plan, run.inputs.spec
  benchmark = workdir.path / "benchmark.json"
  found = Findings(
    plan=plan,
    counts=run_plots.kept_counts(spec, run.artefacts.layers) if plan else (),
    search=workdir.finished("search", SearchResult),
    slim=workdir.finished("slim", SlimResult),
    benchmark=BenchmarkResult.read(benchmark) if benchmark.exists() else None,
  )
  complete = complete or workdir.is_finished("visualize")
  report.write_report(workdir.path, result_so_far(run), found, complete)


def titles(run: Run, batch: Batch) -> list[str] | None:
  """Returns the class names of images; None if they have no labels."""
  data = run.inputs.eval_data
  names = run.inputs.class_names or data.class_names
  return [names[label] for label in batch["label"]] if data.has_labels else None
