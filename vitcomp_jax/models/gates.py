"""Gates: factors that multiply values inside a layer, learnt by ViT-Slim's search."""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Gate = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Open:
  """Lets everything through."""

  def __call__(self, x: Array) -> Array:
    return x


class SoftMask(nn.Module):
  """A learnt factor per unit, `zeta` in the collection `arch`.

  Attributes:
    shape: Shape of `zeta`, with the rank of the values it multiplies.
    initial: Initial value of every factor.
    squash: Whether the factor is tanh(zeta), as for patches.
    pairing: Which channels of the last axis share a factor, see `LayerSpec`; None: no sharing.

  References:
    Chavan et al., `ViT-Slim <https://arxiv.org/abs/2201.00814>`_, 2022, Sec. 3.2.
  """

  shape: tuple[int, ...]
  initial: float = 1.0
  squash: bool = False
  pairing: str | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    zeta = self.variable("arch", "zeta", jnp.full, self.shape, self.initial).value
    factor = jnp.tanh(zeta) if self.squash else zeta
    if self.pairing is not None:
      factor = both_of_pairs(factor, self.pairing)
    return x * factor.astype(x.dtype)


def both_of_pairs(values: Array | np.ndarray, pairing: str) -> Array:
  """Repeats the value of each pair for both of its channels: f[… k//2] becomes f[… k]."""
  if pairing == "halves":
    return jnp.concatenate([values, values], axis=-1)
  return jnp.repeat(values, 2, axis=-1)


@dataclasses.dataclass(frozen=True)
class HardMask:
  """Keeps some units and sets the others to zero: a cut that removes nothing yet.

  Attributes:
    shape: Shape of the mask, as in `SoftMask`.
    kept: Kept positions in the flattened shape.
  """

  shape: tuple[int, ...]
  kept: tuple[int, ...]

  def __call__(self, x: Array) -> Array:
    factors = np.zeros(math.prod(self.shape))
    factors[list(self.kept)] = 1
    return x * jnp.asarray(factors.reshape(self.shape), x.dtype)


open_gate: Gate = Open()
