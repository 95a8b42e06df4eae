"""Attention over tokens that may represent several patches, with or without a mask."""

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
  v: Float[Array, "b h n v"],
  scale: float,
  log_size: Float[Array, "b n"] | None = None,
  keep: Float[Array, "b n"] | None = None,
  eps: float = 0.0,
  form: str = "auto",
  bias: Float[Array, "#b h q n"] | None = None,
) -> Float[Array, "b h q v"]:
  """Computes proportional attention: keys are weighted by the number of patches they represent.

  `keep` masks tokens instead of removing them. Each query attends to the kept keys and to its own
  key, so the outputs of kept tokens are the same as if the dropped ones had been removed. Gradients
  still reach `keep` at dropped keys.

  Args:
    q: Queries of all tokens, or of the first few.
    k: Keys.
    v: Values.
    scale: Scale of the logits, 1/sqrt(k) in a plain ViT.
    log_size: Logarithm of the number of patches that each key represents; None: one each.
    keep: 1 for kept keys, 0 for dropped ones; None: nothing is masked.
    eps: Smoothing of the masked softmax, which the authors set to 1e-6. Without it, masking is
      exactly equivalent to removing; no row is empty, as each query attends to CLS and itself.
    form: Implementation without a mask: `xla`, or `cudnn`, NVIDIA's fused kernel (half precision).
      `auto` selects `cudnn` on CUDA devices in half precision.
    bias: Added to the logits of each query and key, such as a relative position bias; if given,
      `form` is ignored and `xla` is used.

  Returns:
    The attended values.

  References:
    Bolya et al., `ToMe <https://arxiv.org/abs/2210.09461>`_, 2022, Eq. 1 (proportional attention);
    Rao et al., `DynamicViT <https://arxiv.org/abs/2106.02034>`_, 2021, Eq. 11 (masking).
  """
  if keep is None and not eps:
    if bias is not None:
      return _plain(q, k, v, scale, log_size, bias)
    if form == "cudnn":
      return _cudnn(q, k, v, scale, log_size)
    if form == "auto" and q.dtype.itemsize == 2 and _on_cuda():
      # In a program exported for several platforms, those without CUDA use the plain form.
      fused = functools.partial(_cudnn, scale=scale, log_size=log_size)
      plain = functools.partial(_plain, scale=scale, log_size=log_size)
      return jax.lax.platform_dependent(q, k, v, cuda=fused, default=plain)
    return _plain(q, k, v, scale, log_size)
  if keep is None:
    keep = jnp.ones((k.shape[0], k.shape[2]), wide(k))
  if log_size is None:
    log_size = jnp.zeros_like(keep)
  if not eps and q.shape == k.shape and bias is None:
    return _attend_masked(scale, q, k, v, log_size, keep)
  return _masked(q, k, v, scale, log_size, keep, eps, bias)


def _plain(
  q: Array, k: Array, v: Array, scale: float, log_size: Array | None, bias: Array | None = None
) -> Array:
  """Computes attention in the layout and order that XLA's CPU backend fuses into one kernel."""
  logits = logits_of(q, k, scale, log_size, bias)
  weights = jnp.exp(logits - _peak(logits))
  # Dividing after the product takes n·k divisions instead of n·n.
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return (_weigh(weights, v) / total).astype(v.dtype)


def _cudnn(q: Array, k: Array, v: Array, scale: float, log_size: Array | None) -> Array:
  """Computes attention with cuDNN's kernel, passing sizes as two more channels of the keys.

  The kernel takes no bias per key. One channel holds the bias in half precision, the other its
  rounding error. Queries, keys and values are then padded with zeros to the same number of
  channels, a multiple of 8 as the kernel requires.
  """
  dim = v.shape[-1]
  if log_size is not None:
    bias = log_size / scale
    high = bias.astype(k.dtype)
    low = (bias - high.astype(bias.dtype)).astype(k.dtype)
    channels = jnp.stack([high, low], axis=-1)[:, None]
    k = jnp.concatenate([k, jnp.broadcast_to(channels, (*k.shape[:3], 2))], axis=-1)
    q = jnp.concatenate([q, jnp.ones((*q.shape[:3], 2), q.dtype)], axis=-1)
  full = -(-max(q.shape[-1], dim) // 8) * 8
  q, k, v = (
    jnp.pad(x, ((0, 0),) * 3 + ((0, full - x.shape[-1]),)).swapaxes(1, 2) for x in (q, k, v)
  )
  y = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
  return y.swapaxes(1, 2)[..., :dim]


def _on_cuda() -> bool:
  return "cuda" in jax.extend.backend.get_backend().platform_version.lower()


def _masked(
  q: Array,
  k: Array,
  v: Array,
  scale: float,
  log_size: Array,
  keep: Array,
  eps: float,
  bias: Array | None = None,
) -> Array:
  logits = logits_of(q, k, scale, log_size, bias)
  n = q.shape[2]
  own = _own_logits(q, k[:, :, :n], scale, log_size[:, :n])[..., None]
  if bias is not None:
    own = own + jnp.diagonal(bias, axis1=2, axis2=3)[..., None]
  # The peak is over the keys that a row sees, or its sum may underflow. The authors' eps is
  # relative to the peak over all keys.
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
  """Computes `_masked` without smoothing, and stores no [n n] map for the backward pass.

  The compiler may therefore fuse the forward pass into one kernel, and no map stays in memory until
  the backward pass. This form is never differentiated, so the logits of dropped keys can be minus
  infinity.
  """
  logits = logits_of(q, k, scale, log_size + _hidden(keep < 0.5))
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
  # The barrier stops XLA from reusing values of the forward pass, which it would have to store.
  q, k, v, log_size, keep, out = jax.lax.optimization_barrier(residuals)
  grad = grad.astype(v.dtype)
  # With logits laid out as keys by queries, sums over queries are plain matrix products.
  logits = logits_of(k, q, scale, None) + log_size[:, None, :, None]
  own = _own_logits(q, k, scale, log_size)
  total = jax.nn.logsumexp(logits + _hidden(keep < 0.5)[:, None, :, None], axis=2)
  total = jnp.logaddexp(total, own + _hidden(keep > 0.5)[:, None])  # [b h q]
  slope = jnp.sum(grad.astype(own.dtype) * out, axis=-1)  # [b h q]
  weights = jnp.exp(jnp.minimum(logits - total[:, :, None], math.log(_LARGEST_WEIGHT)))
  change = weights * (logits_of(v, grad, 1.0, None) - slope[:, :, None])  # w.r.t. a logit, if kept
  own = jnp.exp(own - total)
  own_change = own * (_own_logits(v, grad, 1.0, None) - slope)
  column, row = keep[:, None, :, None], (1 - keep)[:, None]
  own_row, change_row = (own * row)[..., None], (own_change * row)[..., None]
  dv = column * _weigh(weights, grad) + own_row * grad
  dk = scale * (column * _weigh(change, q) + change_row * q)
  kept_k = (column * k).astype(k.dtype)
  dq = jnp.einsum("bhnq,bhnk->bhqk", change.astype(k.dtype), kept_k, preferred_element_type=wide(k))
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
  """Computes proportional attention of one query that is not a token, such as a pooling head's.

  The query does not attend to keys that `keep` drops. Gradients still reach `keep` there, as in
  `attend`.

  Args:
    q: The query.
    k: Keys.
    v: Values.
    scale: Scale of the logits.
    log_size: Logarithm of the number of patches that each key represents; None: one each.
    keep: 1 for kept keys, 0 for dropped ones; None: nothing is masked.
  """
  logits = logits_of(q[:, :, None], k, scale, log_size)
  if keep is None:
    weights = jnp.exp(logits - _peak(logits))
  else:
    peak = _peak(logits + _hidden(keep < 0.5)[:, None, None])
    weights = jnp.exp(jnp.minimum(logits - peak, math.log(_LARGEST_WEIGHT)))
    weights = weights * keep[:, None, None]
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return (_weigh(weights, v) / total).astype(v.dtype)[:, :, 0]


def _hidden(is_hidden: Array) -> Array:
  """Returns the additive mask of the logits, -inf where a key is hidden."""
  return jnp.where(is_hidden, -jnp.inf, 0.0)


def _peak(logits: Array) -> Array:
  """Returns the largest logit of each row, without a gradient: shifts do not change softmax."""
  return jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))


def logits_of(
  q: Array, k: Array, scale: float, log_size: Array | None, bias: Array | None = None
) -> Array:
  """Computes the logits of queries and keys, f[b h q n]; see `attend`."""
  logits = jnp.einsum("bhqk,bhnk->bhqn", q * scale, k, preferred_element_type=wide(q))
  if bias is not None:
    logits = logits + bias
  return logits if log_size is None else logits + log_size[:, None, None, :]


def _own_logits(q: Array, k: Array, scale: float, log_size: Array | None) -> Array:
  """Computes the diagonal of the logits, [b h n]."""
  own = jnp.sum((q * scale).astype(wide(q)) * k, axis=-1)
  return own if log_size is None else own + log_size[:, None, :]


def _weigh(weights: Array, v: Array) -> Array:
  return jnp.einsum("bhqn,bhnk->bhqk", weights.astype(v.dtype), v, preferred_element_type=wide(v))


def wide(x: Array) -> jnp.dtype:
  """Returns the dtype of the softmax, at least float32."""
  return x.dtype if x.dtype.itemsize >= 4 else jnp.dtype("float32")
