"""Several processes that run one program: what only the first of them does, and where all meet."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
  """Whether this process is the one that writes what a person reads."""
  return jax.process_index() == 0


def gathered(rows: np.ndarray) -> np.ndarray:
  """The rows of all processes, one after the other; all must ask for it."""
  if jax.process_count() == 1:
    return rows
  return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def from_first(values: np.ndarray) -> np.ndarray:
  """The first process's values, which all others get; all must ask for it."""
  if jax.process_count() == 1:
    return values
  return np.asarray(multihost_utils.broadcast_one_to_all(values))


def meet(what: str) -> None:
  """Waits until every process has come to the same point.

  Args:
    what: Names the point; processes that come to different ones fail instead of waiting.
  """
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
