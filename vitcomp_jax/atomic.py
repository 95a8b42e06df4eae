"""Writes files atomically: completely, or not at all.

If several processes run one program, only the first one writes.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from vitcomp_jax import multihost, strict_json


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path to write to; it replaces `path` if the block raises no error."""
  if not multihost.is_first():
    with tempfile.TemporaryDirectory() as folder:
      yield pathlib.Path(folder) / path.name
    return
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    yield temporary
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields an empty folder to fill; it replaces `path` if the block raises no error."""
  with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
    new, old = pathlib.Path(scratch, "new"), pathlib.Path(scratch, "old")
    new.mkdir()
    yield new
    if not path.exists():
      new.rename(path)
      return
    path.rename(old)
    try:
      new.rename(path)
    except BaseException:
      old.rename(path)
      raise


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file atomically."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_json(path: pathlib.Path, values: Any) -> None:
  """Writes a JSON file atomically.

  Raises:
    ValueError: If a number is not finite; an existing file then stays as it is.
  """
  write_text(path, strict_json.dumps(values, indent=1) + "\n")
