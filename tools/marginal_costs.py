"""Measures the marginal cost of a search's plan, for each layer and kind of count.

    python tools/marginal_costs.py runs/NAME [--images 256] [--json FILE]

`runs/NAME` is the workdir of a finished search with recipe=ours. The marginal cost of a count is
the increase of the task loss for each GMAC removed by lowering this count. It is the ratio of the
gradients of loss and MACs that the search descends along, measured on batches after
those of the search. If a search has converged, all marginal costs are equal.
"""

import argparse
import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax.atomic import write_json
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate.rates import Arch, ShareRates
from vitcomp_jax.methods.widths.lists import HIDDEN, QK, VALUE
from vitcomp_jax.models.layer_trees import of_layer
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.paths import expand
from vitcomp_jax.results import environment
from vitcomp_jax.runs.run import Run, finished_run
from vitcomp_jax.stages import search
from vitcomp_jax.training.step import with_rows

Gradients = Callable[[Any, Any, Any, Mapping[str, jax.Array]], tuple[Arch, Arch]]


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("workdir", help="of a finished search")
  parser.add_argument("--images", type=int, default=256, help="images to measure on")
  parser.add_argument("--json", help="where to write the result")
  args = parser.parse_args(argv)
  try:
    found = measure(_opened(pathlib.Path(expand(args.workdir))), args.images)
    path = args.json and expand(args.json)
  except UserError as error:
    print(error, file=sys.stderr)
    return 2
  for row in found["rows"]:
    counts, cost = f"{row['kept']} of {row['of']}", f"{row['cost']:8.3f} ± {row['se']:.3f}"
    print(f"layer {row['layer']:2} {row['kind']:7} {counts:12} {cost}")
  if path:
    write_json(pathlib.Path(path), found)
  return 0


def _opened(path: pathlib.Path) -> Run:
  """Opens the workdir of a finished search of shares."""
  run = finished_run(path, ["search"])
  if run.config.search.recipe != "ours":
    raise UserError(f"{path}: expected a search with recipe=ours, whose rates are shares.")
  return run


def measure(run: Run, images: int) -> dict[str, Any]:
  """Returns the marginal costs at a run's plan, and the conditions of the measurement.

  Args:
    run: Run of a finished search.
    images: Number of images, rounded up to batches of the search's size.
  """
  config, spec, layout = run.config.search, run.inputs.spec, run.inputs.layout
  trainer = search.trainer(run)
  rates = trainer.method.rates
  table = rates.clipped(plan_table(spec, run.artefacts.plan.layers_for(spec), rates))
  fixed = layout.put((run.artefacts.dense_params, rates.arch(table), search.factors(run)))
  gradients, found = _gradients(trainer.loss()), []
  count = math.ceil(images / config.batch_size)
  for batch in itertools.islice(search.unused_batches(run), count):
    found.append(layout.get(gradients(*fixed, layout.put_batch(batch))))
  return {
    "variant": spec.name,
    "data": run.inputs.train_data.name,
    "images": config.batch_size * len(found),
    "what": config.what,
    "loss": trainer.config.loss,
    "steps": search.steps_of(run),
    "gmacs": round(run.artefacts.plan.gmacs, 6),
    **environment(),
    "rows": rows(spec, rates, table, found),
  }


def plan_table(spec: ViTSpec, layers: Sequence[LayerSpec], rates: ShareRates) -> np.ndarray:
  """Returns the counts of a plan's layers as a table, see `methods.diffrate.rates`."""
  table = []
  for layer in layers:
    reduce = layer.reduce
    counts = {HIDDEN: layer.mlp_dim, QK: layer.head_dim, VALUE: layer.value_width}
    if rates.tokens:
      counts["prune"] = reduce.prune_keep - spec.num_prefix
      counts["merge"] = reduce.merge_keep - spec.num_prefix
    table.append([counts[name] for name in (*rates.tokens, *rates.widths)])
  return np.array(table, np.float64)


def _gradients(loss_fn: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]) -> Gradients:
  """Returns a function that computes gradients of task loss and GMACs with respect to the rates."""

  @jax.jit
  def gradients(
    params: Any, arch: Arch, factors: Any, batch: Mapping[str, jax.Array]
  ) -> tuple[Arch, Arch]:
    def parts(arch: Arch) -> tuple[jax.Array, jax.Array]:
      key, step = jax.random.key(0), jnp.zeros((), jnp.int32)
      _, metrics = loss_fn(params, arch, factors, with_rows(batch), key, step)
      return metrics["task_loss"], metrics["gmacs"]

    _, pull = jax.vjp(parts, arch)
    one, zero = jnp.ones(()), jnp.zeros(())
    return pull((one, zero))[0], pull((zero, one))[0]

  return gradients


def rows(
  spec: ViTSpec, rates: ShareRates, table: np.ndarray, gradients: Sequence[tuple[Arch, Arch]]
) -> list[dict[str, Any]]:
  """Returns the marginal cost of each count, with its standard error over batches.

  Args:
    spec: The model.
    rates: What is learnt.
    table: Counts at which the gradients were taken.
    gradients: Gradients of task loss and GMACs with respect to the rates, for each batch.
  """
  found, before = [], spec.num_patches
  for i, counts in enumerate(table.astype(int).tolist()):
    before = spec.patches_at(i) if i in spec.starts else before
    kept = dict(zip((*rates.tokens, *rates.widths), counts, strict=True))
    lists = {name: ((name,), kept[name], units.length) for name, units in rates.widths.items()}
    if rates.tokens:
      if rates.learns[i, 0]:
        lists = _tokens(rates, before, kept["prune"], kept["merge"]) | lists
      before = kept["merge"]
    for kind, (names, count, length) in lists.items():
      cost = [-_sum(spec, task, i, names) / _sum(spec, macs, i, names) for task, macs in gradients]
      error = float(np.std(cost, ddof=1) / np.sqrt(len(cost)))
      row = {"layer": i + 1, "kind": kind, "kept": count, "of": length}
      found.append({**row, "cost": round(float(np.mean(cost)), 4), "se": round(error, 4)})
  return found


def _tokens(
  rates: ShareRates, before: int, prune: int, merge: int
) -> dict[str, tuple[tuple[str, ...], int, int]]:
  """Returns, by kind, the rates to lower together, the tokens kept, and the tokens before.

  Lowering only the merging rate turns a kept token into a merged one. If the pruning rate is
  lowered too, the number of merged tokens does not change, and one more token is pruned.
  """
  if rates.options.actions == "both":
    pruned = (("prune", "merge"), prune, before)
    return {"pruned": pruned, "merged": (("merge",), merge, prune)}
  kind = {"prune": "pruned", "merge": "merged"}[rates.options.actions]
  return {kind: (("merge",), merge, before)}


def _sum(spec: ViTSpec, gradient: Arch, layer: int, names: Sequence[str]) -> float:
  branches = of_layer(spec, gradient, layer)
  rates = {**branches.get("reduce", {}), **branches.get("widths", {})}
  return float(sum(rates[name] for name in names))


if __name__ == "__main__":
  sys.exit(main())
