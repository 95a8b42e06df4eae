"""Rotary position embeddings: queries and keys are rotated by angles that depend on positions."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Rotary:
  """Describes the rotation of each head's queries and keys, by pairs of channels.

  Half of a head's pairs are rotated by the row and half by the column, each pair with its own
  frequency. Prefix tokens are not rotated.

  Attributes:
    kind: What the angles depend on: `index`, the patch's index (EVA-02); `centred`, its place in
      [-1, 1] (DINOv3); or `mixed`, a learnt mixture of row and column for each layer and head.
    temperature: Base of the frequencies; `mixed` learns them instead.
    reference: Rows and columns of the grid in training, to which indices are rescaled; None: no
      rescaling.
    offset: Added to indices.
    columns_first: Whether the first channels are rotated by the column instead of the row.
    halves: If true, channel i of a head's k channels is paired with i + k/2; otherwise 2i with
      2i + 1.

  References:
    Su et al., `RoFormer <https://arxiv.org/abs/2104.09864>`_, 2021;
    Fang et al., `EVA-02 <https://arxiv.org/abs/2303.11331>`_, 2023;
    Heo et al., `RoPE for Vision Transformer <https://arxiv.org/abs/2403.13298>`_, 2024.
  """

  kind: str = "index"
  temperature: float = 10000.0
  reference: tuple[int, int] | None = None
  offset: float = 0.0
  columns_first: bool = False
  halves: bool = False

  def places(self, grid: tuple[int, int]) -> Float[np.ndarray, "p 2"]:
    """Returns the two coordinates of each patch, in the order in which they rotate channels."""
    sides = []
    for axis, size in enumerate(grid):
      side = np.arange(size, dtype=np.float32)
      if self.kind == "centred":
        side = (side + np.float32(0.5 + self.offset)) / np.float32(size) * 2 - 1
      else:
        side = side + np.float32(self.offset)
        if self.reference is not None:
          side = side / np.float32(size) * np.float32(self.reference[axis])
      sides.append(side)
    rows, columns = (axis.ravel() for axis in np.meshgrid(*sides, indexing="ij"))
    both = (columns, rows) if self.columns_first else (rows, columns)
    return np.stack(both, axis=1).astype(np.float32)

  def angles(self, grid: tuple[int, int], head_dim: int) -> Float[np.ndarray, "p {head_dim}//2"]:
    """Computes the angle of each patch and pair of channels, for fixed frequencies.

    Args:
      grid: Rows and columns of patches.
      head_dim: Channels of a head, a multiple of 4.
    """
    count = head_dim // 4
    exponents = np.arange(count, dtype=np.float32) / np.float32(count)
    periods = np.float32(self.temperature) ** exponents
    turn = np.float32(2 * math.pi if self.kind == "centred" else 1)
    angles = turn * self.places(grid)[:, :, None] / periods[None, None]
    return angles.reshape(len(angles), 2 * count)
