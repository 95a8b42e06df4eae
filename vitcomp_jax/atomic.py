"""Files that are written as a whole or not at all, whatever happens in between."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A path beside `path` to write to; it takes the place of `path` when the block ends well."""
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    yield temporary
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_json(path: pathlib.Path, values: Any) -> None:
  """Writes a JSON file."""
  write_text(path, json.dumps(values, indent=1) + "\n")
