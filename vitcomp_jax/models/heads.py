"""Heads, by a spec's `pool`: they normalise and pool the last tokens, classify, and count MACs.

The head of a ViT shares the ViT's scope, so that its parameters have timm's names.
"""

from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.models.layers import LayerNorm, Mlp, NormSpec, dense, identity
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.tokens import Tokens
from vitcomp_jax.ops.attention import attend_one

_TORCH_EPS = 1e-5  # PyTorch's default, unlike the other norms'

Read = tuple[Tokens, Array, Array]


class Head(Protocol):
  """Computes features and logits from the tokens after the last layer."""

  def __init__(self, spec: ViTSpec) -> None: ...

  def __call__(self, tokens: Tokens) -> Read:
    """Returns the tokens after the final norm, the pooled features and the logits."""
    ...

  @staticmethod
  def macs(spec: ViTSpec, tokens: Any) -> tuple[Any, int]:
    """Counts the multiply-accumulates of pooling and of the classifier.

    Args:
      spec: The model.
      tokens: Number of tokens after the last layer, an int or a traced scalar.
    """
    ...


def _classifier(spec: ViTSpec) -> Callable[[Array], Array]:
  return dense(spec.num_classes, spec.dtype) if spec.num_classes else identity


class ViTHead(nn.Module):
  """Normalises the tokens, pools them, normalises the features, and classifies them.

  Both norms and the classifier are optional; the spec says which are present.
  """

  spec: ViTSpec

  def setup(self) -> None:
    spec = self.spec
    self.norm = spec.norm_spec(spec.final_norm).make()
    self.fc_norm = spec.norm_spec(spec.fc_norm).make()
    self.head = _classifier(spec)

  def __call__(self, tokens: Tokens) -> Read:
    tokens = tokens.normed(self.norm)
    features = self.fc_norm(self.pooled(tokens))
    return tokens, features, self.head(features)

  def pooled(self, tokens: Tokens) -> Float[Array, "b d"]:
    """Returns one vector for the normalised tokens of each image."""
    raise NotImplementedError

  @staticmethod
  def macs(spec: ViTSpec, tokens: Any) -> tuple[Any, int]:
    del tokens
    return 0.0, spec.num_features * spec.num_classes


class ClsHead(ViTHead):
  """Takes the CLS token as features."""

  def pooled(self, tokens: Tokens) -> Float[Array, "b d"]:
    return tokens.x[:, 0]


class ClsDistHead(nn.Module):
  """Classifies the CLS and the distillation token separately, and averages the logits.

  The features are f[b 2 d]; without classifiers, their mean takes the place of the logits.

  References:
    Touvron et al., `DeiT <https://arxiv.org/abs/2012.12877>`_, 2021, Sec. 4.
  """

  spec: ViTSpec

  def setup(self) -> None:
    self.norm = self.spec.norm_spec().make()
    self.head, self.head_dist = _classifier(self.spec), _classifier(self.spec)

  def __call__(self, tokens: Tokens) -> Read:
    tokens = tokens.normed(self.norm)
    features = tokens.x[:, :2]
    if not self.spec.num_classes:
      return tokens, features, jnp.mean(features, axis=1)
    return tokens, features, (self.head(features[:, 0]) + self.head_dist(features[:, 1])) / 2

  @staticmethod
  def macs(spec: ViTSpec, tokens: Any) -> tuple[Any, int]:
    del tokens
    return 0.0, 2 * spec.width * spec.num_classes


class SizeMeanHead(ViTHead):
  """Takes the mean of the patch tokens, weighted by their sizes, as features.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, the authors' model for MAE.
  """

  def pooled(self, tokens: Tokens) -> Float[Array, "b d"]:
    return size_mean(tokens, 0 if self.spec.pool_prefix else tokens.num_prefix)


class ClsMeanHead(ViTHead):
  """Concatenates the CLS token and the mean of the patch tokens, weighted by size (DINOv2)."""

  def pooled(self, tokens: Tokens) -> Float[Array, "b d"]:
    means = size_mean(tokens, tokens.num_prefix)
    return jnp.concatenate([tokens.x[:, 0], means], axis=1)


def size_mean(tokens: Tokens, start: int) -> Float[Array, "b d"]:
  """Computes Σ s·x / Σ s over the tokens from `start` on, where a masked token has size s = 0.

  No gradient flows through the denominator, as in the authors' model for MAE weights.
  """
  x = tokens.x[:, start:]
  weight = jnp.ones((*x.shape[:2], 1), x.dtype)
  for factor in (tokens.size, tokens.keep):
    if factor is not None:
      weight = weight * factor[:, start:, None].astype(x.dtype)
  return jnp.sum(weight * x, axis=1) / jax.lax.stop_gradient(jnp.sum(weight, axis=1))


class MapHead(ViTHead):
  """Pools the tokens by the attention of a learnt query (SigLIP)."""

  def setup(self) -> None:
    super().setup()
    spec = self.spec
    heads, hidden = spec.pool_heads or spec.num_heads, spec.pool_mlp_dim or spec.mlp_dim
    self.attn_pool = AttentionPool(
      heads, hidden, spec.width, spec.norm_spec(), spec.dtype, spec.activation
    )

  def pooled(self, tokens: Tokens) -> Float[Array, "b d"]:
    return self.attn_pool(tokens, 0 if self.spec.pool_prefix else tokens.num_prefix)

  def probe(self) -> Float[Array, "h d"]:
    """Returns each head's pooling query with the key projection and norm scale folded in."""
    if self.is_initializing():  # no parameters yet
      return jnp.zeros((self.spec.pool_heads or self.spec.num_heads, self.spec.width))
    assert isinstance(self.norm, LayerNorm), "pool_query needs a layer norm"
    return self.norm.variables["params"]["scale"][None] * self.attn_pool.probe()

  @staticmethod
  def macs(spec: ViTSpec, tokens: Any) -> tuple[Any, int]:
    fixed = 2.0 * spec.width * (spec.width + (spec.pool_mlp_dim or spec.mlp_dim))
    seen = tokens if spec.pool_prefix else tokens - spec.num_prefix
    pooling = fixed + seen * (2.0 * spec.width * (spec.width + 1))
    return pooling, spec.width * spec.num_classes


class AttentionPool(nn.Module):
  """SigLIP's head: a learnt query attends to all tokens, and an MLP follows.

  Tokens are weighted by the number of patches they represent; masked tokens are ignored.

  Attributes:
    num_heads: Heads of the query, among which the width is split.
    mlp_dim: Hidden units of the MLP.
    width: Channels of a token.
    norm_spec: Norm before the MLP, as in the layers.
    dtype: Dtype of the computation, as in the layers.
    activation: Activation of the MLP, as in the layers.

  References:
    Zhai et al., `SigLIP <https://arxiv.org/abs/2303.15343>`_, 2023.
  """

  num_heads: int
  mlp_dim: int
  width: int
  norm_spec: NormSpec
  dtype: str | None = None
  activation: str = "gelu"

  def setup(self) -> None:
    latent_init = nn.initializers.truncated_normal(self.width**-0.5)
    self.latent = self.param("latent", latent_init, (1, 1, self.width))
    self.q, self.kv = dense(self.width, self.dtype), dense(2 * self.width, self.dtype)
    self.proj = dense(self.width, self.dtype)
    self.norm = self.norm_spec.make()
    self.mlp = Mlp(self.mlp_dim, self.width, self.dtype, self.activation)

  def __call__(self, tokens: Tokens, start: int = 0) -> Float[Array, "b d"]:
    """Returns one vector for the tokens from `start` on of each image."""
    x = tokens.x[:, start:]
    k, v = (self._by_head(part) for part in jnp.split(self.kv(x), 2, axis=-1))
    q = jnp.broadcast_to(self.query().astype(k.dtype), (k.shape[0], *k.shape[1::2]))
    log_size = None if tokens.size is None else jnp.log(tokens.size[:, start:])
    keep = None if tokens.keep is None else tokens.keep[:, start:]
    y = attend_one(q, k, v, self._scale, log_size, keep)
    y = self.proj(y.reshape(y.shape[0], self.width))
    return y + self.mlp(self.norm(y)[:, None])[:, 0]

  def query(self) -> Float[Array, "1 h k"]:
    """Returns the query per head."""
    return self.q(self.latent).reshape(1, self.num_heads, -1)

  def probe(self) -> Float[Array, "h d"]:
    """Returns each head's scaled query with the key projection folded in."""
    keys = self.kv.variables["params"]["kernel"][:, : self.width]
    keys = keys.reshape(self.width, self.num_heads, -1)
    return self._scale * jnp.einsum("hk,dhk->hd", self.query()[0].astype(keys.dtype), keys)

  @property
  def _scale(self) -> float:
    return (self.width // self.num_heads) ** -0.5

  @nn.nowrap
  def _by_head(self, x: Array) -> Array:
    """Splits channels into heads: [b n d] -> [b h n k]."""
    return x.reshape(*x.shape[:2], self.num_heads, -1).swapaxes(1, 2)


class MeanHead(nn.Module):
  """Classifies the normalised mean of the unmasked tokens with an MLP (CAFormer).

  References:
    Yu et al., `MetaFormer Baselines for Vision <https://arxiv.org/abs/2210.13452>`_, 2022.
  """

  spec: ViTSpec

  def setup(self) -> None:
    spec = self.spec
    self.norm = LayerNorm(spec.norm_eps)
    sizes = 4 * spec.width, spec.num_classes
    self.fc = MlpClassifier(*sizes, spec.dtype) if spec.num_classes else identity

  def __call__(self, tokens: Tokens) -> Read:
    keep = tokens.kept[..., None].astype(tokens.x.dtype)
    features = self.norm(jnp.sum(keep * tokens.x, axis=1) / jnp.sum(keep, axis=1))
    return tokens, features, self.fc(features)

  @staticmethod
  def macs(spec: ViTSpec, tokens: Any) -> tuple[Any, int]:
    """Counts 8·C for each class, as DiffRate's authors do."""
    del tokens
    return 0.0, 8 * spec.width * spec.num_classes


class MlpClassifier(nn.Module):
  """Two projections with a squared ReLU and a norm between them."""

  mlp_dim: int
  num_classes: int
  dtype: str | None

  def setup(self) -> None:
    self.fc1 = dense(self.mlp_dim, self.dtype)
    self.norm = LayerNorm(_TORCH_EPS)
    self.fc2 = dense(self.num_classes, self.dtype)

  def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b c"]:
    return self.fc2(self.norm(jnp.square(jax.nn.relu(self.fc1(x)))))


HEADS: dict[str, type[Head]] = {
  "cls": ClsHead,
  "cls_dist": ClsDistHead,
  "size_mean": SizeMeanHead,
  "cls_mean": ClsMeanHead,
  "map": MapHead,
  "mean": MeanHead,
}
