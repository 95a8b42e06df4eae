"""A method as a contributor would add it: nothing of it stands anywhere else."""

import dataclasses

from vitcomp_jax.methods.base import Layers, Method
from vitcomp_jax.models.reducers import StaticReducer
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.tokens import AttentionStats, Aux, Tokens, take_tokens
from vitcomp_jax.ops import select


@dataclasses.dataclass(frozen=True)
class KeepShort(StaticReducer):
  """Keeps the tokens whose values are shortest."""

  type_name = "keep_short"

  keep: int
  share: float = 1.0

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]:
    assert stats is not None
    kept = self.count(tokens.x.shape[1])
    length = stats.importance("value_norm", tokens)
    order = select.importance_order(-length, tokens.num_prefix, kept)
    return take_tokens(tokens, order), Aux(kept)

  def count(self, n: int) -> int:
    return min(n, self.keep)


def _after_the_first(spec: ViTSpec, strength: float) -> Layers:
  keep = spec.num_tokens - round(strength * (spec.num_patches - 1))
  second = dataclasses.replace(spec.dense_layers[1], reduce=KeepShort(keep))
  return (spec.dense_layers[0], second, *spec.dense_layers[2:])


METHOD = Method((KeepShort,), {"keep_short": _after_the_first})
