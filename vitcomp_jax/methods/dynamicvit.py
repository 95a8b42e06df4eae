"""DynamicViT: small networks between the layers learn which tokens to keep.

Rao et al., `DynamicViT <https://arxiv.org/abs/2106.02034>`_, NeurIPS 2021. It learns weights
only, without a search: the stage `finetune` trains a plan with prediction modules.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.methods.base import Layers, Method, quarters
from vitcomp_jax.models.reducers import StaticReducer
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import AttentionStats, Output, Tokens
from vitcomp_jax.ops import select

RATIO_WEIGHT = 2.0  # the authors', for the loss averaged over the places
_kernel_init = nn.initializers.truncated_normal(0.02)


class _Predictor(nn.Module):
  """Scores tokens with a small network, whose submodules have the authors' names."""

  @nn.nowrap
  def _layer(self, name: str, features: int) -> nn.Dense:
    return nn.Dense(features, kernel_init=_kernel_init, name=name)

  @nn.nowrap
  def _log_probability(
    self, x: Float[Array, "b p d"], keep: Float[Array, "b p"]
  ) -> Float[Array, "b p 2"]:
    """Returns the log-probability of keeping and of dropping each token (Eq. 1-6)."""
    width = x.shape[-1]
    # PyTorch's default epsilon, unlike the backbone's.
    x = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="in_conv_0")(x)
    x = nn.gelu(self._layer("in_conv_1", width)(x), approximate=False)
    local, whole = jnp.split(x, 2, axis=-1)
    weight = keep[..., None].astype(x.dtype)
    # An image may have no patches left, which makes the authors' mean NaN.
    count = jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1)
    mean = jnp.sum(whole * weight, axis=1, keepdims=True) / count
    x = jnp.concatenate([local, jnp.broadcast_to(mean, whole.shape)], axis=-1)
    x = nn.gelu(self._layer("out_conv_0", width // 2)(x), approximate=False)
    x = nn.gelu(self._layer("out_conv_2", width // 4)(x), approximate=False)
    return jax.nn.log_softmax(self._layer("out_conv_4", 2)(x))


class PredictorSelect(StaticReducer, _Predictor):
  """DynamicViT's reduction: keeps the tokens that a small network scores highest.

  Attributes:
    keep: Tokens to keep, prefix included.
    ratio: Share of all patches to keep while training; `keep` is rounded down from it.

  References:
    Rao et al., `DynamicViT <https://arxiv.org/abs/2106.02034>`_, 2021, Sec. 3.2.
  """

  type_name = "predictor_select"
  before_attention = True

  keep: int
  ratio: float = 1.0

  @nn.compact
  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    n, prefix = tokens.x.shape[1], tokens.num_prefix
    ones = jnp.ones(tokens.x.shape[:2], tokens.x.dtype)
    score = self._log_probability(tokens.x[:, prefix:], ones[:, prefix:])[..., 0]
    if self.keep >= n:
      return tokens
    score = jnp.concatenate([ones[:, :prefix].astype(score.dtype), score], axis=1)
    order = select.importance_order(score, prefix, self.keep)
    return tokens.take(order)

  def count(self, n: int) -> int:
    return min(n, self.keep)


class PredictorMask(_Predictor):
  """`PredictorSelect` as a mask, for training: each token is kept or dropped at random.

  Decisions are drawn by the straight-through Gumbel-softmax, from the random stream `gumbel`. They
  are hard in the forward pass, and have the soft gradient. A dropped token stays dropped.
  """

  @nn.compact
  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    prefix, before = tokens.num_prefix, tokens.kept
    logits = self._log_probability(tokens.x[:, prefix:], before[:, prefix:])
    noise = jax.random.gumbel(self.make_rng("gumbel"), logits.shape, logits.dtype)
    soft = jax.nn.softmax(logits + noise)[..., 0]
    hard = (soft > 0.5).astype(soft.dtype)
    decision = hard - jax.lax.stop_gradient(soft) + soft
    keep = jnp.concatenate([before[:, :prefix], decision * before[:, prefix:]], axis=1)
    return tokens.mask(jax.lax.stop_gradient(keep < 0.5), keep)

  def count(self, n: int) -> int:
    """Returns `n`: all tokens stay, masked or not."""
    return n


def layers(spec: ViTSpec, places: Sequence[int], ratios: Sequence[int | float]) -> Layers:
  """Makes DynamicViT's layers, whose prediction modules must be trained.

  Args:
    spec: The model.
    places: Layers before which tokens are dropped.
    ratios: Share of all patches that each place keeps, rounded down.

  References:
    Rao et al., `DynamicViT <https://arxiv.org/abs/2106.02034>`_, 2021, Sec. 3.
  """
  spec.check_plain("dynamicvit")
  made = list(spec.dense_layers)
  for place, ratio in zip(places, ratios, strict=True):
    keep = max(int(spec.num_patches * ratio), 1) + spec.num_prefix
    made[place] = dataclasses.replace(made[place], select=PredictorSelect(keep, float(ratio)))
  return tuple(made)


def _after_quarters(spec: ViTSpec, strength: float) -> Layers:
  """Keeps a ratio, its square and its cube at the three quarter points, as the authors do."""
  return layers(spec, quarters(spec), [(1 - strength) ** power for power in (1, 2, 3)])


def training_layers(layers: tuple[LayerSpec, ...], mask_eps: float = 0.0) -> tuple[LayerSpec, ...]:
  """Returns layers that mask tokens at random, as their prediction modules decide.

  Args:
    layers: Static layers with prediction modules.
    mask_eps: Smoothing of the masked softmax; the authors use 1e-6.
  """
  return tuple(
    dataclasses.replace(
      layer,
      select=PredictorMask() if isinstance(layer.select, PredictorSelect) else layer.select,
      mask_eps=mask_eps,
    )
    for layer in layers
  )


def places(layers: tuple[LayerSpec, ...]) -> list[int]:
  """Returns the layers that have a prediction module."""
  return [i for i, layer in enumerate(layers) if isinstance(layer.select, PredictorSelect)]


def ratio_loss(spec: ViTSpec, layers: tuple[LayerSpec, ...], out: Output) -> Float[Array, ""]:
  """Computes the squared difference between the kept share of patches and the ratio (Eq. 12).

  Args:
    spec: The model.
    layers: Static layers, which hold the ratios.
    out: Output of the training layers.

  Returns:
    The squared difference, averaged over images and summed over places.
  """
  total = jnp.zeros((), out.tokens.x.dtype)
  for layer, tokens in zip(layers, out.layers, strict=True):
    if isinstance(layer.select, PredictorSelect) and tokens.keep is not None:
      share = jnp.mean(tokens.keep[:, spec.num_prefix :], axis=1)
      total = total + jnp.mean((share - layer.select.ratio) ** 2)
  return total


def token_distance(tokens: Tokens, teacher: Tokens) -> Float[Array, ""]:
  """Computes the mean squared distance between the kept patch tokens and a teacher's (Eq. 10).

  Args:
    tokens: Tokens after the last layer, masked ones in place.
    teacher: The dense model's tokens.
  """
  prefix = tokens.num_prefix
  square = jnp.mean((tokens.x - teacher.x)[:, prefix:] ** 2, axis=2)
  keep = tokens.kept[:, prefix:]
  return jnp.sum(square * keep) / jnp.maximum(jnp.sum(keep), 1)


METHOD = Method((PredictorSelect,), {"dynamicvit": _after_quarters}, is_trained=True)
