"""A method as a contributor would add it: nothing of it stands anywhere else."""

import dataclasses

from vitcomp_jax.methods.base import Layers, Method
from vitcomp_jax.models.importance import value_norm
from vitcomp_jax.models.reducers import StaticReducer
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.tokens import AttentionStats, Tokens
from vitcomp_jax.ops import select


@dataclasses.dataclass(frozen=True)
class KeepShort(StaticReducer):
  """Keeps the tokens whose values are shortest."""

  type_name = "keep_short"

  keep: int
  share: float = 1.0

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    assert stats is not None
    length = value_norm(stats, tokens)
    kept = self.count(tokens.x.shape[1])
    return tokens.take(select.importance_order(-length, tokens.num_prefix, kept))

  def count(self, n: int) -> int:
    return min(n, self.keep)


def _after_the_first(spec: ViTSpec, strength: float) -> Layers:
  keep = spec.num_tokens - round(strength * (spec.num_patches - 1))
  second = dataclasses.replace(spec.dense_layers[1], reduce=KeepShort(keep))
  return (spec.dense_layers[0], second, *spec.dense_layers[2:])


METHOD = Method((KeepShort,), {"keep_short": _after_the_first})
