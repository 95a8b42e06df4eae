"""Draws the plots of a run: schedules, searches and accuracy."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitcomp_jax.cost import macs
from vitcomp_jax.cost.cost_models import MACS, CostModel
from vitcomp_jax.metrics import read_metrics
from vitcomp_jax.models.reducers import StaticReducer
from vitcomp_jax.models.spec import LayerSpec, ViTSpec, removes_tokens
from vitcomp_jax.plans import Plan
from vitcomp_jax.reporting import plots
from vitcomp_jax.results import Row, SlimResult

Layers = tuple[LayerSpec, ...]


def draw_schedules(folder: pathlib.Path, spec: ViTSpec, models: Mapping[str, Layers]) -> None:
  """Writes `schedule`: the tokens that each layer keeps, for models that remove some.

  Args:
    folder: Folder of the plots.
    spec: The dense model.
    models: Layers by row name.
  """
  schedules = schedules_of(spec, models)
  if schedules:
    plots.save(plots.schedules(schedules, spec.num_tokens), folder, "schedule")


def draw_accuracy(folder: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes `accuracy`, if any row has an accuracy."""
  if any(row.top1 is not None for row in rows):
    plots.save(plots.accuracy_against_gmacs(rows), folder, "accuracy")


def schedules_of(spec: ViTSpec, models: Mapping[str, Layers]) -> dict[str, list[tuple[int, int]]]:
  """Returns the token counts of the models that remove tokens, without duplicates."""
  schedules: dict[str, list[tuple[int, int]]] = {}
  for name, layers in models.items():
    counts = kept_counts(spec, layers)
    if removes_tokens(layers) and counts not in schedules.values():
      schedules[name] = counts
  return schedules


def kept_counts(spec: ViTSpec, layers: Layers) -> list[tuple[int, int]]:
  """Returns the tokens after pruning and after merging; they are equal if a layer only prunes."""
  counts = []
  for layer, (entering, _) in zip(layers, macs.static_counts(spec, layers), strict=True):
    assert isinstance(layer.reduce, StaticReducer)
    counts.append(layer.reduce.counts(entering))
  return counts


def draw_search(
  folder: pathlib.Path, workdir: pathlib.Path, targets: Mapping[str, float], cost: CostModel
) -> None:
  """Writes `search`: loss and cost over the steps of a search, with several budgets in sequence.

  Args:
    folder: Folder of the plots.
    workdir: Folder with the metrics of the search.
    targets: Budgets by suffix of the stage's name.
    cost: Cost that the budgets limit.
  """
  records: list[dict[str, Any]] = []
  budgets: list[float] = []
  for suffix, target in targets.items():
    done = records[-1]["step"] if records else 0
    found = read_metrics(workdir, f"search{suffix}")
    records += [record | {"step": done + record["step"]} for record in found]
    budgets += [target] * len(found)
  label = "GMACs per image" if cost is MACS else "ms per batch, by the table"
  plots.save(plots.search_curves(records, budgets, cost.key, label), folder, "search")


def draw_slimming(folder: pathlib.Path, spec: ViTSpec, plan: Plan) -> None:
  """Writes `widths`, `units` and, if any are cut, `patches`: the units kept by a slimmed plan."""
  indices = plan.indices or ()
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


def draw_masks(folder: pathlib.Path, workdir: pathlib.Path, slim: SlimResult) -> None:
  """Writes `masks`: the masks over the steps of slimming, if this run searched them."""
  if slim.steps:
    records = read_metrics(workdir, "slim")
    plots.save(plots.mask_histograms(records, slim.histogram_limits), folder, "masks")
