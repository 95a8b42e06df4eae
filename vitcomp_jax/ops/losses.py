"""Task losses, each a mean over the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
  logits: Float[Array, "b c"], labels: Int[Array, " b"], smoothing: float = 0.0
) -> Float[Array, ""]:
  """Computes the cross-entropy with labels, in nats.

  Args:
    logits: Logits of any precision; the softmax runs in float32 at least.
    labels: Class indices.
    smoothing: Label smoothing, the share of the target spread evenly over all classes.
  """
  log_p = jax.nn.log_softmax(_at_least_float32(logits))
  picked = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
  return -jnp.mean((1 - smoothing) * picked + smoothing * jnp.mean(log_p, axis=1))


def soft_cross_entropy(
  logits: Float[Array, "b c"], targets: Float[Array, "b c"]
) -> Float[Array, ""]:
  """Computes the cross-entropy with class probabilities, in nats.

  Args:
    logits: Logits of any precision; the softmax runs in float32 at least.
    targets: Class probabilities, which sum to 1 in each row.
  """
  return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(_at_least_float32(logits)), axis=1))


def logit_divergence(logits: Float[Array, "b c"], teacher: Float[Array, "b c"]) -> Float[Array, ""]:
  """Computes the Kullback-Leibler divergence from the teacher's prediction, in nats.

  Args:
    logits: Logits of any precision; the divergence is computed in float32 at least.
    teacher: The teacher's logits, of the same precision.
  """
  target = jax.nn.log_softmax(_at_least_float32(teacher))
  difference = target - jax.nn.log_softmax(_at_least_float32(logits))
  return jnp.mean(jnp.sum(jnp.exp(target) * difference, axis=1))


def distillation(
  logits: Float[Array, "b c"], teacher: Float[Array, "b c"], kind: str, temperature: float = 1.0
) -> Float[Array, ""]:
  """Computes the divergence of a student from its teacher, in nats.

  Args:
    logits: The student's logits.
    teacher: The teacher's logits.
    kind: `soft` for the divergence between the predictions at a temperature, times the squared
      temperature; `hard` for the cross-entropy with the teacher's class.
    temperature: Temperature of `soft`.

  References:
    Hinton et al., 2015, `Distilling the Knowledge <https://arxiv.org/abs/1503.02531>`_;
    Touvron et al., `DeiT <https://arxiv.org/abs/2012.12877>`_, 2021, Eq. 2 and 3.
  """
  if kind == "hard":
    return cross_entropy(logits, jnp.argmax(teacher, axis=1))
  return temperature**2 * logit_divergence(logits / temperature, teacher / temperature)


def feature_divergence(
  features: Float[Array, "b ..."], teacher: Float[Array, "b ..."]
) -> Float[Array, ""]:
  """Computes the squared distance from the teacher's features, relative to their squared norm.

  Args:
    features: Features [b d], or [b 2 d] of a distilled model; the distance is computed in float32
      at least.
    teacher: The teacher's features, of the same shape and precision.
  """
  features, teacher = _flat(features), _flat(teacher)
  square = jnp.sum((features - teacher) ** 2, axis=1)
  return jnp.mean(square / jnp.sum(teacher**2, axis=1))


def cosine(features: Float[Array, "b ..."], teacher: Float[Array, "b ..."]) -> Float[Array, ""]:
  """Computes the cosine similarity to the teacher's features; see above for the arguments."""
  features, teacher = _flat(features), _flat(teacher)
  norms = jnp.linalg.norm(features, axis=1) * jnp.linalg.norm(teacher, axis=1)
  return jnp.mean(jnp.sum(features * teacher, axis=1) / norms)


def _flat(features: Float[Array, "b ..."]) -> Float[Array, "b d"]:
  return _at_least_float32(features).reshape(len(features), -1)


def _at_least_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
  return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)
