"""ToMe: merges the most similar tokens of every layer.

Bolya et al., `ToMe <https://arxiv.org/abs/2210.09461>`_, ICLR 2023. It learns nothing.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.base import Layers, Method, Schedule
from vitcomp_jax.models.reducers import StaticReducer
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.tokens import AttentionStats, Tokens
from vitcomp_jax.ops import merge


@dataclasses.dataclass(frozen=True)
class BipartiteMerge(StaticReducer):
  """ToMe's reduction: merges tokens at even positions into similar ones at odd positions.

  Attributes:
    remove: Tokens to merge away, from 1 to half of those after the prefix.

  References:
    Bolya et al., `ToMe <https://arxiv.org/abs/2210.09461>`_, 2022, Sec. 3.
  """

  type_name = "bipartite_merge"

  remove: int

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    assert stats is not None, "BipartiteMerge needs the attention's keys"
    order, receiver = merge.bipartite_match(stats.mean_key, self.remove, tokens.num_prefix)
    tokens = tokens.take(order)
    x, size = merge.merge_weighted(tokens.x, tokens.sizes, receiver)
    return tokens.merge(x, size, receiver)

  def count(self, n: int) -> int:
    return n - self.remove

  def counts(self, n: int) -> tuple[int, int]:
    return n, self.count(n)

  def check(self, n: int, num_prefix: int, num_tokens: int, where: str) -> None:
    most = (n - num_prefix) // 2
    if self.remove > most:
      raise UserError(
        f"{where}: expected remove to be at most {most}, half of the tokens behind the prefix, got "
        f"{self.remove}."
      )


def tome_counts(r: int | Sequence[int | float], depth: int) -> list[int]:
  """Returns the number of tokens that ToMe should merge away in each layer.

  Args:
    r: One number for every layer; a list with a number per layer, padded with 0; or a tuple of the
      mean and an inflection, from -1 (falling to 0) through 0 (constant) to 1 (rising from 0).
    depth: Number of layers.

  References:
    Bolya et al., `ToMe <https://arxiv.org/abs/2210.09461>`_, 2022, Sec. 4.1 (schedules).
  """
  if isinstance(r, int):
    return [r] * depth
  if isinstance(r, tuple) and len(r) == 2:
    mean, inflection = r
    least = int(mean * (1 - inflection))
    step = (2 * mean - least - least) / (depth - 1)
    return [int(least + step * layer) for layer in range(depth)]
  return [int(count) for count in r] + [0] * (depth - len(r))


def layers(spec: ViTSpec, r: int | Sequence[int | float], prop_attn: bool = True) -> Layers:
  """Makes ToMe's layers.

  Args:
    spec: The model.
    r: Tokens to merge, see `tome_counts`; at most half of a layer's tokens after the prefix.
    prop_attn: Whether attention weights tokens by size; ToMe's authors do not do so for MAE.
  """
  made, n = [], 0
  for i, (layer, asked) in enumerate(
    zip(spec.dense_layers, tome_counts(r, spec.depth), strict=True)
  ):
    n = spec.starts.get(i, n)
    remove = min(asked, (n - spec.num_prefix) // 2)
    n -= remove
    reduce = BipartiteMerge(remove) if remove else layer.reduce
    made.append(dataclasses.replace(layer, reduce=reduce, size_bias=prop_attn))
  return tuple(made)


def _growing(power: float) -> Schedule:
  """Returns ToMe with an r that grows as a power of depth; its cumulative sum is rounded."""

  def at(spec: ViTSpec, strength: float) -> Layers:
    weights = np.arange(1, spec.depth + 1) ** power
    # At full strength even the first layer merges half of its tokens.
    removed = np.round(strength * spec.num_patches / 2 * np.cumsum(weights))
    # ToMe's authors use no proportional attention for MAE.
    r = np.diff(removed, prepend=0).astype(int).tolist()
    return layers(spec, r, prop_attn=spec.pool != "size_mean")

  return at


METHOD = Method((BipartiteMerge,), {"tome": _growing(power=0.0), "tome_late": _growing(power=2.0)})
