"""The task loss of a search, which compares with labels or with the unreduced model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from vitcomp_jax.config import Loss, SearchConfig
from vitcomp_jax.data.mixing import training_inputs
from vitcomp_jax.data.transforms import Preprocess
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.base import Layers
from vitcomp_jax.models.build import build
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.tokens import Output
from vitcomp_jax.ops import losses


def best_loss(config: SearchConfig, spec: ViTSpec) -> Loss:
  """Returns the loss of a search, with `auto` resolved.

  A plan that is searched to match the dense model's outputs on a thousand images does as well on
  other images as one searched with their labels, and fits the thousand images less; see
  docs/results.md. The authors' recipe uses labels.
  """
  if config.loss != "auto":
    return config.loss
  if config.recipe == "paper":
    return "labels"
  return "logits" if spec.has_classifier else "features"


def check_loss(loss: str, spec: ViTSpec, has_labels: bool, where: str) -> None:
  """Rejects a loss that a model or its data do not allow.

  Args:
    loss: The loss, not `auto`.
    spec: The model.
    has_labels: Whether the data have labels.
    where: Name of the option, for the error.
  """
  if loss != "features" and not spec.has_classifier:
    raise UserError(
      f"{where}: expected features for {spec.name}, which has no classifier, got {loss}."
    )
  if loss == "labels" and not has_labels:
    raise UserError(
      f"{where}: expected logits or features for data that have no labels, got labels."
    )


@dataclasses.dataclass(frozen=True)
class TaskLoss:
  """Computes the cross-entropy with labels, or the divergence from the unreduced model.

  Attributes:
    spec: The model.
    dense: Layers of the unreduced model, which keeps all tokens and units.
    config: Options of the loss.
    preprocess: Preprocessing of uint8 images.
  """

  spec: ViTSpec
  dense: Layers
  config: SearchConfig
  preprocess: Preprocess

  @property
  def kind(self) -> Loss:
    """Returns the loss, not `auto`."""
    return best_loss(self.config, self.spec)

  def inputs(self, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a batch's normalised images, f[b h w 3], and the probabilities of its labels."""
    smoothing = self.config.label_smoothing
    return training_inputs(batch, self.preprocess, self.spec.num_classes, smoothing, key)

  def aim(self, params: Any, images: jax.Array) -> jax.Array | None:
    """Returns the unreduced model's logits or features; None if the loss uses labels.

    Args:
      params: Weights of the model.
      images: Normalised images, f[b h w 3].
    """
    if self.kind == "labels":
      return None
    out = build(self.spec, self.dense).apply({"params": params}, images, method="forward")
    return out.logits if self.kind == "logits" else out.representation(self.spec.projection)

  def __call__(self, out: Output, labels: jax.Array, aim: jax.Array | None) -> jax.Array:
    """Computes the loss, a mean over the batch.

    Args:
      out: Output of the compressed model.
      labels: Probabilities of the classes, f[b c].
      aim: Result of `aim`.
    """
    if aim is None:
      return losses.soft_cross_entropy(out.logits, labels)
    if self.kind == "logits":
      return losses.logit_divergence(out.logits, aim)
    return losses.feature_divergence(out.representation(self.spec.projection), aim)
