"""Stage `benchmark`: how fast the dense and the compressed model are, and could be."""

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax.api import Params, count_cost
from vitcomp_jax.atomic import write_json
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.stages import evaluate
from vitcomp_jax.stages.run import Run, environment, read_json

_PERCENTILES = (50, 90, 99)
_PEAK_SIDE = 2048  # of the square matrices whose product tells the machine's peak


@dataclasses.dataclass
class Subject:
  """One model at one batch size, compiled."""

  row: str
  batch: int
  forward: Callable[[Params, jax.Array], jax.Array]
  params: Params
  images: jax.Array
  gmacs: float
  compile_s: float
  first_s: float
  peak_bytes: int
  seconds: list[float] = dataclasses.field(default_factory=list)

  def time_once(self) -> float:
    begin = time.perf_counter()
    self.forward(self.params, self.images).block_until_ready()
    return time.perf_counter() - begin


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
    models["dense"] = ViT(run.spec, run.spec.dense_layers), run.dense_params
  if run.plan:
    models[evaluate.plan_name(run, run.plan)] = ViT(run.spec, run.layers), run.params
  subjects = [
    compiled(name, model, params, batch)
    for batch in config.batch_sizes
    for name, (model, params) in models.items()
  ]
  take_turns(subjects, config.seconds, config.rounds)
  peak = matmul_peak()
  entries = [_entry(subject, subjects, peak) for subject in subjects]
  result = {**environment(), "matmul_peak_gflops": round(peak / 1e9, 1), "entries": entries}
  write_json(run.workdir / "benchmark.json", result)
  _add_to_result(run, entries, models)
  evaluate.write_report(run)
  return result


def made(run: Run) -> dict[str, Any]:
  """The content of `benchmark.json`."""
  return read_json(run.workdir / "benchmark.json")


def compiled(name: str, model: ViT, params: Params, batch: int) -> Subject:
  """A model, compiled and run once on noise.

  Args:
    name: Of its row.
    model: Dense or compressed.
    params: Its weights.
    batch: Images at once.
  """
  arguments = jax.device_put(params), jnp.asarray(noise(model.spec, batch))

  def forward(params: Params, images: jax.Array) -> jax.Array:
    return model.apply({"params": params}, images)

  begin = time.perf_counter()
  program = jax.jit(forward).lower(*arguments).compile()
  compile_s = time.perf_counter() - begin
  program(*arguments).block_until_ready()
  first_s = time.perf_counter() - begin - compile_s
  memory = program.memory_analysis()
  assert memory is not None
  peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
  gmacs = count_cost(model).gmacs
  logging.info("benchmark %s, batch %d: compiled in %.1f s", name, batch, compile_s)
  return Subject(name, batch, program, *arguments, gmacs, compile_s, first_s, peak)


def noise(spec: ViTSpec, batch: int) -> np.ndarray:
  """Normal noise as images, f32[b h w 3]; a smaller batch is the start of a larger one."""
  return np.random.default_rng(0).standard_normal((batch, *spec.image_size, 3), np.float32)


def take_turns(subjects: Sequence[Any], seconds: float, rounds: int) -> None:
  """Times everything in rounds.

  Args:
    subjects: What has `time_once` and a list `seconds`.
    seconds: That each is given in all, at least three times a round.
    rounds: How many.
  """
  for subject in subjects:
    subject.time_once()  # a warm-up besides the one after compiling
  for _ in range(rounds):
    for subject in subjects:
      begin, count = time.perf_counter(), 0
      while count < 3 or time.perf_counter() - begin < seconds / rounds:
        subject.seconds.append(subject.time_once())
        count += 1


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


def _entry(subject: Subject, subjects: Sequence[Subject], peak: float) -> dict[str, Any]:
  """One row of `benchmark.json`."""
  median = statistics.median(subject.seconds)
  low, high = np.percentile(subject.seconds, (25, 75))
  percentiles = np.percentile(subject.seconds, _PERCENTILES)
  entry = {
    "name": subject.row,
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
    "gmacs": round(subject.gmacs, 6),
    "share_of_peak": round(2e9 * subject.gmacs * subject.batch / median / peak, 4),
  }
  dense = [s for s in subjects if s.row == "dense" and s.batch == subject.batch]
  if dense and subject.row != "dense":
    promised = dense[0].gmacs / subject.gmacs
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
