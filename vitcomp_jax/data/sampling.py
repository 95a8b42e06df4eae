"""Random choices that depend only on the seed: the subset, the order of examples, and the draws.

Batch k of a run is a pure function of `(seed, k)`, so a run that resumes at step k sees exactly the
batches that an uninterrupted run sees from that step on.
"""

import grain
import numpy as np

from vitcomp_jax.errors import UserError

_EPOCHS = 2**32  # in effect endless; Grain has no more shuffles


def generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
  """Returns a generator for one purpose and position, independent of all others."""
  return np.random.default_rng([seed, *purpose.encode(), 256, *position])


def subset(length: int, count: int | None, seed: int, key: str) -> np.ndarray:
  """Draws a subset of a data set.

  Args:
    length: Number of examples in the data set.
    count: Number of examples to draw; None: all.
    seed: Seed of the draw.
    key: Config key that holds `count`, for the error message.

  Returns:
    The sorted indices, int[count].

  Raises:
    UserError: If `count` is not in [1, length].
  """
  if count is None:
    return np.arange(length)
  if not 1 <= count <= length:
    raise UserError(f"{key}: expected 1 to {length} (there are no more), got {count}.")
  return np.sort(generator(seed, "subset").permutation(length)[:count])


class TrainOrder:
  """The order of training examples, which changes every epoch.

  With repeated augmentation (Hoffer et al., 2020), an epoch still has as many images as the data
  set, but it takes every r-th image r times; the r copies are in the same batch.
  """

  def __init__(self, num_examples: int, repeats: int, seed: int) -> None:
    """Shuffles the examples.

    Args:
      num_examples: Number of examples.
      repeats: Augmentations r of each image in a batch.
      seed: Seed of the order.
    """
    # Grain's epochs use seed, seed + 1, ...; hashing keeps nearby seeds from sharing permutations.
    seed = int(generator(seed, "order").integers(2**32))
    self._order = grain.MapDataset.range(num_examples).shuffle(seed).repeat(_EPOCHS)
    self._num_examples, self._repeats = num_examples, repeats

  def examples(self, step: int, batch_size: int, rows: slice) -> list[int]:
    """Returns the example in each of the given rows of a step's batch."""
    n, repeats = self._num_examples, self._repeats
    place = step * batch_size + np.arange(batch_size)
    shown = place // n * n + place % n // repeats
    # Rows are mixed with their neighbours, which must not be copies of the same image.
    apart = np.concatenate([shown[i::repeats] for i in range(repeats)])
    return [int(self._order[int(i)]) for i in apart[rows]]
