"""Files that are written as a whole or not at all, whatever happens in between.

Of several processes that run one program, the first one writes.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from vitcomp_jax import multihost, strict_json


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A path beside `path` to write to; it takes the place of `path` when the block ends well."""
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
  """An empty folder to fill, which takes the place of `path` when the block ends well."""
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
  """Writes a text file."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_json(path: pathlib.Path, values: Any) -> None:
  """Writes a JSON file.

  Raises:
    ValueError: For a number that is not finite; the file stays as it was.
  """
  write_text(path, strict_json.dumps(values, indent=1) + "\n")
