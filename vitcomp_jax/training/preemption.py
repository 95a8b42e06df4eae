"""A request to end, as schedulers send it before they take the machine away."""

import signal
import threading
import types
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
  """The process was asked to end; the same command goes on."""


class Preemption:
  """Notes SIGTERM while a loop runs, so that it can end after a step.

  With several processes, which may be told at different times, they agree on the step to end at.
  """

  def __init__(self) -> None:
    self._asked = False
    self._before: Any = None

  def reached(self, step: int) -> bool:
    """Whether to end after this step; in every process the same."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked

  def _note(self, number: int, frame: types.FrameType | None) -> None:
    del number, frame
    self._asked = True

  def __enter__(self) -> "Preemption":
    # Only a main thread may take signals.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *_: Any) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)
