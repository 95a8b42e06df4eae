"""Checkpoints: the only file that knows Orbax."""

import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


class Checkpointer:
  """Keeps the newest checkpoints of one stage, written in the background and atomically."""

  def __init__(self, directory: pathlib.Path, keep: int = 2) -> None:
    """Opens the directory, which is made if need be.

    Args:
      directory: `WORKDIR/checkpoints/STAGE`; each checkpoint is a folder named by its step.
      keep: How many of the newest stay.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

  def save(self, step: int, state: Any) -> None:
    """Starts to write `state`, a pytree of arrays.

    It is copied first: the next step donates the state's buffers while they are being written.
    """
    state = jax.tree.map(jnp.copy, state)
    self._manager.save(step, args=ocp.args.StandardSave(state))

  def restore(self, like: Any) -> tuple[int, Any] | None:
    """The newest checkpoint that can be read, or none.

    Args:
      like: A state of the same shapes.

    Returns:
      The step and the state.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        return step, state
      # Whatever is wrong with it, the one before may be whole.
      except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logging.warning("Checkpoint %d cannot be read (%s); trying the one before.", step, reason)
    return None

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.wait_until_finished()
    self._manager.close()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
