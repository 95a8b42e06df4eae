"""Attention over tokens that stand for several patches, whole or masked."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Largest factor by which a dropped key may outweigh the kept ones in the gradient of its mask.
_LARGEST_WEIGHT = 1e6


def attend(
  q: Float[Array, "b h n k"],
  k: Float[Array, "b h n k"],
  v: Float[Array, "b h n k"],
  scale: float,
  log_size: Float[Array, "b n"] | None = None,
  keep: Float[Array, "b n"] | None = None,
  eps: float = 0.0,
) -> Float[Array, "b h n k"]:
  """Proportional attention: each key weighs as much as the patches it stands for.

  With `keep`, no token is removed; instead a row sees the kept keys and itself, so that kept rows
  come out as if the others were gone, while gradients still reach `keep` at dropped keys.

  Args:
    q: Queries.
    k: Keys.
    v: Values.
    scale: Factor of the products, 1/sqrt(k) in a plain ViT.
    log_size: Logarithm of the patches each key stands for; none: all 1.
    keep: 1 for kept keys, 0 for dropped ones; none: nothing is masked.
    eps: The authors' smoothing of a masked softmax (1e-6). A row sees CLS and itself, so it is
      never empty; without smoothing, masking is exactly as good as removing.

  Returns:
    The attended values.

  References:
    Bolya et al., `ToMe <https://arxiv.org/abs/2210.09461>`_, 2022, Eq. 1 (proportional attention);
    Rao et al., `DynamicViT <https://arxiv.org/abs/2106.02034>`_, 2021, Eq. 11 (masking).
  """
  logits = _logits(q, k, scale, log_size)
  if keep is None and not eps:
    weights = jnp.exp(logits - _peak(logits))
    # Dividing after the product touches n·k numbers instead of n·n.
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return (_weigh(weights, v) / total).astype(v.dtype)
  keep = jnp.ones((k.shape[0], k.shape[2]), logits.dtype) if keep is None else keep
  own = _own_logits(q, k, scale, log_size)[..., None]
  # Relative to what the row sees, or its sum may vanish; the authors' eps is relative to all.
  hidden = jnp.where(keep > 0.5, 0.0, -jnp.inf).astype(logits.dtype)
  seen = logits if eps else logits + hidden[:, None, None]
  peak = jnp.maximum(_peak(seen), jax.lax.stop_gradient(own))
  own = jnp.exp(own - peak) * (1 - keep)[:, None, :, None]
  weights = jnp.exp(jnp.minimum(logits - peak, math.log(_LARGEST_WEIGHT)))
  weights = weights * keep[:, None, None, :]
  total = jnp.sum(weights, axis=-1, keepdims=True) + own + eps
  values = v.astype(weights.dtype)
  smooth = eps / v.shape[2] * jnp.sum(values, axis=2, keepdims=True)
  return ((_weigh(weights, v) + own * values + smooth) / total).astype(v.dtype)


def cls_attention(
  q: Float[Array, "b h k"],
  k: Float[Array, "b h n k"],
  scale: float,
  log_size: Float[Array, "b n"] | None = None,
  keep: Float[Array, "b n"] | None = None,
) -> Float[Array, "b n"]:
  """The CLS token's attention to every token, averaged over the heads.

  It is computed apart from `attend`, as one row, so that the whole map need never exist.

  Args:
    q: The CLS token's query.
    k: All keys.
    scale: Factor of the products.
    log_size: Logarithm of the patches each key stands for; none: all 1.
    keep: 1 for kept keys, 0 for dropped ones, which then score below every kept one.

  Returns:
    Scores in [0, 1]; -1 where dropped.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Sec. 3.2 (importance).
  """
  logits = _logits(q[:, :, None], k, scale, log_size)[:, :, 0]
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
) -> Float[Array, "b n"]:
  """The attention that every token receives, averaged over the heads and the kept queries.

  Args:
    q: Queries.
    k: Keys.
    scale: Factor of the products.
    log_size: Logarithm of the patches each key stands for; none: all 1.
    keep: 1 for kept tokens, 0 for dropped ones, which then score below every kept one.

  Returns:
    Scores in [0, 1]; -1 where dropped.
  """
  logits = _logits(q, k, scale, log_size)
  if keep is None:
    return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=(1, 2))
  kept = keep > 0.5
  weights = jnp.mean(jax.nn.softmax(logits, axis=-1, where=kept[:, None, None, :]), axis=1)
  mean = jnp.mean(weights, axis=1, where=kept[:, :, None])
  return last_if_dropped(mean, keep)


def value_norm(
  v: Float[Array, "b h n k"], keep: Float[Array, "b n"] | None = None
) -> Float[Array, "b n"]:
  """The length of every token's values, all heads together; -1 where dropped."""
  norm = jnp.sqrt(jnp.sum(jnp.square(v.astype(_wide(v))), axis=(1, 3)))
  return last_if_dropped(norm, keep)


def last_if_dropped(
  score: Float[Array, "b n"], keep: Float[Array, "b n"] | None
) -> Float[Array, "b n"]:
  """Scores of at least 0, with -1 where a token is dropped."""
  return score if keep is None else jnp.where(keep > 0.5, score, -1.0)


def _peak(logits: Array) -> Array:
  """The largest logit of each row; no gradient, as softmax is invariant under a shift."""
  return jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))


def _logits(q: Array, k: Array, scale: float, log_size: Array | None) -> Array:
  logits = jnp.einsum("bhqk,bhnk->bhqn", q * scale, k, preferred_element_type=_wide(q))
  return logits if log_size is None else logits + log_size[:, None, None, :]


def _own_logits(q: Array, k: Array, scale: float, log_size: Array | None) -> Array:
  """The diagonal of the logits, [b h n]."""
  own = jnp.sum((q * scale).astype(_wide(q)) * k, axis=-1)
  return own if log_size is None else own + log_size[:, None, :]


def _weigh(weights: Array, v: Array) -> Array:
  return jnp.einsum(
    "bhqn,bhnk->bhqk", weights.astype(v.dtype), v, preferred_element_type=weights.dtype
  )


def _wide(x: Array) -> jnp.dtype:
  """Softmax runs in at least float32."""
  return jnp.promote_types(x.dtype, jnp.float32)
