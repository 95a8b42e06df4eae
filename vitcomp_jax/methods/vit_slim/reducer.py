"""ViT-Slim's static reduction: keeps the same patch positions in every image."""

import dataclasses
import reprlib

import jax.numpy as jnp

from vitcomp_jax.errors import UserError
from vitcomp_jax.models.gates import Gate, HardMask
from vitcomp_jax.models.reducers import StaticReducer
from vitcomp_jax.models.tokens import AttentionStats, Tokens


@dataclasses.dataclass(frozen=True)
class KeepPositions(StaticReducer):
  """Keeps the tokens at fixed positions, the same for every image.

  Attributes:
    positions: Positions among the model's input tokens, ascending, including all of the prefix.
  """

  type_name = "keep_positions"
  before_attention = True
  is_fixed = True

  positions: tuple[int, ...]

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    prefix = tokens.num_prefix
    patches = jnp.array(self.positions[prefix:], jnp.int32) - prefix
    # Earlier layers may have dropped other patches, so look up the current positions.
    order = jnp.concatenate(
      [
        jnp.broadcast_to(jnp.arange(prefix), (tokens.x.shape[0], prefix)),
        tokens.source[:, patches],
      ],
      axis=1,
    )
    return tokens.take(order)

  def count(self, n: int) -> int:
    return min(n, len(self.positions))

  def token_gate(self, num_tokens: int) -> Gate:
    return HardMask((1, num_tokens, 1), self.positions)

  def check(self, n: int, num_prefix: int, num_tokens: int, where: str) -> None:
    whole = self.positions[:num_prefix] == tuple(range(num_prefix))
    if not whole or not num_prefix < len(self.positions) or self.positions[-1] >= num_tokens:
      raise UserError(
        f"{where}: expected positions below {num_tokens} that begin with all {num_prefix} prefix "
        f"tokens and have a patch, got {reprlib.repr(self.positions)}."
      )
