"""Attention over tokens that stand for several patches, whole or masked."""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array, Float

# Largest factor by which a dropped key may outweigh the kept ones in the gradient of its mask.
_LARGEST_WEIGHT = 1e6


def attend(
  q: Float[Array, "b h q k"],
  k: Float[Array, "b h n k"],
  v: Float[Array, "b h n k"],
  scale: float,
  log_size: Float[Array, "b n"] | None = None,
  keep: Float[Array, "b n"] | None = None,
  eps: float = 0.0,
  form: str = "auto",
) -> Float[Array, "b h q k"]:
  """Proportional attention: each key weighs as much as the patches it stands for.

  With `keep`, no token is removed; instead a row sees the kept keys and itself, so that kept rows
  come out as if the others were gone, while gradients still reach `keep` at dropped keys.

  Args:
    q: Queries, of all tokens or of the first ones.
    k: Keys.
    v: Values.
    scale: Factor of the products, 1/sqrt(k) in a plain ViT.
    log_size: Logarithm of the patches each key stands for; None: all 1.
    keep: 1 for kept keys, 0 for dropped ones; None: nothing is masked.
    eps: The authors' smoothing of a masked softmax (1e-6). A row sees CLS and itself, so it is
      never empty; without smoothing, masking is exactly as good as removing.
    form: What computes it where nothing is masked: `xla`, or `cudnn`, the fused kernel of NVIDIA's
      library (half precision). `auto` takes the latter on a CUDA device, for half precision.

  Returns:
    The attended values.

  References:
    Bolya et al., `ToMe <https://arxiv.org/abs/2210.09461>`_, 2022, Eq. 1 (proportional attention);
    Rao et al., `DynamicViT <https://arxiv.org/abs/2106.02034>`_, 2021, Eq. 11 (masking).
  """
  if keep is None and not eps:
    if form == "cudnn":
      return _cudnn(q, k, v, scale, log_size)
    if form == "auto" and q.dtype.itemsize == 2 and _on_cuda():
      # Of a program that is exported for several platforms, the others get the other form.
      fused = functools.partial(_cudnn, scale=scale, log_size=log_size)
      plain = functools.partial(_plain, scale=scale, log_size=log_size)
      return jax.lax.platform_dependent(q, k, v, cuda=fused, default=plain)
    return _plain(q, k, v, scale, log_size)
  if keep is None:
    keep = jnp.ones((k.shape[0], k.shape[2]), _wide(k))
  if log_size is None:
    log_size = jnp.zeros_like(keep)
  if not eps and q.shape == k.shape:
    return _attend_masked(scale, q, k, v, log_size, keep)
  return _masked(q, k, v, scale, log_size, keep, eps)


def _plain(q: Array, k: Array, v: Array, scale: float, log_size: Array | None) -> Array:
  """In the layout and order that XLA's CPU backend fuses into one kernel."""
  logits = _logits(q, k, scale, log_size)
  weights = jnp.exp(logits - _peak(logits))
  # Dividing after the product touches n·k numbers instead of n·n.
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return (_weigh(weights, v) / total).astype(v.dtype)


def _cudnn(q: Array, k: Array, v: Array, scale: float, log_size: Array | None) -> Array:
  """By cuDNN's kernel, which takes no bias per key: sizes become two more channels of the keys.

  One channel holds the bias in half precision, the other what was rounded away. Channels are then
  filled up with zeros to a multiple of 8, as the kernel asks.
  """
  dim = q.shape[-1]
  if log_size is not None:
    bias = log_size / scale
    high = bias.astype(k.dtype)
    low = (bias - high.astype(bias.dtype)).astype(k.dtype)
    channels = jnp.stack([high, low], axis=-1)[:, None]
    k = jnp.concatenate([k, jnp.broadcast_to(channels, (*k.shape[:3], 2))], axis=-1)
    q = jnp.concatenate([q, jnp.ones((*q.shape[:3], 2), q.dtype)], axis=-1)
  full = -(-q.shape[-1] // 8) * 8
  q, k, v = (
    jnp.pad(x, ((0, 0),) * 3 + ((0, full - x.shape[-1]),)).swapaxes(1, 2) for x in (q, k, v)
  )
  y = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
  return y.swapaxes(1, 2)[..., :dim]


def _on_cuda() -> bool:
  return "cuda" in jax.extend.backend.get_backend().platform_version.lower()


def _masked(
  q: Array, k: Array, v: Array, scale: float, log_size: Array, keep: Array, eps: float
) -> Array:
  logits = _logits(q, k, scale, log_size)
  n = q.shape[2]
  own = _own_logits(q, k[:, :, :n], scale, log_size[:, :n])[..., None]
  # Relative to what the row sees, or its sum may vanish; the authors' eps is relative to all.
  seen = logits if eps else logits + _hidden(keep < 0.5)[:, None, None]
  peak = jnp.maximum(_peak(seen), jax.lax.stop_gradient(own))
  own = jnp.exp(own - peak) * (1 - keep[:, :n])[:, None, :, None]
  weights = jnp.exp(jnp.minimum(logits - peak, math.log(_LARGEST_WEIGHT)))
  weights = weights * keep[:, None, None, :]
  total = jnp.sum(weights, axis=-1, keepdims=True) + own + eps
  values = v.astype(weights.dtype)
  out = _weigh(weights, v) + own * values[:, :, :n]
  if eps:
    out = out + eps / v.shape[2] * jnp.sum(values, axis=2, keepdims=True)
  return (out / total).astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_masked(
  scale: float, q: Array, k: Array, v: Array, log_size: Array, keep: Array
) -> Array:
  """`_masked` without smoothing, whose backward pass needs no [n n] map of the forward pass.

  So a compiler may fuse the forward pass into one kernel, and the maps take no memory between. For
  the same reason dropped keys have a logit of minus infinity: nothing has to pass through them.
  """
  logits = _logits(q, k, scale, log_size + _hidden(keep < 0.5))
  own = (_own_logits(q, k, scale, log_size) + _hidden(keep > 0.5)[:, None])[..., None]
  peak = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), own)
  weights, own = jnp.exp(logits - peak), jnp.exp(own - peak)
  total = jnp.sum(weights, axis=-1, keepdims=True) + own
  return ((_weigh(weights, v) + own * v.astype(own.dtype)) / total).astype(v.dtype)


def _attend_masked_forward(
  scale: float, q: Array, k: Array, v: Array, log_size: Array, keep: Array
) -> tuple[Array, tuple[Array, ...]]:
  out = _attend_masked(scale, q, k, v, log_size, keep)
  return out, (q, k, v, log_size, keep, out)


def _attend_masked_backward(
  scale: float, residuals: tuple[Array, ...], grad: Array
) -> tuple[Array, ...]:
  # Nothing that the forward pass computes is found again behind the barrier, and kept for it.
  q, k, v, log_size, keep, out = jax.lax.optimization_barrier(residuals)
  grad = grad.astype(v.dtype)
  # Keys by queries: so laid out, the sums over queries are plain matrix products.
  logits = _logits(k, q, scale, None) + log_size[:, None, :, None]
  own = _own_logits(q, k, scale, log_size)
  total = jax.nn.logsumexp(logits + _hidden(keep < 0.5)[:, None, :, None], axis=2)
  total = jnp.logaddexp(total, own + _hidden(keep > 0.5)[:, None])  # [b h q]
  slope = jnp.sum(grad.astype(own.dtype) * out, axis=-1)  # [b h q]
  weights = jnp.exp(jnp.minimum(logits - total[:, :, None], math.log(_LARGEST_WEIGHT)))
  change = weights * (_logits(v, grad, 1.0, None) - slope[:, :, None])  # by a logit, if kept
  own = jnp.exp(own - total)
  own_change = own * (_own_logits(v, grad, 1.0, None) - slope)
  column, row = keep[:, None, :, None], (1 - keep)[:, None]
  own_row, change_row = (own * row)[..., None], (own_change * row)[..., None]
  dv = column * _weigh(weights, grad) + own_row * grad
  dk = scale * (column * _weigh(change, q) + change_row * q)
  kept_k = (column * k).astype(k.dtype)
  dq = jnp.einsum(
    "bhnq,bhnk->bhqk", change.astype(k.dtype), kept_k, preferred_element_type=_wide(k)
  )
  dq = scale * (dq + change_row * k)
  by_key = jnp.sum(change, axis=3)  # [b h n]
  dkeep = jnp.sum(by_key - own_change, axis=1)
  dlog_size = jnp.sum(keep[:, None] * by_key + own_change * row, axis=1)
  return (
    dq.astype(q.dtype),
    dk.astype(k.dtype),
    dv.astype(v.dtype),
    dlog_size.astype(log_size.dtype),
    dkeep.astype(keep.dtype),
  )


_attend_masked.defvjp(_attend_masked_forward, _attend_masked_backward)


def attend_one(
  q: Float[Array, "b h k"],
  k: Float[Array, "b h n k"],
  v: Float[Array, "b h n k"],
  scale: float,
  log_size: Float[Array, "b n"] | None = None,
  keep: Float[Array, "b n"] | None = None,
) -> Float[Array, "b h k"]:
  """Proportional attention of one query that is no token, such as a pooling head's.

  With `keep`, dropped keys are not seen; gradients still reach `keep` at them, as in `attend`.

  Args:
    q: The query.
    k: Keys.
    v: Values.
    scale: Factor of the products.
    log_size: Logarithm of the patches each key stands for; None: all 1.
    keep: 1 for kept keys, 0 for dropped ones; None: nothing is masked.
  """
  logits = _logits(q[:, :, None], k, scale, log_size)
  if keep is None:
    weights = jnp.exp(logits - _peak(logits))
  else:
    peak = _peak(logits + _hidden(keep < 0.5)[:, None, None])
    weights = jnp.exp(jnp.minimum(logits - peak, math.log(_LARGEST_WEIGHT)))
    weights = weights * keep[:, None, None]
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return (_weigh(weights, v) / total).astype(v.dtype)[:, :, 0]


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
    log_size: Logarithm of the patches each key stands for; None: all 1.
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
  of_all: bool = False,
) -> Float[Array, "b n"]:
  """The attention that every token receives, averaged over the heads and the kept queries.

  Args:
    q: Queries.
    k: Keys.
    scale: Factor of the products.
    log_size: Logarithm of the patches each key stands for; None: all 1.
    keep: 1 for kept tokens, 0 for dropped ones, which then score below every kept one.
    of_all: Average over dropped queries too, which see the kept keys and themselves. By what they
      pay themselves, dropped tokens then have an order of their own.

  Returns:
    Scores in [0, 1]; below 0 where dropped.
  """
  logits = _logits(q, k, scale, log_size)
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
  """The attention that a query which is no token pays every token, averaged over the heads.

  Args:
    x: Tokens; they are standardised first.
    probe: The query taken through keys and norm, by head, such that its product with a
      standardised token is that of query and key up to a constant, which a softmax does not see.
    size: Patches each token stands for; None: all 1.
    keep: 1 for kept tokens, 0 for dropped ones, which then score below every kept one.

  Returns:
    Scores in [0, 1]; -1 where dropped.
  """
  standard = jax.nn.standardize(x.astype(_wide(x)), epsilon=1e-6)
  logits = jnp.einsum("hd,bnd->bhn", probe.astype(standard.dtype), standard)
  if size is not None:
    logits = logits + jnp.log(size)[:, None]
  where = None if keep is None else keep[:, None] > 0.5
  return last_if_dropped(jnp.mean(jax.nn.softmax(logits, axis=-1, where=where), axis=1), keep)


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


def _hidden(is_hidden: Array) -> Array:
  """Returns the additive mask of logits, -inf where a key is hidden."""
  return jnp.where(is_hidden, -jnp.inf, 0.0)


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
  return jnp.einsum("bhqn,bhnk->bhqk", weights.astype(v.dtype), v, preferred_element_type=_wide(v))


def _wide(x: Array) -> jnp.dtype:
  """Softmax runs in at least float32."""
  return x.dtype if x.dtype.itemsize >= 4 else jnp.dtype("float32")
