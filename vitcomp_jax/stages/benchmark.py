"""Stage `benchmark`: times the dense and compressed models, relative to the device's peak."""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax import strict_json
from vitcomp_jax.api import count_cost
from vitcomp_jax.cost.cost_models import Latency
from vitcomp_jax.cost.timing import Subject, compiled, take_turns
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.build import build
from vitcomp_jax.results import BenchmarkResult, Timing, environment
from vitcomp_jax.runs import reports, table
from vitcomp_jax.runs.run import Run
from vitcomp_jax.runs.table import Candidate

_PERCENTILES = (50, 90, 99)
_PEAK_SIDE = 2048  # side of the square matrices whose product measures the peak


def check(run: Run) -> None:
  """Rejects a plan that does not fit the model, and an empty table."""
  if not run.config.benchmark.batch_sizes and run.config.budget.latency_ms is None:
    raise UserError("config.benchmark.batch_sizes: expected at least one batch size, got none.")
  if run.artefacts.plan:
    run.artefacts.plan.layers_for(run.inputs.spec)
  elif not run.config.evaluate.dense and not {"search", "slim"} & set(run.config.stages):
    raise UserError("stage benchmark: expected a dense model or a plan to time, got none.")


def run(run: Run) -> BenchmarkResult:
  """Times every model at every batch size, in turns, so that drift affects all equally.

  Returns:
    The content of `benchmark.json`. The images per second are also added to `result.json`.
  """
  config, candidates = run.config.benchmark, table.deployed(run)
  subjects = _subjects(run, candidates)
  take_turns(subjects, config.seconds, config.rounds)
  peak, gmacs = matmul_peak(), {}
  for name, candidate in candidates.items():
    gmacs[name] = count_cost(build(run.inputs.spec, candidate.layers)).gmacs
  entries = [_entry(subject, subjects, gmacs, peak) for subject in subjects]
  result = BenchmarkResult(
    **environment(),
    matmul_peak_gflops=round(peak / 1e9, 1),
    entries=tuple(_with_prediction(run, entry, candidates[entry.name]) for entry in entries),
  )
  result.write(run.workdir.path / "benchmark.json")
  _add_to_result(run, result.entries, candidates)
  reports.write_report(run)
  return result


def made(run: Run) -> dict[str, Any]:
  """Returns the content of `benchmark.json`."""
  return strict_json.read(run.workdir.path / "benchmark.json")


def _subjects(run: Run, candidates: Mapping[str, Candidate]) -> list[Subject]:
  """Compiles every model at every batch size, and at that of a latency budget, for its runtime."""
  budget = run.config.budget
  wanted = {(batch, "jax") for batch in run.config.benchmark.batch_sizes}
  if budget.latency_ms is not None:
    wanted.add((budget.latency_batch, budget.runtime))
  found = []
  for batch, runtime in sorted(wanted):
    for name, candidate in candidates.items():
      model = build(run.inputs.spec, candidate.layers)
      found.append(compiled(name, model, candidate.params, batch, runtime))
  return found


def matmul_peak() -> float:
  """Measures the floating-point operations per second of a large float32 matrix product.

  Returns:
    The best of ten measurements.
  """
  side = _PEAK_SIDE
  a, b = jax.random.normal(jax.random.key(0), (2, side, side))
  product = jax.jit(jnp.matmul)
  product(a, b).block_until_ready()
  times = []
  for _ in range(10):
    begin = time.perf_counter()
    product(a, b).block_until_ready()
    times.append(time.perf_counter() - begin)
  return 2 * side**3 / min(times)


def _entry(
  subject: Subject, subjects: Sequence[Subject], gmacs: Mapping[str, float], peak: float
) -> Timing:
  """Returns one entry of `benchmark.json`."""
  mine, median = gmacs[subject.name], statistics.median(subject.seconds)
  low, high = np.percentile(subject.seconds, (25, 75))
  latency_ms = {}
  for percent in _PERCENTILES:
    latency_ms[f"p{percent}"] = round(1e3 * float(np.percentile(subject.seconds, percent)), 3)
  entry = Timing(
    name=subject.name,
    batch=subject.batch,
    images_per_second=round(subject.batch / median, 2),
    spread=round(float(high - low) / median, 4),
    latency_ms=latency_ms,
    timings=len(subject.seconds),
    compile_s=round(subject.compile_s, 2),
    first_step_s=round(subject.first_s, 3),
    memory_mb=None if subject.peak_bytes is None else round(subject.peak_bytes / 2**20, 1),
    runtime=subject.runtime,
    gmacs=round(mine, 6),
    share_of_peak=round(2e9 * mine * subject.batch / median / peak, 4),
  )
  same = subject.batch, subject.runtime
  dense = [s for s in subjects if s.name == "dense" and (s.batch, s.runtime) == same]
  if not dense or subject.name == "dense":
    return entry
  promised = gmacs["dense"] / mine
  speed_up = statistics.median(dense[0].seconds) / median
  return dataclasses.replace(
    entry,
    promised=round(promised, 4),
    speed_up=round(speed_up, 4),
    share_of_promise=round(speed_up / promised, 4),
  )


def _with_prediction(run: Run, entry: Timing, candidate: Candidate) -> Timing:
  """Adds the latency predicted by the latency table of this run's search, if there was one."""
  cost = run.inputs.cost if run.workdir.is_finished("search") else None
  if not isinstance(cost, Latency):
    return entry
  if (entry.batch, entry.runtime) != (cost.about["batch"], cost.runtime):
    return entry
  predicted = cost.static(run.inputs.spec, candidate.layers)
  return dataclasses.replace(entry, predicted_ms=round(predicted, 3))


def _add_to_result(
  run: Run, entries: Sequence[Timing], candidates: Mapping[str, Candidate]
) -> None:
  """Adds speeds to the rows of `result.json`, and adds rows that are missing."""
  result = table.result_so_far(run)
  rows = result.by_name
  for name, candidate in candidates.items():
    cost = count_cost(build(run.inputs.spec, candidate.layers))
    rows[name] = dataclasses.replace(
      rows.get(name, candidate.row),
      gmacs=round(cost.gmacs, 6),
      params_m=round(cost.params / 1e6, 4),
      images_per_second={
        str(entry.batch): entry.images_per_second
        for entry in entries
        if entry.name == name and entry.runtime == "jax"
      },
    )
  result = dataclasses.replace(result, rows=tuple(rows.values()))
  result.write(run.workdir.path / "result.json")
