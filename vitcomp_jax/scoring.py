"""Scores models example by example."""

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax.api import count_cost
from vitcomp_jax.data.transforms import Preprocess, normalize
from vitcomp_jax.errors import UserError
from vitcomp_jax.metrics import progress
from vitcomp_jax.models.build import build
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.ops import losses
from vitcomp_jax.runs.run import Run
from vitcomp_jax.weights.loading import Params

Outcomes = dict[str, np.ndarray]  # f32[examples], by figure


def outcomes(model: ViT, params: Params, run: Run, name: str) -> Outcomes:
  """Measures one model over every example once.

  Returns:
    Of every example, `top1` and `top5` (0 or 100) and cross-entropy in nats (`loss`); without
    labels, or without a classifier, how far the outputs are from the dense model's instead.

  Raises:
    UserError: If outputs are not finite.
  """
  size, data, layout = run.config.evaluate.batch_size, run.eval_data, run.layout
  can_score = data.has_labels and run.spec.num_classes > 0
  params, dense_params = layout.put(params), None if can_score else layout.put(run.dense_params)
  found: dict[str, list[np.ndarray]] = {}
  batches = math.ceil(data.num_examples / size)
  for rows in progress(run.eval_batches(size), f"evaluate {name}", batches):
    batch = layout.put_batch(rows)
    image, label = batch["image"], batch["label"]
    if can_score:
      figures = _score(model, run.preprocess, params, image, label)
    else:
      figures = _compare(model, run.preprocess, params, dense_params, image)
    fetched = layout.get({**figures, "mask": batch["mask"]})
    real = fetched.pop("mask") > 0
    for key, values in fetched.items():
      found.setdefault(key, []).append(np.asarray(values, np.float32)[real])
  whole = {key: np.concatenate(parts) for key, parts in found.items()}
  check_finite(np.mean(list(whole.values()), axis=0), f"row {name}")
  return whole


def check_finite(outputs: np.ndarray, what: str) -> None:
  """Refuses outputs, or one figure for each example, that are not all finite.

  Args:
    outputs: Of any shape.
    what: Gave them.

  Raises:
    UserError: Says what gave them, and how many they are.
  """
  broken = int(np.sum(~np.isfinite(outputs)))
  if broken:
    raise UserError(
      f"{what}: expected finite outputs, got {broken} of {outputs.size} that are NaN or infinite; "
      "give other weights, or compute in float32 what is computed in less."
    )


def row(found: Outcomes, model: ViT, name: str) -> dict[str, Any]:
  """The means over all examples, and the cost, as they stand in `result.json`."""
  cost = count_cost(model)
  figures = {key: round(float(np.mean(v, dtype=np.float64)), 6) for key, v in found.items()}
  figures |= {"gmacs": round(cost.gmacs, 6), "params_m": round(cost.params / 1e6, 4)}
  logging.info("evaluate %s: %s", name, " ".join(f"{k} {v:.4g}" for k, v in figures.items()))
  return {"name": name, **figures}


def scores(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
  """Scores every example: `top1` and `top5` (0 or 100) and the cross-entropy `loss` in nats.

  An example with a logit that is not finite meets none, whatever its label, and its loss is NaN.
  """
  logits = logits.astype(jnp.float32)
  own = jnp.take_along_axis(logits, labels[:, None], axis=1)
  # Ties go to the lower class, as in a stable sort.
  before = jnp.arange(logits.shape[1], dtype=labels.dtype)[None] < labels[:, None]
  rank = jnp.sum((logits > own) | ((logits == own) & before), axis=1)
  loss = jax.nn.logsumexp(logits, axis=1) - own[:, 0]
  # NaN is not above anything, so that every label would be met.
  is_finite = jnp.all(jnp.isfinite(logits), axis=1)
  top1, top5 = (jnp.where(is_finite & (rank < k), 100.0, 0.0) for k in (1, 5))
  return {"top1": top1, "top5": top5, "loss": jnp.where(is_finite, loss, jnp.nan)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
  model: ViT, preprocess: Preprocess, params: Params, images: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
  return scores(model.apply({"params": params}, normalize(images, preprocess)), labels)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compare(
  model: ViT, preprocess: Preprocess, params: Params, dense_params: Params, images: jax.Array
) -> Mapping[str, jax.Array]:
  """Computes the divergence of the outputs from the dense model's."""
  images = normalize(images, preprocess)
  dense = build(model.spec, model.spec.dense_layers)
  out = model.apply({"params": params}, images, method="forward")
  teacher = dense.apply({"params": dense_params}, images, method="forward")

  def each(divergence: Callable[..., jax.Array], mine: jax.Array, theirs: jax.Array) -> jax.Array:
    return jax.vmap(lambda a, b: divergence(a[None], b[None]))(mine, theirs)

  found = {"feature_divergence": each(losses.feature_divergence, out.features, teacher.features)}
  if model.spec.num_classes:
    found["logit_divergence"] = each(losses.logit_divergence, out.logits, teacher.logits)
  return found
