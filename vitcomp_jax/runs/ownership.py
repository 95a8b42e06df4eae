"""Locks a workdir, so that only one run uses it at a time."""

import contextlib
import datetime
import errno
import logging
import os
import pathlib
import socket
import time
from collections.abc import Iterator

import filelock
import numpy as np

from vitcomp_jax import multihost, strict_json
from vitcomp_jax.atomic import write_json
from vitcomp_jax.errors import UserError

_LOCK, _OWNER = ".lock", ".owner.json"  # filelock may empty its own file
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_TRIES, _PAUSE = 10, 0.1  # while an owner takes or releases the lock
_LONGEST = 1000  # bytes of an error message that is sent to the other processes


@contextlib.contextmanager
def owned(workdir: pathlib.Path) -> Iterator[None]:
  """Locks a workdir until the block ends or the process dies.

  In a run of several processes, the first takes the lock and all others get its result. The folder
  is created if missing; folders created here that are still empty at the end are removed.

  Args:
    workdir: Folder of the run.

  Raises:
    UserError: If another run holds the lock (the message names it), or the folder is not writable.
  """
  with contextlib.ExitStack() as held:
    refusal = None
    if multihost.is_first():
      try:
        _own(workdir, held)
      except UserError as error:
        refusal = error
    said = _from_first(str(refusal or ""))
    if said:
      raise refusal or UserError(said)
    yield


def _own(workdir: pathlib.Path, held: contextlib.ExitStack) -> None:
  """Takes ownership of a workdir; `held` releases it."""
  lock, owner = workdir / _LOCK, workdir / _OWNER
  try:
    _lock(workdir, held)
    held.callback(_remove, lock)
    held.callback(_remove, owner)
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    write_json(owner, {"pid": os.getpid(), "host": socket.gethostname(), "started": started})
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise UserError(f"--workdir {workdir}: cannot be written ({error.strerror}).") from error
    _remove(lock)
    logging.warning(
      "%s is on a file system without locks (%s): nothing keeps a second run out of it",
      workdir,
      error.strerror,
    )


def _lock(workdir: pathlib.Path, held: contextlib.ExitStack) -> None:
  """Creates a workdir if it is missing, and locks it."""
  for left in reversed(range(_TRIES)):
    _make(workdir, held)
    # No `fallback_to_soft`, because a marker file would outlive a killed owner.
    lock = filelock.FileLock(workdir / _LOCK, timeout=0, fallback_to_soft=False)
    try:
      held.enter_context(lock)
      return
    except filelock.Timeout:
      owner = _owner(workdir)
      if owner or not left:
        raise UserError(
          f"--workdir {workdir}: expected one that no other run is using, got one in use by "
          f"{owner or 'another process'}; wait until it ends, or give another --workdir."
        ) from None
    except FileNotFoundError:  # another run that failed to start has just removed its folder
      if not left:
        raise
    time.sleep(_PAUSE)


def _make(workdir: pathlib.Path, held: contextlib.ExitStack) -> None:
  """Creates a folder and its parents; `held` removes those that are left empty."""
  missing = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
  for folder in reversed(missing):  # so that the innermost is removed first
    held.callback(_remove_empty, folder)
  workdir.mkdir(parents=True, exist_ok=True)


def _remove_empty(folder: pathlib.Path) -> None:
  with contextlib.suppress(OSError):
    folder.rmdir()


def _remove(file: pathlib.Path) -> None:
  with contextlib.suppress(OSError):
    file.unlink()


def _owner(workdir: pathlib.Path) -> str | None:
  """Describes the owner of a workdir; None if its file is missing or unreadable."""
  try:
    about = strict_json.loads((workdir / _OWNER).read_text(encoding="utf-8"))
    return f"process {about['pid']} on {about['host']} since {about['started']}"
  except (OSError, ValueError, LookupError, TypeError):
    return None


def _from_first(text: str) -> str:
  """Broadcasts the first process's text to all processes."""
  content = np.frombuffer(text.encode()[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8)
  return multihost.from_first(content).tobytes().rstrip(b"\0").decode(errors="ignore")
