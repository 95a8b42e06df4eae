"""The figures that follow from what a run has measured: its schedules, its searches, its table."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitcomp_jax.cost import macs
from vitcomp_jax.cost.cost_models import MACS
from vitcomp_jax.metrics import read_metrics
from vitcomp_jax.models.reducers import StaticReducer
from vitcomp_jax.models.spec import LayerSpec, ViTSpec, removes_tokens
from vitcomp_jax.plans import Plan
from vitcomp_jax.reporting import plots
from vitcomp_jax.runs.run import Run

Layers = tuple[LayerSpec, ...]


def draw(run: Run, models: Mapping[str, Layers], rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes those figures of a run that there is something for.

  Args:
    run: Whose `figures/` they go to.
    models: By the names of rows.
    rows: Of result.json.
  """
  folder, plan = run.workdir / "figures", run.plan
  schedules = schedules_of(run.spec, models)
  if schedules:
    plots.save(plots.schedules(schedules, run.spec.num_tokens), folder, "schedule")
  if run.finished("search"):
    _draw_search(run, folder)
  if plan and plan.indices:
    _draw_slimming(run, plan, folder)
  if any("top1" in row for row in rows):
    plots.save(plots.accuracy_against_gmacs(rows), folder, "accuracy")


def schedules_of(spec: ViTSpec, models: Mapping[str, Layers]) -> dict[str, list[tuple[int, int]]]:
  """The counts of the models that remove tokens, each schedule once."""
  schedules: dict[str, list[tuple[int, int]]] = {}
  for name, layers in models.items():
    counts = kept_counts(spec, layers)
    if removes_tokens(layers) and counts not in schedules.values():
      schedules[name] = counts
  return schedules


def kept_counts(spec: ViTSpec, layers: Layers) -> list[tuple[int, int]]:
  """Tokens after pruning and after merging in each layer; equal where it does not merge."""
  counts = []
  for layer, (entering, _) in zip(layers, macs.static_counts(spec, layers), strict=True):
    assert isinstance(layer.reduce, StaticReducer)
    counts.append(layer.reduce.counts(entering))
  return counts


def _draw_search(run: Run, folder: pathlib.Path) -> None:
  """Plots the course of a search; searches for several budgets one after the other."""
  records: list[dict[str, Any]] = []
  targets: list[float] = []
  for suffix, target in run.targets.items():
    done = records[-1]["step"] if records else 0
    found = read_metrics(run.workdir, f"search{suffix}")
    records += [record | {"step": done + record["step"]} for record in found]
    targets += [target] * len(found)
  label = "GMACs per image" if run.cost is MACS else "ms per batch, by the table"
  figure = plots.search_curves(records, targets, run.cost.key, label)
  plots.save(figure, folder, "search")


def _draw_slimming(run: Run, plan: Plan, folder: pathlib.Path) -> None:
  """Plots what a slimmed plan keeps of each layer, and how its masks evolved."""
  spec, indices = run.spec, plan.indices or ()
  attn = np.array([np.isin(range(spec.width), np.ravel(i.attn)) for i in indices])
  mlp = np.array([np.isin(range(spec.mlp_dim), i.mlp) for i in indices])
  kept = {"head dimensions": attn.mean(axis=1), "hidden units": mlp.mean(axis=1)}
  everything = range(spec.num_tokens)
  tokens = [getattr(layer.select, "positions", everything) for layer in plan.layers]
  patches = [np.isin(everything, t)[spec.num_prefix :] for t in tokens]
  if not all(layer.all() for layer in patches):
    kept["patches"] = np.array([layer.mean() for layer in patches])
    plots.save(plots.kept_patches(patches, spec.grid), folder, "patches")
  plots.save(plots.kept_widths(kept), folder, "widths")
  heads = attn.reshape(len(attn), spec.num_heads, -1)
  plots.save(plots.kept_units(heads, mlp), folder, "units")
  slimming = run.finished("slim")
  if slimming and slimming["steps"]:
    records = read_metrics(run.workdir, "slim")
    figure = plots.mask_histograms(records, slimming["histogram_limits"])
    plots.save(figure, folder, "masks")
