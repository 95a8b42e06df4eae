"""Stage `benchmark`: how fast the dense and the compressed model are, and could be."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax.api import count_cost
from vitcomp_jax.atomic import write_json
from vitcomp_jax.cost.cost_models import Latency
from vitcomp_jax.cost.timing import Subject, compiled, take_turns
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.build import build
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.runs.run import Run, environment, read_json
from vitcomp_jax.stages import evaluate
from vitcomp_jax.weights.loading import Params

_PERCENTILES = (50, 90, 99)
_PEAK_SIDE = 2048  # of the square matrices whose product tells the machine's peak


def check(run: Run) -> None:
  """Refuses a plan that does not fit, and an empty table."""
  if run.plan:
    run.plan.layers_for(run.spec)
  elif not run.config.evaluate.dense and not {"search", "slim"} & set(run.config.stages):
    raise UserError("stage benchmark: expected a dense model or a plan to time, got none.")


def benchmark(run: Run) -> dict[str, Any]:
  """Times every model at every batch size; all take turns, so that drift hits all alike.

  Returns:
    The content of `benchmark.json`. `result.json` gets the images per second of its rows.
  """
  config = run.config.benchmark
  models = {}
  if run.config.evaluate.dense:
    models["dense"] = build(run.spec, run.spec.dense_layers), run.dense_params
  for name, plan in run.front.items():
    models[name] = build(run.spec, plan.layers_for(run.spec)), run.params_before_finetune
  if run.plan:
    models[evaluate.plan_name(run, run.plan)] = build(run.spec, run.layers), run.params
  batches = set(config.batch_sizes)
  if run.config.budget.latency_ms is not None:
    batches.add(run.config.budget.latency_batch)
  subjects = [
    compiled(name, model, params, batch)
    for batch in sorted(batches)
    for name, (model, params) in models.items()
  ]
  take_turns(subjects, config.seconds, config.rounds)
  peak = matmul_peak()
  gmacs = {name: count_cost(model).gmacs for name, (model, _) in models.items()}
  entries = [_entry(subject, subjects, gmacs, peak) for subject in subjects]
  _add_predictions(run, entries, models)
  result = {**environment(), "matmul_peak_gflops": round(peak / 1e9, 1), "entries": entries}
  write_json(run.workdir / "benchmark.json", result)
  _add_to_result(run, entries, models)
  evaluate.write_report(run)
  return result


def made(run: Run) -> dict[str, Any]:
  """The content of `benchmark.json`."""
  return read_json(run.workdir / "benchmark.json")


def matmul_peak() -> float:
  """The floating-point operations per second of a large float32 matrix product, the best of ten."""
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


def _add_predictions(
  run: Run, entries: Sequence[dict[str, Any]], models: dict[str, tuple[ViT, Params]]
) -> None:
  """The latencies that the table of a search foretold, where there was one, in milliseconds."""
  cost = run.cost if run.finished("search") else None
  if not isinstance(cost, Latency):
    return
  for entry in entries:
    if entry["batch"] == cost.about["batch"]:
      predicted = cost.static(run.spec, models[entry["name"]][0].layers)
      entry["predicted_ms"] = round(predicted, 3)


def _entry(
  subject: Subject, subjects: Sequence[Subject], gmacs: dict[str, float], peak: float
) -> dict[str, Any]:
  """One row of `benchmark.json`."""
  mine = gmacs[subject.name]
  median = statistics.median(subject.seconds)
  low, high = np.percentile(subject.seconds, (25, 75))
  percentiles = np.percentile(subject.seconds, _PERCENTILES)
  entry = {
    "name": subject.name,
    "batch": subject.batch,
    "images_per_second": round(subject.batch / median, 2),
    "spread": round(float(high - low) / median, 4),
    "latency_ms": {
      f"p{q}": round(1e3 * float(s), 3) for q, s in zip(_PERCENTILES, percentiles, strict=True)
    },
    "timings": len(subject.seconds),
    "compile_s": round(subject.compile_s, 2),
    "first_step_s": round(subject.first_s, 3),
    "memory_mb": round(subject.peak_bytes / 2**20, 1),
    "gmacs": round(mine, 6),
    "share_of_peak": round(2e9 * mine * subject.batch / median / peak, 4),
  }
  dense = [s for s in subjects if s.name == "dense" and s.batch == subject.batch]
  if dense and subject.name != "dense":
    promised = gmacs["dense"] / mine
    speed_up = statistics.median(dense[0].seconds) / median
    entry |= {"promised": round(promised, 4), "speed_up": round(speed_up, 4)}
    entry["share_of_promise"] = round(speed_up / promised, 4)
  return entry


def _add_to_result(
  run: Run, entries: Sequence[dict[str, Any]], models: dict[str, tuple[ViT, Params]]
) -> None:
  """Gives the rows of `result.json` their speed; rows that are not there yet are added."""
  path = run.workdir / "result.json"
  result = read_json(path) if path.exists() else evaluate.empty_result(run)
  rows = {row["name"]: row for row in result["rows"]}
  for name, (model, _) in models.items():
    cost = count_cost(model)
    found = {e["batch"]: e["images_per_second"] for e in entries if e["name"] == name}
    row = rows.setdefault(name, {"name": name})
    row |= {"gmacs": round(cost.gmacs, 6), "params_m": round(cost.params / 1e6, 4)}
    row["images_per_second"] = {str(batch): rate for batch, rate in found.items()}
  write_json(path, result | {"rows": list(rows.values())})
