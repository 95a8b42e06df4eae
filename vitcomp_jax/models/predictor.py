"""DynamicViT's prediction modules: which tokens to keep, told from the tokens themselves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.models.tokens import AttentionStats, Aux, Tokens, mark_pruned, take_tokens
from vitcomp_jax.ops import select

_kernel_init = nn.initializers.truncated_normal(0.02)


class _Predictor(nn.Module):
  """A small network that scores tokens; submodules are named by their places in the authors'."""

  @nn.nowrap
  def _layer(self, name: str, features: int) -> nn.Dense:
    return nn.Dense(features, kernel_init=_kernel_init, name=name)

  @nn.nowrap
  def _log_probability(
    self, x: Float[Array, "b p d"], keep: Float[Array, "b p"]
  ) -> Float[Array, "b p 2"]:
    """Of keeping each token, and of dropping it (Eq. 1-6)."""
    width = x.shape[-1]
    # PyTorch's default epsilon, unlike the backbone's.
    x = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="in_conv_0")(x)
    x = nn.gelu(self._layer("in_conv_1", width)(x), approximate=False)
    local, whole = jnp.split(x, 2, axis=-1)
    weight = keep[..., None].astype(x.dtype)
    # An image may have lost all of its patches; the authors' mean is not a number then.
    count = jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1)
    mean = jnp.sum(whole * weight, axis=1, keepdims=True) / count
    x = jnp.concatenate([local, jnp.broadcast_to(mean, whole.shape)], axis=-1)
    x = nn.gelu(self._layer("out_conv_0", width // 2)(x), approximate=False)
    x = nn.gelu(self._layer("out_conv_2", width // 4)(x), approximate=False)
    return jax.nn.log_softmax(self._layer("out_conv_4", 2)(x))


class PredictorSelect(_Predictor):
  """DynamicViT's reduction: keeps the tokens that a small network scores highest.

  Attributes:
    keep: Tokens that are kept, prefix included.
    ratio: Share of all patches that is to be kept while training; `keep` is rounded down from it.

  References:
    Rao et al., `DynamicViT <https://arxiv.org/abs/2106.02034>`_, 2021, Sec. 3.2.
  """

  keep: int
  ratio: float = 1.0

  @nn.compact
  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]:
    n, prefix = tokens.x.shape[1], tokens.num_prefix
    ones = jnp.ones(tokens.x.shape[:2], tokens.x.dtype)
    score = self._log_probability(tokens.x[:, prefix:], ones[:, prefix:])[..., 0]
    if self.keep >= n:
      return tokens, Aux(n)
    score = jnp.concatenate([ones[:, :prefix].astype(score.dtype), score], axis=1)
    order = select.importance_order(score, prefix, self.keep)
    return take_tokens(tokens, order), Aux(self.keep)

  def count(self, n: int) -> int:
    return min(n, self.keep)


class PredictorMask(_Predictor):
  """`PredictorSelect` by masking, for training: each token is kept or dropped at random.

  The decision is drawn by the Gumbel-softmax trick, hard in the forward pass with the gradient of
  the soft one; the random stream is `gumbel`. A token that was dropped once stays dropped.
  """

  @nn.compact
  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]:
    prefix = tokens.num_prefix
    ones = jnp.ones(tokens.x.shape[:2], tokens.x.dtype)
    before = ones if tokens.keep is None else tokens.keep
    logits = self._log_probability(tokens.x[:, prefix:], before[:, prefix:])
    noise = jax.random.gumbel(self.make_rng("gumbel"), logits.shape, logits.dtype)
    soft = jax.nn.softmax(logits + noise)[..., 0]
    hard = (soft > 0.5).astype(soft.dtype)
    decision = hard - jax.lax.stop_gradient(soft) + soft
    keep = jnp.concatenate([ones[:, :prefix], decision], axis=1) * before
    dropped = jax.lax.stop_gradient(keep < 0.5)
    tokens = mark_pruned(tokens, dropped).replace(keep=keep)
    return tokens, Aux(jnp.sum(jax.lax.stop_gradient(keep)) / len(keep))

  def count(self, n: int) -> int:
    """All tokens stay, masked or not."""
    return n
