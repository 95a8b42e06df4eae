"""Predicts the latency of random plans from a latency table, and compares it with measurements.

    python benchmarks/latency_model.py [--variant NAME] [--batch N] [--runtime NAME] [--plans N]
      [--json FILE]

The pruning and merging counts of the plans are drawn uniformly and sorted. The plans are timed in
turn with the programs of the table, so that other load on the machine affects all of them equally,
and medians are compared. A search with `config.budget.latency_ms` uses such a table.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Sequence

import jax
import numpy as np

import vitcomp_jax as vc
from vitcomp_jax.atomic import write_json
from vitcomp_jax.cost import latency, timing
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.methods.handmade import compressed_layers
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.paths import expand


def random_plan(spec: ViTSpec, rng: np.random.Generator) -> tuple[LayerSpec, ...]:
  """Draws layers with random token counts that never increase."""
  compressed = compressed_layers(spec)
  counts = rng.integers(spec.num_prefix + 1, spec.num_tokens + 1, 2 * sum(compressed))
  pairs = iter(np.sort(counts)[::-1].reshape(-1, 2).tolist())
  return tuple(
    dataclasses.replace(layer, reduce=PruneMerge(*next(pairs))) if yes else layer
    for layer, yes in zip(spec.dense_layers, compressed, strict=True)
  )


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--variant", default="deit_small_patch16_224")
  parser.add_argument("--batch", type=int, default=16, help="batch size")
  parser.add_argument("--runtime", default="jax", choices=timing.RUNTIMES)
  parser.add_argument("--plans", type=int, default=10)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--json", type=pathlib.Path)
  known = parser.parse_args(argv)
  if min(known.batch, known.plans, known.rounds) < 1:
    parser.error("--batch, --plans and --rounds: expected at least 1.")
  try:
    spec = vc.get_spec(known.variant)
    latency.check(spec, known.runtime, "--variant")
    file = known.json and pathlib.Path(expand(known.json))
  except vc.UserError as error:
    parser.error(str(error))
  rng = np.random.default_rng(known.seed)
  params = vc.load(known.variant)[1]
  parts = latency.programs(spec, known.batch, PruneMerge, known.runtime)
  layers = {"dense": spec.dense_layers}
  layers |= {f"plan {i}": random_plan(spec, rng) for i in range(1, known.plans + 1)}
  plans = {
    name: timing.compiled(name, ViT(spec, each), params, known.batch, known.runtime)
    for name, each in layers.items()
  }
  timing.take_turns([*parts.values(), *plans.values()], 0.0, known.rounds)
  table = latency.tabulate(spec, parts, PruneMerge)
  rows = []
  for name, subject in plans.items():
    measured = 1e3 * statistics.median(subject.seconds)
    predicted = table.static(spec, layers[name])
    gmacs = vc.count_cost(ViT(spec, layers[name])).gmacs
    rows.append({"plan": name, "gmacs": gmacs, "measured_ms": measured, "predicted_ms": predicted})
    rows[-1]["error"] = predicted / measured - 1
    line = (
      f"{name:8} {gmacs:7.3f} GMACs  measured {measured:8.2f} ms  predicted {predicted:8.2f} ms"
    )
    print(f"{line}  {100 * rows[-1]['error']:+6.1f} %")
  errors = [abs(row["error"]) for row in rows if row["plan"] != "dense"]
  median, worst = statistics.median(errors), max(errors)
  print(f"error: median {100 * median:.1f} %, worst {100 * worst:.1f} %")
  if file:
    about = {"variant": known.variant, "batch": known.batch, "runtime": known.runtime}
    about |= {"device": latency.device_name(known.runtime), "jax": jax.__version__}
    about |= {"median_error": median, "worst_error": worst}
    result = about | {"plans": rows, "table": table.to_json()}
    write_json(file, result)


if __name__ == "__main__":
  main(sys.argv[1:])
