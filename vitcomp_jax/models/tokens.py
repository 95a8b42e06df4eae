"""What flows between the layers of a ViT whose tokens can be pruned and merged."""

from typing import Protocol, runtime_checkable

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vitcomp_jax.ops import attention

IMPORTANCES = ("cls", "mean_attention", "value_norm", "random")


class Tokens(flax.struct.PyTreeNode):
  """A batch of token sequences. Shapes: b images, n tokens, d width, p patches."""

  x: Array  # f[b n d]
  size: Array | None  # f[b n] patches a token stands for; None: one each, plain attention
  keep: Array | None  # f[b n] 1 kept, 0 dropped; None: nothing is masked
  source: Array  # i[b p] token that now holds each patch; -1 pruned
  num_prefix: int = flax.struct.field(pytree_node=False)  # never sorted, merged or removed
  num_kept: Array | None = None  # f[] tokens that are not masked, if as many in every image


def first_tokens(tokens: Tokens, count: int) -> Tokens:
  """The first `count` tokens; patches whose token is not among them are pruned."""
  return tokens.replace(
    x=tokens.x[:, :count],
    size=None if tokens.size is None else tokens.size[:, :count],
    keep=None if tokens.keep is None else tokens.keep[:, :count],
    source=jnp.where(tokens.source < count, tokens.source, -1),
  )


class AttentionStats(flax.struct.PyTreeNode):
  """What a reducer may want to know of a layer's attention; what none asks for is not computed."""

  q: Array  # f[b h n k] queries
  k: Array  # f[b h n k] keys
  v: Array  # f[b h n k] values
  log_size: Array | None  # f[b n] added to the logits of each key
  keep: Array | None  # as in Tokens
  scale: float = flax.struct.field(pytree_node=False)  # factor of the products

  def importance(self, metric: str) -> Array:
    """How much each token matters, f[b n]; -1 where masked.

    Args:
      metric: One of `IMPORTANCES`: the attention that CLS pays a token (mean over heads), the
        attention that it receives from all (mean over heads and queries), the length of its values,
        or random numbers, the same for every image.
    """
    q, k, rest = self.q, self.k, (self.scale, self.log_size, self.keep)
    if metric == "cls":
      return attention.cls_attention(q[:, :, 0], k, *rest)
    if metric == "mean_attention":
      return attention.mean_attention(q, k, *rest)
    if metric == "value_norm":
      return attention.value_norm(self.v, self.keep)
    # A prefix of the same numbers for any count, so that masking sees what removing does.
    score = jnp.asarray(np.random.default_rng(0).random(k.shape[2], np.float32))
    return attention.last_if_dropped(jnp.tile(score, (k.shape[0], 1)), self.keep)

  @property
  def mean_key(self) -> Array:
    """Each token's key, mean over heads, f[b n k]: what ToMe compares."""
    return self.k.mean(axis=1)


class Aux(flax.struct.PyTreeNode):
  """What a loss may want to know of one reduction."""

  count: Array | int  # tokens after it; traced, with straight-through gradients, in a search


class Output(flax.struct.PyTreeNode):
  """All a forward pass gives."""

  logits: Array  # f[b classes]; the features where the model has no classifier
  features: Array  # f[b d] pooled, what the classifier sees
  tokens: Tokens  # after the final norm
  layers: tuple[Tokens, ...]  # after each layer
  aux: tuple[tuple[Aux, Aux], ...]  # of each layer's two reductions, before and after attention


@runtime_checkable
class TokenReducer(Protocol):
  """Removes tokens, or masks them, between two parts of a layer."""

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]: ...

  def count(self, n: int) -> int:
    """Tokens that remain of `n`."""
    ...
