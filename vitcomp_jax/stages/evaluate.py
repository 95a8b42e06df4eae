"""Stage `evaluate`: accuracy and cost of the dense model, the plan and hand-made schedules."""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vitcomp_jax.api import Params, count_cost
from vitcomp_jax.atomic import write_json
from vitcomp_jax.data.loader import Dataset
from vitcomp_jax.data.transforms import Preprocess, normalize
from vitcomp_jax.metrics import read_metrics
from vitcomp_jax.models.spec import LayerSpec
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.plans import Plan, load_plan, make_plan
from vitcomp_jax.schedules import hand_made
from vitcomp_jax.stages import figures, report
from vitcomp_jax.stages.run import Run, environment


def evaluate(run: Run) -> dict[str, Any]:
  """Evaluates every row, and writes `result.json`, `report.md` and the figures.

  Returns:
    The content of `result.json`.
  """
  plan, data = _plan(run), run.eval_data
  path = run.workdir / "result.json"
  result = {
    "dataset": data.name,
    "split": data.split,
    "examples": data.num_examples,
    **environment(),
    "rows": json.loads(path.read_text())["rows"] if path.exists() else [],
  }
  done = {row["name"] for row in result["rows"]}
  models = _models(run, plan)
  for name, layers in models.items():
    if name not in done:
      row = evaluate_model(ViT(run.spec, layers), run.params, data, run)
      result["rows"].append({"name": name, **row})
      result["examples"] = data.num_examples - data.skipped
      write_json(path, result)
  _draw(run, plan, models, result)
  return result


def _plan(run: Run) -> Plan | None:
  """The plan that this run searched, or the config's."""
  searched = run.workdir / "plan.json"
  if searched.exists():
    return load_plan(str(searched))
  return load_plan(run.config.model.plan) if run.config.model.plan else None


def _models(run: Run, plan: Plan | None) -> dict[str, tuple[LayerSpec, ...]]:
  """The layers of every row, by name."""
  config, spec = run.config.evaluate, run.spec
  models = {"dense": spec.dense_layers} if config.dense else {}
  if plan:
    models[str(plan.made_by.get("method", "diffrate"))] = plan.layers_for(spec)
  for name in config.baselines:
    models[name] = hand_made(name, spec, plan.gmacs if plan else run.target_gmacs)
  return models


def evaluate_model(model: ViT, params: Params, data: Dataset, run: Run) -> dict[str, float]:
  """Accuracy in percent, cross-entropy in nats, and cost of one model, over every example once."""
  sums = {"top1": 0.0, "top5": 0.0, "loss": 0.0, "count": 0.0}
  for batch in data.eval_batches(run.config.evaluate.batch_size):
    arrays = {key: batch[key] for key in ("image", "label", "mask")}
    found = _evaluate_batch(model, run.preprocess, params, arrays)
    for key, value in jax.device_get(found).items():
      sums[key] += float(value)
  cost, count = count_cost(model), sums["count"]
  return {
    "top1": round(100 * sums["top1"] / count, 4),
    "top5": round(100 * sums["top5"] / count, 4),
    "loss": round(sums["loss"] / count, 6),
    "gmacs": round(cost.gmacs, 6),
    "params_m": round(cost.params / 1e6, 4),
  }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate_batch(
  model: ViT, preprocess: Preprocess, params: Params, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Sums over the batch's real examples."""
  logits = model.apply({"params": params}, normalize(batch["image"], preprocess))
  logits, labels, mask = logits.astype(jnp.float32), batch["label"], batch["mask"]
  own = jnp.take_along_axis(logits, labels[:, None], axis=1)
  # Ties go to the lower class, as in a stable sort.
  before = jnp.arange(logits.shape[1], dtype=labels.dtype)[None] < labels[:, None]
  rank = jnp.sum((logits > own) | ((logits == own) & before), axis=1)
  loss = jax.nn.logsumexp(logits, axis=1) - own[:, 0]
  return {
    "top1": jnp.sum(mask * (rank < 1)),
    "top5": jnp.sum(mask * (rank < 5)),
    "loss": jnp.sum(mask * loss),
    "count": jnp.sum(mask),
  }


def _draw(
  run: Run,
  plan: Plan | None,
  models: Mapping[str, tuple[LayerSpec, ...]],
  result: dict[str, Any],
) -> None:
  """Writes the figures, then the report that shows them."""
  folder, plan_json = run.workdir / "figures", plan.to_json() if plan else None
  summary = run.finished("search")
  if plan and plan_json:
    schedules = {
      name: report.plan_counts(make_plan(run.spec, layers, {}).to_json())
      for name, layers in models.items()
      if name != "dense"
    }
    figures.schedule(folder / "schedule.png", schedules, plan.num_tokens)
    _draw_token_maps(run, plan, folder / "token_maps.png")
  if summary:
    records = read_metrics(run.workdir, "search")
    figures.search_curves(folder / "search.png", records, summary["budget_gmacs"])
  figures.accuracy_against_gmacs(folder / "accuracy.png", result["rows"])
  budget = f"{plan.gmacs:.4g} GMACs" if plan and not summary else ""
  report.write_report(run.workdir, result, plan_json, summary, budget)


def _draw_token_maps(run: Run, plan: Plan, path: pathlib.Path) -> None:
  """What the plan did to a few images, at four depths."""
  spec, data = run.spec, run.eval_data
  batch = data.sample(run.config.evaluate.token_maps)
  model = ViT(spec, plan.layers_for(spec))

  @jax.jit
  def sources(params: Params, images: jax.Array) -> list[jax.Array]:
    normal = normalize(images, run.preprocess)
    out = model.apply({"params": params}, normal, method="forward")
    return [tokens.source for tokens in out.layers]

  found = jax.device_get(sources(run.params, jnp.asarray(batch["image"])))
  chosen = sorted({spec.depth * part // 4 - 1 for part in (1, 2, 3, 4)} - {-1})
  figures.token_maps(
    path,
    batch["image"],
    [found[i] for i in chosen],
    spec.num_prefix,
    spec.grid,
    [f"layer {i + 1}" for i in chosen],
    [data.class_names[label] for label in batch["label"]],
  )
