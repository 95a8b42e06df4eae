"""A differentiable count: how many elements of a sorted list to keep, learnt by gradient.

The list may hold tokens, hidden units or dimensions of a head, with the least important ones last.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.ops.straight_through import ste_ceil, ste_clip, ste_mask

# Rounding error of an expected count, relative to the list's length: a few units in the last place.
NOISE = 2.0**-22
# Scale of the distribution around a count, relative to the list's length. A wider one averages the
# gradient over more elements; a narrower one is closer to the effect of a single element.
SPREAD = 0.03


def learnt_count(
  share: Float[Array, ""],
  length: int,
  low: Array,
  high: Array,
  first: int = 0,
  ranks: int | None = None,
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
  """Returns which elements a learnt share of a list keeps, and how many.

  The count follows a logistic distribution around its expectation, the share times the length. The
  mask is hard, but has the gradient of the probability that an element is kept. The gradient thus
  comes from the few elements on either side of the count.

  Args:
    share: The learnt share, in [0, 1].
    length: Number of elements in the list.
    low: Smallest count.
    high: Largest count. Elements from there on were dropped earlier; they are 1 in this mask, so
      that the gradient reaches the mask that dropped them.
    first: Number of elements before the list, which always stay and are included in the count.
    ranks: Length of the mask; None: that of the list.

  Returns:
    The mask, and the expected count, rounded up.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Sec. 3.3, whose distribution
    has one logit for each count.
  """
  expected = ste_clip(share * length + first, low, high)
  count = ste_ceil(expected, tolerance=length * NOISE)
  rank = jnp.arange(first + length if ranks is None else ranks, dtype=expected.dtype)
  probability = jax.nn.sigmoid((expected - rank - 0.5) / (SPREAD * length))
  probability = jnp.where(rank < low, 1.0, probability)
  return ste_mask(probability, (rank >= count) & (rank < high)), count
