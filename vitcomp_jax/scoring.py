"""Scores models example by example."""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax.api import count_cost
from vitcomp_jax.data.transforms import Preprocess, normalize
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.build import build
from vitcomp_jax.ops import losses
from vitcomp_jax.parallel import Layout
from vitcomp_jax.results import Row
from vitcomp_jax.weights.loading import Params

PAIRED = ("top1", "loss")  # metrics with standard errors, compared example by example
Outcomes = dict[str, np.ndarray]  # f32[examples], by metric


def outcomes(
  model: Backbone,
  params: Params,
  batches: Iterable[Mapping[str, np.ndarray]],
  layout: Layout,
  name: str,
  dense_params: Params | None = None,
) -> Outcomes:
  """Measures a model once on every example.

  Args:
    model: The model.
    params: Weights of the model.
    batches: This process's rows of all examples, from `Dataset.eval_batches`.
    layout: Layout on the devices.
    name: Name of the model, for errors.
    dense_params: Weights of the dense model to compare with, if there are no labels or there is no
      classifier.

  Returns:
    `top1` and `top5` (0 or 100) and the cross-entropy `loss` in nats for every example; or, with
    `dense_params`, the divergence of the outputs from the dense model's, and the `cosine`
    similarity of the features of both models.

  Raises:
    UserError: If outputs are not finite.
  """
  preprocess = model.spec.preprocess
  params, dense_params = layout.put(params), layout.put(dense_params)
  found: dict[str, list[np.ndarray]] = {}
  for rows in batches:
    batch = layout.put_batch(rows)
    if dense_params is None:
      metrics = _score(model, preprocess, params, batch["image"], batch["label"])
    else:
      metrics = _compare(model, preprocess, params, dense_params, batch["image"])
    fetched = layout.get({**metrics, "mask": batch["mask"]})
    real = fetched.pop("mask") > 0
    for key, values in fetched.items():
      found.setdefault(key, []).append(np.asarray(values, np.float32)[real])
  whole = {key: np.concatenate(parts) for key, parts in found.items()}
  check_finite(np.mean(list(whole.values()), axis=0), f"row {name}")
  return whole


def check_finite(outputs: np.ndarray, what: str) -> None:
  """Rejects outputs, or metrics per example, that are not all finite.

  Args:
    outputs: Array of any shape.
    what: Source of the outputs, for the error.

  Raises:
    UserError: If any value is not finite; the message says how many are not.
  """
  broken = int(np.sum(~np.isfinite(outputs)))
  if broken:
    raise UserError(
      f"{what}: expected finite outputs, got {broken} of {outputs.size} that are NaN or infinite; "
      "give other weights, or compute in float32 what is computed in less."
    )


def measured(row: Row, found: Outcomes, model: Backbone) -> Row:
  """Returns a row with the means over all examples, their standard errors, and the model's cost."""
  cost = count_cost(model)
  metrics = {key: round(float(np.mean(v, dtype=np.float64)), 6) for key, v in found.items()}
  metrics |= {"gmacs": round(cost.gmacs, 6), "params_m": round(cost.params / 1e6, 4)}
  shown = " ".join(f"{key} {value:.4g}" for key, value in metrics.items())
  logging.info("evaluate %s: %s", row.name, shown)
  errors = {f"{key}_se": standard_error(found[key]) for key in PAIRED if key in found}
  return row.with_metrics({**metrics, **errors})


def standard_error(values: np.ndarray) -> float | None:
  """Returns the standard error of the mean of values, f32[n]; None for a single value."""
  if values.size < 2:
    return None
  return round(float(values.std(ddof=1, dtype=np.float64) / math.sqrt(values.size)), 6)


def scores(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
  """Scores every example: `top1` and `top5` (0 or 100) and the cross-entropy `loss` in nats.

  An example with a non-finite logit scores 0, whatever its label, and its loss is NaN.
  """
  logits = logits.astype(jnp.float32)
  own = jnp.take_along_axis(logits, labels[:, None], axis=1)
  # Ties go to the lower class, as in a stable sort.
  before = jnp.arange(logits.shape[1], dtype=labels.dtype)[None] < labels[:, None]
  rank = jnp.sum((logits > own) | ((logits == own) & before), axis=1)
  loss = jax.nn.logsumexp(logits, axis=1) - own[:, 0]
  # NaN is not greater than anything, so every label would count as correct.
  is_finite = jnp.all(jnp.isfinite(logits), axis=1)
  top1, top5 = (jnp.where(is_finite & (rank < k), 100.0, 0.0) for k in (1, 5))
  return {"top1": top1, "top5": top5, "loss": jnp.where(is_finite, loss, jnp.nan)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
  model: Backbone, preprocess: Preprocess, params: Params, images: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
  return scores(model.apply({"params": params}, normalize(images, preprocess)), labels)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compare(
  model: Backbone, preprocess: Preprocess, params: Params, dense_params: Params, images: jax.Array
) -> Mapping[str, jax.Array]:
  """Computes the divergence of the outputs from the dense model's, and their cosine similarity."""
  images = normalize(images, preprocess)
  dense = build(model.spec, model.spec.dense_layers)
  out = model.apply({"params": params}, images, method="forward")
  teacher = dense.apply({"params": dense_params}, images, method="forward")

  def each(divergence: Callable[..., jax.Array], mine: jax.Array, theirs: jax.Array) -> jax.Array:
    return jax.vmap(lambda a, b: divergence(a[None], b[None]))(mine, theirs)

  pair = [output.representation(model.spec.projection) for output in (out, teacher)]
  found = {
    "cosine": each(losses.cosine, *pair),
    "feature_divergence": each(losses.feature_divergence, *pair),
  }
  if model.spec.has_classifier:
    found["logit_divergence"] = each(losses.logit_divergence, out.logits, teacher.logits)
  return found
