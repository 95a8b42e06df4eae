"""Coordinates several processes that run one program."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
  """Returns whether this process is the first, which writes all files and logs."""
  return jax.process_index() == 0


def gathered(rows: np.ndarray) -> np.ndarray:
  """Concatenates the rows of all processes; all of them must call it."""
  if jax.process_count() == 1:
    return rows
  return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def from_first(values: np.ndarray) -> np.ndarray:
  """Broadcasts the first process's values to all processes; all of them must call it."""
  if jax.process_count() == 1:
    return values
  return np.asarray(multihost_utils.broadcast_one_to_all(values))


def meet(what: str) -> None:
  """Waits until every process has reached the same point.

  Args:
    what: Name of the point; processes that wait at different points fail.
  """
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
