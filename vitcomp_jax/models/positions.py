"""Position embeddings: added to tokens, as rotations of queries and keys, or as attention bias."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.tokens import Tokens


class AbsolutePositions(nn.Module):
  """Adds a learnt embedding to each token before the first layer.

  It shares the ViT's scope, so its parameter is `pos_embed`, f[1 rows d]. Additions do not count
  as MACs.
  """

  spec: ViTSpec

  def setup(self) -> None:
    spec = self.spec
    shape = (1, spec.pos_prefix + spec.num_patches, spec.width)
    self.pos_embed = self.param("pos_embed", nn.initializers.truncated_normal(0.02), shape)

  def __call__(
    self, prefix: Float[Array, "b m d"], patches: Float[Array, "b p d"]
  ) -> Float[Array, "b n d"]:
    """Returns the sequence of prefix and patches, with positions."""
    positions = self.pos_embed.astype(patches.dtype)
    if self.spec.pos_on_prefix:
      return jnp.concatenate([prefix, patches], axis=1) + positions
    return jnp.concatenate([prefix, patches + positions], axis=1)


class NoPositions(nn.Module):
  """Adds nothing: positions enter only through attention."""

  spec: ViTSpec

  def __call__(
    self, prefix: Float[Array, "b m d"], patches: Float[Array, "b p d"]
  ) -> Float[Array, "b n d"]:
    return jnp.concatenate([prefix, patches], axis=1)


POSITIONS: dict[str, type[nn.Module]] = {"absolute": AbsolutePositions, "none": NoPositions}


class RotaryAngles(nn.Module):
  """Computes the angles of a model's rotary embedding.

  The kind `mixed` has the parameter `freqs`, f[2 l h k//2].
  """

  spec: ViTSpec

  def setup(self) -> None:
    spec = self.spec
    assert spec.rotary is not None
    if spec.rotary.kind == "mixed":
      shape = (2, spec.depth, spec.num_heads, spec.width // spec.num_heads // 2)
      self.freqs = self.param("freqs", nn.initializers.normal(1.0), shape)

  def __call__(self, layer: int) -> Float[Array, "#h n r"]:
    """Returns the angles of all tokens at a layer; those of the prefix are 0."""
    spec, rotary = self.spec, self.spec.rotary
    assert rotary is not None
    if rotary.kind == "mixed":
      places, freqs = rotary.places(spec.grid), self.freqs[:, layer].astype(jnp.float32)
      angles = jnp.einsum("pa,ahk->hpk", places, freqs, precision="highest")
    else:
      angles = jnp.asarray(rotary.angles(spec.grid, spec.width // spec.num_heads))[None]
    return jnp.pad(angles, ((0, 0), (spec.num_prefix, 0), (0, 0)))


class RelativeBias(nn.Module):
  """Looks up the relative position bias of attention; the first token is CLS.

  Its parameter is `relative_position_bias_table`, f[(2r-1)(2c-1)+3 h] for a grid of r rows and c
  columns; the last three rows are for CLS to patches, patches to CLS, and CLS to itself.

  Attributes:
    grid: Rows and columns of patches.
    num_heads: Attention heads.

  References:
    Bao et al., `BEiT <https://arxiv.org/abs/2106.08254>`_, 2021.
  """

  grid: tuple[int, int]
  num_heads: int

  def setup(self) -> None:
    rows, columns = self.grid
    shape = (2 * rows - 1) * (2 * columns - 1) + 3, self.num_heads
    self.relative_position_bias_table = self.param(
      "relative_position_bias_table", nn.initializers.zeros, shape
    )

  def __call__(self) -> Float[Array, "h n n"]:
    """Returns the bias of each pair of query and key."""
    return self.relative_position_bias_table[relative_index(self.grid)].transpose(2, 0, 1)


def relative_index(grid: tuple[int, int]) -> np.ndarray:
  """Returns the row of the bias table for each pair of query and key, i[n n]."""
  rows, columns = grid
  row, column = (axis.ravel() for axis in np.indices(grid))
  down = row[:, None] - row[None] + rows - 1
  right = column[:, None] - column[None] + columns - 1
  last = (2 * rows - 1) * (2 * columns - 1)
  index = np.full((row.size + 1,) * 2, last)
  index[1:, 0] = last + 1
  index[0, 0] = last + 2
  index[1:, 1:] = down * (2 * columns - 1) + right
  return index


def by_origin(values: Array, tokens: Tokens) -> Array:
  """Selects, from a table with a row for each initial token, the rows of the remaining tokens.

  A merged token has the position of its receiver. A fused token did not start as a patch, so it has
  no position and gets a row of zeros.

  Args:
    values: Table, f[h n *] or f[b h n *], with a row for each token that the model started with.
    tokens: The remaining tokens.

  Returns:
    f[b h n *], or f[1 h n *] as long as no token has been moved.
  """
  values = values if values.ndim == 4 else values[None]
  if tokens.is_in_order:
    return values
  assert tokens.origin is not None
  prefix, zeros = tokens.num_prefix, values.shape[2]
  place = jnp.arange(tokens.origin.shape[1])[None]
  of_patch = jnp.where(tokens.origin >= 0, tokens.origin + prefix, zeros)
  rows = jnp.where(place < prefix, place, of_patch)
  values = jnp.pad(values, ((0, 0), (0, 0), (0, 1), (0, 0)))
  return jnp.take_along_axis(values, rows[:, None, :, None], axis=2)
