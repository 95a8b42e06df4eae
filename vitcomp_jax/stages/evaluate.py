"""Stage `evaluate`: accuracy and cost of the dense model, the plan and hand-made schedules."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax import macs
from vitcomp_jax.api import Params
from vitcomp_jax.atomic import write_json
from vitcomp_jax.costs import MACS
from vitcomp_jax.data.transforms import Preprocess, normalize
from vitcomp_jax.errors import UserError
from vitcomp_jax.metrics import read_metrics
from vitcomp_jax.models.build import build
from vitcomp_jax.models.reducers import PruneMerge, keep_all
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.plans import Plan
from vitcomp_jax.schedules import within
from vitcomp_jax.stages import figures, measure, report
from vitcomp_jax.stages.run import Run, environment, read_json

_FIGURES = {"loss", "feature_divergence"}  # One of them is in every row that was evaluated.


def check(run: Run) -> None:
  """Refuses a plan or weights that do not fit, labels without a class, and an empty table."""
  config, plan = run.config, run.plan
  searches = bool({"search", "slim"} & set(config.stages))
  run.check_classes(run.eval_data)
  if plan:
    plan.layers_for(run.spec)
    _check_dense(run, plan)
  elif config.evaluate.baselines and not searches:
    run.target_gmacs  # noqa: B018, raises
  if config.evaluate.baselines:
    run.spec.importance(config.search.importance)
  has_searched = "slim" in config.stages or (run.workdir / "searched.safetensors").exists()
  if config.evaluate.masked and not has_searched:
    raise UserError("config.evaluate.masked: expected the stage slim in this run, got none.")
  if not (config.evaluate.dense or config.evaluate.baselines or plan or searches):
    raise UserError(
      "config.evaluate: expected something to evaluate (dense, baselines, or model.plan), got none."
    )


def _check_dense(run: Run, plan: Plan) -> None:
  """Refuses a row for the dense model where the weights are a slimmed one's."""
  if plan.indices and run.config.evaluate.dense:
    try:
      run.dense_params  # noqa: B018, raises
    except UserError as error:
      raise UserError(
        f"config.evaluate.dense: expected False, or the dense model's weights ({error})"
      ) from error


def evaluate(run: Run) -> dict[str, Any]:
  """Evaluates every row, and writes `result.json`, `report.md` and the figures.

  Returns:
    The content of `result.json`.
  """
  rows, result = _rows(run), empty_result(run) | _measured_before(run)
  there = {row["name"]: row for row in result["rows"]}
  for name, row in rows.items():
    if not _FIGURES & there.get(name, {}).keys():
      model = build(run.spec, row.layers)
      found = measure.outcomes(model, row.params, run, name)
      # A benchmark may have made the row.
      there[name] = measure.row(found, model, name) | there.get(name, {})
      result |= {"rows": list(there.values()), "examples": len(next(iter(found.values())))}
      write_json(run.workdir / "result.json", result)
  _draw(run, {name: row.layers for name, row in rows.items()}, result)
  write_report(run)
  return result


def empty_result(run: Run) -> dict[str, Any]:
  """The content of a `result.json` without rows."""
  data = run.eval_data
  about = {"dataset": data.name, "split": data.split, "examples": data.num_examples}
  return {**about, **environment(), "rows": []}


def made(run: Run) -> dict[str, Any]:
  """The content of `result.json`."""
  return read_json(run.workdir / "result.json")


def _measured_before(run: Run) -> dict[str, Any]:
  """The rows of an evaluation that was cut off, and the examples they are over."""
  if not (run.workdir / "result.json").exists():
    return {}
  return {key: value for key, value in made(run).items() if key in ("rows", "examples")}


@dataclasses.dataclass(frozen=True)
class _Row:
  """A row of the table before it is measured."""

  layers: tuple[LayerSpec, ...]
  params: Params


def _rows(run: Run) -> dict[str, _Row]:
  """The model of every row, by name."""
  config, spec, plan = run.config.evaluate, run.spec, run.plan
  rows = {"dense": _Row(spec.dense_layers, run.dense_params)} if config.dense else {}
  for name, other in run.front.items():
    rows[name] = _Row(other.layers_for(spec), run.params_before_finetune)
  if plan:
    rows |= _plan_rows(run, plan)
  for name in config.baselines:
    for suffix, gmacs in _baseline_gmacs(run).items():
      layers = within(name, spec, gmacs, run.config.search.importance)
      rows[f"{name}{suffix}"] = _Row(layers, run.dense_params)
  return rows


def _baseline_gmacs(run: Run) -> dict[str, float]:
  """What schedules without a search cost, by what stands behind their names."""
  if run.front:
    return {name[name.index("@") :]: plan.gmacs for name, plan in run.front.items()}
  return {"": run.plan.gmacs if run.plan else run.target_gmacs}


def plan_name(run: Run, plan: Plan) -> str:
  """The name of a plan's row: its method's, and the budget where a search met several."""
  for name, other in run.front.items():
    if other == plan:
      return name
  method = plan.made_by.get("method")
  known = isinstance(method, str) and method not in ("dense", *run.config.evaluate.baselines)
  return str(method) if known else "diffrate"


def _plan_rows(run: Run, plan: Plan) -> dict[str, _Row]:
  """The plan, and each half of one that both slims and removes tokens."""
  name, rows = plan_name(run, plan), {}
  if plan.indices and "+" in name:
    slimmed, _, searched = name.partition("+")
    whole = tuple(dataclasses.replace(layer, reduce=keep_all) for layer in run.layers)
    rows[slimmed] = _Row(whole, run.params)
    if run.config.evaluate.dense:
      reduced = zip(run.spec.dense_layers, run.layers, strict=True)
      rates = tuple(dataclasses.replace(dense, reduce=layer.reduce) for dense, layer in reduced)
      rows[searched] = _Row(rates, run.dense_params)
  if run.config.evaluate.before_finetune:
    rows[f"{name}@before_finetune"] = _Row(run.layers, run.params_before_finetune)
  if run.config.evaluate.masked:
    rows[f"{name}@masked"] = _Row(plan.masked_layers_for(run.spec), run.searched_params)
  return rows | {name: _Row(run.layers, run.params)}


def _draw(run: Run, models: Mapping[str, tuple[LayerSpec, ...]], result: dict[str, Any]) -> None:
  """Writes the figures."""
  folder, plan = run.workdir / "figures", run.plan
  summary = run.finished("search")
  removes = plan and any(layer.reduce != keep_all for layer in run.layers)
  if plan and removes:
    schedules: dict[str, list[tuple[int, int]]] = {}
    for name, layers in models.items():
      counts = kept_counts(run.spec, layers)
      if any(layer.reduce != keep_all for layer in layers) and counts not in schedules.values():
        schedules[name] = counts
    figures.schedule(folder / "schedule.png", schedules, plan.num_tokens)
    if run.config.evaluate.token_maps:
      _draw_sampled_token_maps(run, plan, folder / "token_maps.png")
  if summary:
    _draw_search(run, folder / "search.png")
  if plan and plan.indices:
    _draw_slimming(run, plan, folder)
  if any("top1" in row for row in result["rows"]):
    figures.accuracy_against_gmacs(folder / "accuracy.png", result["rows"])


def _draw_search(run: Run, path: pathlib.Path) -> None:
  """How a search went; those for several budgets one after the other."""
  records: list[dict[str, Any]] = []
  targets: list[float] = []
  for suffix, target in run.targets.items():
    done = records[-1]["step"] if records else 0
    found = read_metrics(run.workdir, f"search{suffix}")
    records += [record | {"step": done + record["step"]} for record in found]
    targets += [target] * len(found)
  label = "GMACs per image" if run.cost is MACS else "ms per batch, by the table"
  figures.search_curves(path, records, targets, run.cost.key, label)


def write_report(run: Run) -> None:
  """Writes `report.md` from what the stages have measured and drawn so far."""
  plan, summary = run.plan, run.finished("search")
  kept = kept_counts(run.spec, run.layers) if plan else []
  given = plan and not (summary or run.finished("slim"))
  budget = f"{plan.gmacs:.4g} GMACs" if plan and given else ""
  plan_json = plan.to_json() if plan else None
  slimming = run.finished("slim")
  report.write_report(run.workdir, made(run), plan_json, kept, summary, budget, slimming)


def kept_counts(spec: ViTSpec, layers: tuple[LayerSpec, ...]) -> list[tuple[int, int]]:
  """Tokens after pruning and after merging in each layer; equal where there is one reduction."""
  counts = []
  for layer, (_, after) in zip(layers, macs.static_counts(spec, layers), strict=True):
    r = layer.reduce
    counts.append((r.prune_keep, r.merge_keep) if isinstance(r, PruneMerge) else (after, after))
  return counts


def _draw_slimming(run: Run, plan: Plan, folder: pathlib.Path) -> None:
  """What of each layer a slimmed plan keeps, and how the masks came to it."""
  spec, indices = run.spec, plan.indices or ()
  kept = {
    "head dimensions": [np.sum(np.ravel(i.attn) >= 0) / spec.width for i in indices],
    "hidden units": [np.sum(np.array(i.mlp) >= 0) / spec.mlp_dim for i in indices],
  }
  everything = range(spec.num_tokens)
  tokens = [getattr(layer.select, "positions", everything) for layer in plan.layers]
  patches = [np.isin(everything, t)[spec.num_prefix :] for t in tokens]
  if not all(layer.all() for layer in patches):
    kept["patches"] = [layer.mean() for layer in patches]
    figures.kept_patches(folder / "patches.png", patches, spec.grid)
  figures.kept_widths(folder / "widths.png", kept)
  slimming = run.finished("slim")
  if slimming and slimming["steps"]:
    records = read_metrics(run.workdir, "slim")
    figures.mask_histograms(folder / "masks.png", records, slimming["histogram_limits"])


def _draw_sampled_token_maps(run: Run, plan: Plan, path: pathlib.Path) -> None:
  """What the plan did to a few images."""
  data = run.eval_data
  batch = data.sample(run.config.evaluate.token_maps)
  model = build(run.spec, plan.layers_for(run.spec))
  titles = [data.class_names[label] if data.has_labels else "" for label in batch["label"]]
  draw_token_maps(path, model, run.params, run.preprocess, batch["image"], titles)


def draw_token_maps(
  path: pathlib.Path,
  model: ViT,
  params: Params,
  preprocess: Preprocess,
  images: np.ndarray,
  titles: Sequence[str],
) -> None:
  """Draws what a model did to the tokens of images, at four depths.

  Args:
    path: Of the PNG.
    model: With static reducers.
    params: Its weights.
    preprocess: How images are normalised.
    images: uint8[n h w 3].
    titles: Of the images.
  """
  spec = model.spec
  found = jax.device_get(_sources(model, preprocess, params, jnp.asarray(images)))
  chosen = sorted({spec.depth * part // 4 - 1 for part in (1, 2, 3, 4)} - {-1})
  names = [f"layer {i + 1}" for i in chosen]
  maps = [_on_first_grid(spec, i, found[i]) for i in chosen]
  figures.token_maps(path, images, maps, spec.num_prefix, spec.grid, names, titles)


def _on_first_grid(spec: ViTSpec, layer: int, source: np.ndarray) -> np.ndarray:
  """A layer's sources for all patches that the first layer knows, each its part of a later one."""
  (h, w), (rows, columns) = spec.grid, spec.grid_at(layer)
  places = np.arange(h)[:, None] * rows // h * columns + np.arange(w) * columns // w
  return source[:, places.ravel()]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sources(
  model: ViT, preprocess: Preprocess, params: Params, images: jax.Array
) -> list[jax.Array]:
  """Of each layer, which token holds each patch after it, i[b p]."""
  out = model.apply({"params": params}, normalize(images, preprocess), method="forward")
  return [tokens.source for tokens in out.layers]
