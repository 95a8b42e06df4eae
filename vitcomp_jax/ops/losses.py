"""Task losses, each a mean over the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
  logits: Float[Array, "b c"], labels: Int[Array, " b"], smoothing: float = 0.0
) -> Float[Array, ""]:
  """Cross-entropy with labels, in nats.

  Args:
    logits: Of any precision; the softmax runs in float32 at least.
    labels: Class indices.
    smoothing: Share of the target that is spread evenly over all classes.
  """
  log_p = jax.nn.log_softmax(_at_least_float32(logits))
  picked = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
  return -jnp.mean((1 - smoothing) * picked + smoothing * jnp.mean(log_p, axis=1))


def soft_cross_entropy(
  logits: Float[Array, "b c"], targets: Float[Array, "b c"]
) -> Float[Array, ""]:
  """Cross-entropy with probabilities of the classes, in nats.

  Args:
    logits: Of any precision; the softmax runs in float32 at least.
    targets: Rows that sum to 1.
  """
  return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(_at_least_float32(logits)), axis=1))


def logit_divergence(logits: Float[Array, "b c"], teacher: Float[Array, "b c"]) -> Float[Array, ""]:
  """Kullback-Leibler divergence from the teacher's prediction, in nats.

  Args:
    logits: Of any precision; it is computed in float32 at least.
    teacher: Of the same precision.
  """
  target = jax.nn.log_softmax(_at_least_float32(teacher))
  difference = target - jax.nn.log_softmax(_at_least_float32(logits))
  return jnp.mean(jnp.sum(jnp.exp(target) * difference, axis=1))


def distillation(
  logits: Float[Array, "b c"], teacher: Float[Array, "b c"], kind: str, temperature: float = 1.0
) -> Float[Array, ""]:
  """Computes the divergence of a student from its teacher, in nats.

  Args:
    logits: The student's.
    teacher: The teacher's.
    kind: `soft`, the divergence of the predictions at a temperature, times its square; or `hard`,
      the cross-entropy with the teacher's class.
    temperature: Of `soft`.

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
  """Squared distance from the teacher's features, relative to their squared length.

  Args:
    features: [b d], or [b 2 d] of a distilled model; it is computed in float32 at least.
    teacher: Of the same shape and precision.
  """
  teacher = _at_least_float32(teacher).reshape(len(teacher), -1)
  features = _at_least_float32(features).reshape(len(features), -1)
  square = jnp.sum((features - teacher) ** 2, axis=1)
  return jnp.mean(square / jnp.sum(teacher**2, axis=1))


def _at_least_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
  return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)
