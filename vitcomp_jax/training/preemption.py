"""Ends training on SIGTERM, which schedulers send before they take a machine away, or on Ctrl-C."""

import logging
import signal
import threading
import types
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
  """Reports that the process was asked to end; the same command resumes the run."""


class Preemption:
  """Catches SIGTERM and Ctrl-C while a loop runs, so that it can end after a step.

  A second Ctrl-C ends the loop at once. Several processes may be signalled at different times, so
  they agree on the step to end at; Ctrl-C ends them at once.
  """

  def __init__(self) -> None:
    self._asked: int | None = None
    self._before: dict[int, Any] = {}

  def reached(self, step: int) -> bool:
    """Returns whether to end after this step, the same in every process."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked is not None

  def end(self, where: str) -> NoReturn:
    """Ends the loop; call it after a checkpoint has been written.

    Args:
      where: Stage and step, for the message.

    Raises:
      KeyboardInterrupt: On Ctrl-C.
      Preempted: On SIGTERM.
    """
    if self._asked == signal.SIGINT:
      raise KeyboardInterrupt(where)
    raise Preempted(where)

  def _note(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    if number == signal.SIGINT:
      if self._asked == number:
        raise KeyboardInterrupt
      logging.info("interrupted: it ends after this step, with a checkpoint; again: at once")
    self._asked = number

  def __enter__(self) -> "Preemption":
    # Only the main thread may handle signals.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # as in background jobs
          self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
