"""Saves and restores checkpoints with Orbax.

This is the only module that uses Orbax, and it imports it on first use, because the import is slow.
"""

import contextlib
import functools
import logging
import pathlib
import sys
import traceback
import types
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from vitcomp_jax.errors import UserError


class Checkpointer:
  """Keeps the newest checkpoints of one stage, written atomically in the background."""

  def __init__(self, directory: pathlib.Path, keep: int = 2) -> None:
    """Opens the directory, creating it if it does not exist.

    Args:
      directory: `WORKDIR/checkpoints/STAGE`; each checkpoint is a folder named by its step.
      keep: Number of newest checkpoints to keep.
    """
    import orbax.checkpoint as ocp

    _silence_background_threads()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      enable_async_checkpointing=True,
      # Otherwise unfinished checkpoints, left by a kill or a full disk, would stay forever.
      cleanup_tmp_directories=True,
    )
    self._directory = directory
    self._manager = ocp.CheckpointManager(
      directory.absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler()
    )

  def save(self, step: int, state: Any) -> None:
    """Starts writing a checkpoint in the background.

    Args:
      step: Number of completed steps.
      state: Pytree of arrays. It is copied because the next step donates its buffers.

    Raises:
      OSError: If this checkpoint or the previous one cannot be written.
    """
    import orbax.checkpoint as ocp

    state = jax.tree.map(jnp.copy, state)
    with self._write_errors():
      # Without `force`, Orbax silently skips a step older than its newest.
      self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

  def restore(self, like: Any) -> tuple[int, Any] | None:
    """Restores the newest readable checkpoint, and removes any newer, damaged ones.

    Args:
      like: A state with the same shapes.

    Returns:
      The step and the state; None if there are no checkpoints.

    Raises:
      UserError: If there are checkpoints but none can be read, or one has other shapes.
    """
    import orbax.checkpoint as ocp

    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    damaged: list[int] = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
      # Whatever is wrong with this checkpoint, the previous one may be intact.
      except Exception as error:
        self._check_shapes(step, like)
        logging.warning("Checkpoint %d cannot be read: %s", step, _first_line(error))
        damaged.append(step)
        continue
      # Remove them only now: if no checkpoint can be read, they may not be the cause.
      for later in damaged:
        logging.warning("Removed checkpoint %d; going on from checkpoint %d.", later, step)
        self._manager.delete(later)
      return step, state
    if damaged:
      raise UserError(
        f"{self._directory}: expected a checkpoint that can be read, got only damaged ones "
        f"({', '.join(map(str, damaged))}); remove this folder to start the stage again."
      )
    return None

  def latest_step(self) -> int | None:
    """Returns the step of the newest checkpoint, even if still being written; None if none."""
    return self._manager.latest_step()

  def _check_shapes(self, step: int, like: Any) -> None:
    """Raises a UserError if a checkpoint is intact but has other shapes."""
    try:
      there = _shapes(self._manager.item_metadata(step).tree)
    except Exception:  # The shapes cannot be read either, so it is damaged.
      return
    here = _shapes(like)
    differing = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    if differing:
      key = differing[0]
      raise UserError(
        f"{self._directory / str(step)}: expected a checkpoint of this config's shapes, got "
        f"{len(differing)} arrays that differ (first {key}: {there.get(key, 'none')} there, "
        f"{here.get(key, 'none')} here); go back to the config and the version that made it, or "
        f"remove {self._directory} to start the stage again."
      )

  def close(self) -> None:
    """Waits until all checkpoints are written.

    Raises:
      OSError: If one cannot be written.
    """
    with self._write_errors():
      try:
        self._manager.wait_until_finished()
      finally:
        self._manager.close()

  @contextlib.contextmanager
  def _write_errors(self) -> Iterator[None]:
    """Converts system errors to OSError, as TensorStore raises ValueError for a full disk."""
    try:
      yield
    except Exception as error:
      reason = _system_reason(error)
      if reason is None:
        raise
      raise OSError(f"{self._directory}: cannot write a checkpoint: {reason}") from error

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a tree's arrays by name."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(k, simple=True, separator="/"): tuple(x.shape) for k, x in leaves}


def _system_reason(error: BaseException | None) -> str | None:
  """Returns the operating system's message behind an error; None if there is none."""
  while error is not None:
    # TensorStore has no error type of its own for these.
    if isinstance(error, OSError) or "os_error_code" in str(error):
      return str(error)
    error = error.__cause__ or error.__context__
  return None


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0] if str(error) else type(error).__name__


@functools.cache
def _silence_background_threads() -> None:
  """Keeps Orbax's threads from printing tracebacks of errors that are raised anyway.

  This stays in effect for the rest of the process, as a thread may print after the error is raised.
  """
  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(lambda record: not _is_orbax_traceback(record))
  # If several arrays fail together, Orbax drops the coroutines that have not started.
  forgotten = r"coroutine '\w*(serialize|_read_)\S*' was never awaited"
  warnings.filterwarnings("ignore", forgotten, RuntimeWarning)
  show = sys.unraisablehook

  def show_others(unraisable: Any) -> None:
    # If several arrays fail together, Orbax closes the event loop after the first failure.
    closed = str(unraisable.exc_value) == "Event loop is closed"
    if not closed and not _passes_orbax(unraisable.exc_traceback):
      show(unraisable)

  sys.unraisablehook = show_others


def _is_orbax_traceback(record: logging.LogRecord) -> bool:
  if not record.exc_info:
    return False
  trace = record.exc_info[2]
  # An error that was never awaited comes from TensorStore and has no Python frames.
  return _passes_orbax(trace) or (record.name == "asyncio" and trace is None)


def _passes_orbax(trace: types.TracebackType | None) -> bool:
  names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(trace)]
  return any(name.startswith("orbax.") for name in names)
