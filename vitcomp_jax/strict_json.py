"""Reads and writes strict JSON: no NaN or infinity, and no repeated keys in an object."""

import collections
import json
import math
import pathlib
import reprlib
from typing import Any, NoReturn

from vitcomp_jax.errors import UserError


def dumps(values: Any, indent: int | None = None) -> str:
  """Converts values to JSON.

  Raises:
    ValueError: If a number is not finite, which JSON cannot represent.
  """
  return json.dumps(values, indent=indent, allow_nan=False)


def dumps_or_null(values: Any) -> str:
  """Converts values to a single line of JSON, with `null` for numbers that are not finite."""
  return dumps(_or_none(values))


def loads(text: str) -> Any:
  """Parses JSON.

  Raises:
    ValueError: If the text is not JSON, repeats a key (Python would keep the last value), or has a
      number that is not finite.
  """
  twice: list[str] = []

  def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = collections.Counter(key for key, _ in pairs)
    twice.extend(key for key, count in counts.items() if count > 1)
    return dict(pairs)

  values = json.loads(text, object_pairs_hook=once, parse_constant=_refuse, parse_float=_finite)
  if twice:
    raise ValueError(f"{', '.join(map(repr, dict.fromkeys(twice)))} more than once in an object")
  return values


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a file with a JSON object, written by a run.

  Raises:
    UserError: If the file cannot be read or does not hold an object.
  """
  try:
    values = loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read ({error}); remove it.") from error
  if not isinstance(values, dict):
    raise UserError(f"{path}: expected a JSON object, got {reprlib.repr(values)}; remove it.")
  return values


def _finite(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    _refuse(text)
  return value


def _refuse(text: str) -> NoReturn:
  raise ValueError(f"{text}, which is no finite number")


def _or_none(values: Any) -> Any:
  if isinstance(values, float):
    return values if math.isfinite(values) else None
  if isinstance(values, dict):
    return {key: _or_none(value) for key, value in values.items()}
  if isinstance(values, list | tuple):
    return [_or_none(value) for value in values]
  return values
