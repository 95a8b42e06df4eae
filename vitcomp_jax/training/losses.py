"""Task losses, each a mean over the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
  logits: Float[Array, "b c"], labels: Int[Array, "b"], smoothing: float = 0.0
) -> Float[Array, ""]:
  """Cross-entropy with labels, in nats.

  Args:
    logits: Of any precision; the softmax runs in float32 at least.
    labels: Class indices.
    smoothing: Share of the target that is spread evenly over all classes.
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
  picked = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
  return -jnp.mean((1 - smoothing) * picked + smoothing * jnp.mean(log_p, axis=1))


def logit_divergence(logits: Float[Array, "b c"], teacher: Float[Array, "b c"]) -> Float[Array, ""]:
  """Kullback-Leibler divergence from the teacher's prediction, in nats."""
  target = jax.nn.log_softmax(teacher.astype(jnp.float32))
  difference = target - jax.nn.log_softmax(logits.astype(jnp.float32))
  return jnp.mean(jnp.sum(jnp.exp(target) * difference, axis=1))


def feature_divergence(
  features: Float[Array, "b d"], teacher: Float[Array, "b d"]
) -> Float[Array, ""]:
  """Squared distance from the teacher's features, relative to their squared length."""
  teacher = teacher.astype(jnp.float32)
  square = jnp.sum((features.astype(jnp.float32) - teacher) ** 2, axis=1)
  return jnp.mean(square / jnp.sum(teacher**2, axis=1))
