"""Scores tokens by attention or values; computes a single row of attention where that suffices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.ops.attention import logits_of, wide


def cls_attention(
  q: Float[Array, "b h k"],
  k: Float[Array, "b h n k"],
  scale: float,
  log_size: Float[Array, "b n"] | None = None,
  keep: Float[Array, "b n"] | None = None,
  bias: Float[Array, "#b h n"] | None = None,
) -> Float[Array, "b n"]:
  """Computes the CLS token's attention to every token, averaged over heads.

  It is computed as a single row, separately from `attend`, so the full map is never needed.

  Args:
    q: The CLS token's query.
    k: Keys.
    scale: Scale of the logits.
    log_size: Logarithm of the number of patches that each key represents; None: one each.
    keep: 1 for kept keys, 0 for dropped ones, which score below all kept ones.
    bias: Added to the logits of each key.

  Returns:
    Scores in [0, 1]; -1 where dropped.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Sec. 3.2 (importance).
  """
  logits = logits_of(q[:, :, None], k, scale, log_size)[:, :, 0]
  if bias is not None:
    logits = logits + bias
  if keep is None:
    return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=1)
  row = jax.nn.softmax(logits, axis=-1, where=keep[:, None, :] > 0.5)
  return last_if_dropped(jnp.mean(row, axis=1), keep)


def mean_attention(
  q: Float[Array, "b h n k"],
  k: Float[Array, "b h n k"],
  scale: float,
  log_size: Float[Array, "b n"] | None = None,
  keep: Float[Array, "b n"] | None = None,
  of_all: bool = False,
  bias: Float[Array, "#b h n n"] | None = None,
) -> Float[Array, "b n"]:
  """Computes the attention that each token receives, averaged over heads and kept queries.

  Args:
    q: Queries.
    k: Keys.
    scale: Scale of the logits.
    log_size: Logarithm of the number of patches that each key represents; None: one each.
    keep: 1 for kept tokens, 0 for dropped ones, which score below all kept ones.
    of_all: Whether to average over dropped queries too, which attend to the kept keys and
      themselves. Dropped tokens are then ranked by the attention that they pay to themselves.
    bias: Added to the logits of each query and key.

  Returns:
    Scores in [0, 1]; below 0 where dropped.
  """
  logits = logits_of(q, k, scale, log_size, bias)
  if keep is None:
    return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=(1, 2))
  kept = keep > 0.5
  seen = kept[:, None] | (jnp.eye(kept.shape[1], dtype=bool)[None] & of_all)
  weights = jnp.mean(jax.nn.softmax(logits, axis=-1, where=seen[:, None]), axis=1)
  mean = jnp.mean(weights, axis=1, where=kept[:, :, None] | of_all)
  return jnp.where(kept, mean, -1 / mean) if of_all else last_if_dropped(mean, keep)


def probe_attention(
  x: Float[Array, "b n d"],
  probe: Float[Array, "h d"],
  size: Float[Array, "b n"] | None = None,
  keep: Float[Array, "b n"] | None = None,
) -> Float[Array, "b n"]:
  """Computes the attention that a query outside the sequence pays to tokens, averaged over heads.

  Args:
    x: Tokens; they are standardised first.
    probe: Query of each head with the key projection and the norm folded in: its product with a
      standardised token is the logit, up to a constant that does not change the softmax.
    size: Number of patches that each token represents; None: one each.
    keep: 1 for kept tokens, 0 for dropped ones, which score below all kept ones.

  Returns:
    Scores in [0, 1]; -1 where dropped.
  """
  standard = jax.nn.standardize(x.astype(wide(x)), epsilon=1e-6)
  logits = jnp.einsum("hd,bnd->bhn", probe.astype(standard.dtype), standard)
  if size is not None:
    logits = logits + jnp.log(size)[:, None]
  where = None if keep is None else keep[:, None] > 0.5
  return last_if_dropped(jnp.mean(jax.nn.softmax(logits, axis=-1, where=where), axis=1), keep)


def value_norm(
  v: Float[Array, "b h n k"], keep: Float[Array, "b n"] | None = None
) -> Float[Array, "b n"]:
  """Computes the norm of each token's values over all heads; -1 where dropped."""
  norm = jnp.sqrt(jnp.sum(jnp.square(v.astype(wide(v))), axis=(1, 3)))
  return last_if_dropped(norm, keep)


def last_if_dropped(
  score: Float[Array, "b n"], keep: Float[Array, "b n"] | None
) -> Float[Array, "b n"]:
  """Returns nonnegative scores with -1 where a token is dropped."""
  return score if keep is None else jnp.where(keep > 0.5, score, -1.0)
