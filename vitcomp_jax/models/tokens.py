"""What flows between the layers of a ViT whose tokens can be pruned and merged."""

from typing import Protocol, runtime_checkable

import flax.struct
from jaxtyping import Array


class Tokens(flax.struct.PyTreeNode):
  """A batch of token sequences. Shapes: b images, n tokens, d width, p patches."""

  x: Array  # f[b n d]
  size: Array | None  # f[b n] patches a token stands for; None: one each, plain attention
  keep: Array | None  # f[b n] 1 kept, 0 dropped; None: nothing is masked
  source: Array  # i[b p] token that now holds each patch; -1 pruned
  num_prefix: int = flax.struct.field(pytree_node=False)  # never sorted, merged or removed


class AttentionStats(flax.struct.PyTreeNode):
  """What a reducer may want to know of a layer's attention."""

  cls_attn: Array  # f[b n] attention of CLS to each token, mean over heads; -1 where masked


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
