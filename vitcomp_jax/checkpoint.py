"""Checkpoints: the only file that knows Orbax."""

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
import orbax.checkpoint as ocp

from vitcomp_jax.errors import UserError


class Checkpointer:
  """Keeps the newest checkpoints of one stage, written in the background and atomically."""

  def __init__(self, directory: pathlib.Path, keep: int = 2) -> None:
    """Opens the directory, which is made if need be.

    Args:
      directory: `WORKDIR/checkpoints/STAGE`; each checkpoint is a folder named by its step.
      keep: How many of the newest stay.
    """
    _silence_background_threads()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      enable_async_checkpointing=True,
      # What a kill or a full disk left half written would fill the disk for good.
      cleanup_tmp_directories=True,
    )
    self._directory = directory
    self._manager = ocp.CheckpointManager(
      directory.absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler()
    )

  def save(self, step: int, state: Any) -> None:
    """Starts to write `state`, a pytree of arrays.

    It is copied first: the next step donates the state's buffers while they are being written.

    Raises:
      OSError: If this checkpoint, or the one before, cannot be written.
    """
    state = jax.tree.map(jnp.copy, state)
    with self._write_errors():
      # Forced, because Orbax otherwise passes over a step below its newest without a word.
      self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

  def restore(self, like: Any) -> tuple[int, Any] | None:
    """The newest checkpoint that can be read; damaged ones after it are removed.

    Args:
      like: A state of the same shapes.

    Returns:
      The step and the state; None if there are no checkpoints.

    Raises:
      UserError: If there are checkpoints and none can be read, or one is of another shape.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    damaged: list[int] = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
      # Whatever is wrong with it, the one before may be whole.
      except Exception as error:
        self._check_shapes(step, like)
        logging.warning("Checkpoint %d cannot be read: %s", step, _first_line(error))
        damaged.append(step)
        continue
      # Only now: if none can be read, the reason may lie elsewhere.
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
    """The newest checkpoint that is written or being written; None if there is none."""
    return self._manager.latest_step()

  def _check_shapes(self, step: int, like: Any) -> None:
    """Raises a UserError if a checkpoint is whole but of another shape."""
    try:
      there = _shapes(self._manager.item_metadata(step).tree)
    except Exception:  # Not even its shapes can be read: it is damaged.
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
    """Waits for what is being written.

    Raises:
      OSError: If it cannot be written.
    """
    with self._write_errors():
      try:
        self._manager.wait_until_finished()
      finally:
        self._manager.close()

  @contextlib.contextmanager
  def _write_errors(self) -> Iterator[None]:
    """Makes what the system refuses an OSError: TensorStore raises ValueError for a full disk."""
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
  """Shapes of the arrays by name."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(k, simple=True, separator="/"): tuple(x.shape) for k, x in leaves}


def _system_reason(error: BaseException | None) -> str | None:
  """Returns the operating system's message behind an error; None if there is none."""
  while error is not None:
    # TensorStore has no type of its own for such errors.
    if isinstance(error, OSError) or "os_error_code" in str(error):
      return str(error)
    error = error.__cause__ or error.__context__
  return None


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0] if str(error) else type(error).__name__


@functools.cache
def _silence_background_threads() -> None:
  """Keeps Orbax's threads from printing what belongs to errors that are raised as well.

  It stays for the rest of the process: a thread may still print after the error was raised.
  """
  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(lambda record: not _is_orbax_traceback(record))
  # Of the arrays that fail together, those which are not begun are forgotten.
  forgotten = r"coroutine '\w*(serialize|_read_)\S*' was never awaited"
  warnings.filterwarnings("ignore", forgotten, RuntimeWarning)
  show = sys.unraisablehook

  def show_others(unraisable: Any) -> None:
    # Of the arrays that fail together, Orbax waits for the first and closes the loop to the others.
    closed = str(unraisable.exc_value) == "Event loop is closed"
    if not closed and not _passes_orbax(unraisable.exc_traceback):
      show(unraisable)

  sys.unraisablehook = show_others


def _is_orbax_traceback(record: logging.LogRecord) -> bool:
  if not record.exc_info:
    return False
  trace = record.exc_info[2]
  # An array's error that nobody waited for comes from TensorStore, without Python frames.
  return _passes_orbax(trace) or (record.name == "asyncio" and trace is None)


def _passes_orbax(trace: types.TracebackType | None) -> bool:
  names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(trace)]
  return any(name.startswith("orbax.") for name in names)
