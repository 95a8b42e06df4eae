"""Rows of a comparison: means over examples and seeds, and paired differences.

Measurements are stored per example, and are not repeated.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from vitcomp_jax import multihost, scoring
from vitcomp_jax.atomic import replacing
from vitcomp_jax.comparison.methods import file_name
from vitcomp_jax.comparison.random_schedules import Point
from vitcomp_jax.models.build import build
from vitcomp_jax.models.spec import LayerSpec
from vitcomp_jax.results import RandomSchedules, Row
from vitcomp_jax.runs import table
from vitcomp_jax.runs.run import Run
from vitcomp_jax.scoring import PAIRED, Outcomes, standard_error
from vitcomp_jax.weights.loading import Params

Model = tuple[tuple[LayerSpec, ...], Params]

_QUANTILES = (0.01, 0.5, 0.99)


def measured(run: Run, row: Row, models: Sequence[Model]) -> Row:
  """Measures a row.

  Args:
    run: The run, which holds the examples.
    row: Row without metrics.
    models: Models to average: one, or one per seed.

  Returns:
    The row with means, and their standard errors over the examples.
  """
  found = []
  for i, model in enumerate(models):
    name = f"{row.name}-{i}" if len(models) > 1 else row.name
    found.append(_outcomes(run, name, *model))
  mean = {key: np.mean([one[key] for one in found], axis=0) for key in found[0]}
  _save(_mean_path(run, row), mean)
  row = scoring.measured(row, mean, build(run.inputs.spec, models[0][0]))
  if len(models) > 1:
    of_seeds = tuple(round(float(one["top1"].mean()), 4) for one in found)
    row = dataclasses.replace(row, top1_of_seeds=of_seeds)
  return row


def with_differences(run: Run, row: Row, reference: Row, called: str) -> Row:
  """Returns a measured row with its paired differences from another row.

  Args:
    run: The run, which holds the examples.
    row: The row.
    reference: Row to compute differences from.
    called: Name of the reference in the fields of the row: `dense` or `reference`.
  """
  mean, other = _read(_mean_path(run, row)), _read(_mean_path(run, reference))
  differences: dict[str, float | None] = {}
  for key in PAIRED:
    difference = mean[key] - other[key]
    differences[f"{key}_over_{called}"] = round(float(difference.mean()), 6)
    differences[f"{key}_over_{called}_se"] = standard_error(difference)
  return row.with_metrics(differences)


def rank(run: Run, searched: Row | None, points: Sequence[Point]) -> RandomSchedules:
  """Summarises random schedules, and the share of them that a search beats on the same examples.

  Args:
    run: The run, which holds the examples.
    searched: Measured row of the search; None: there was no search.
    points: Result of `random_schedules.points`.
  """
  values = {key: np.array([point[key] for point in points]) for key in PAIRED}
  examples = min(run.config.compare.random_examples, run.inputs.eval_data.num_examples)
  summary = RandomSchedules(
    len(points), examples, _quantiles(values["top1"]), _quantiles(values["loss"])
  )
  if searched is None:
    return summary
  mean = _read(_mean_path(run, searched))
  mine = {key: float(mean[key][:examples].mean()) for key in PAIRED}
  return dataclasses.replace(
    summary,
    diffrate={key: round(value, 4) for key, value in mine.items()},
    beaten_by_top1=round(float(np.mean(values["top1"] < mine["top1"])), 4),
    beaten_by_loss=round(float(np.mean(values["loss"] > mine["loss"])), 4),
  )


def _quantiles(values: np.ndarray) -> dict[str, float]:
  return {str(q): round(float(np.quantile(values, q)), 4) for q in _QUANTILES}


def _outcomes(run: Run, name: str, layers: tuple[LayerSpec, ...], params: Params) -> Outcomes:
  # The plan behind a name may be another one when a comparison is continued.
  layers_id = hashlib.sha256(repr(layers).encode()).hexdigest()[:8]
  path = _path(run, f"{name}.{layers_id}")
  if not path.exists():
    _save(path, table.outcomes(run, build(run.inputs.spec, layers), params, name))
  return _read(path)


def _read(path: pathlib.Path) -> Outcomes:
  with np.load(path) as arrays:
    return dict(arrays)


def _save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  with replacing(path) as unfinished, unfinished.open("wb") as stream:
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]  # no metric is called allow_pickle
  multihost.meet(f"saved {path.name}")  # before another process looks for it


def _mean_path(run: Run, row: Row) -> pathlib.Path:
  return _path(run, f"{row.name}.mean")


def _path(run: Run, name: str) -> pathlib.Path:
  """Returns the file of outcomes."""
  folder = run.workdir.path / "compare" / "outcomes"
  folder.mkdir(parents=True, exist_ok=True)
  return folder / f"{file_name(name)}.npz"
