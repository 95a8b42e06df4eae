"""A request to end, as schedulers send it before they take the machine away, or Ctrl-C."""

import logging
import signal
import threading
import types
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
  """The process was asked to end; the same command goes on."""


class Preemption:
  """Notes SIGTERM and Ctrl-C while a loop runs, so that it can end after a step.

  A second Ctrl-C ends it at once. Several processes, which may be told at different times, agree on
  the step to end at; Ctrl-C ends them at once.
  """

  def __init__(self) -> None:
    self._asked: int | None = None
    self._before: dict[int, Any] = {}

  def reached(self, step: int) -> bool:
    """Whether to end after this step; in every process the same."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked is not None

  def end(self, where: str) -> NoReturn:
    """Ends the loop, when a checkpoint is written.

    Raises:
      KeyboardInterrupt: If it was Ctrl-C that asked for it.
      Preempted: Otherwise.
    """
    raise KeyboardInterrupt(where) if self._asked == signal.SIGINT else Preempted(where)

  def _note(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    if number == signal.SIGINT:
      if self._asked == number:
        raise KeyboardInterrupt
      logging.info("interrupted: it ends after this step, with a checkpoint; again: at once")
    self._asked = number

  def __enter__(self) -> "Preemption":
    # Only a main thread may take signals.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # as of a job in the background
          self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
