"""Dataclasses that read and write their own JSON."""

import dataclasses
import pathlib
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Self

from vitcomp_jax import strict_json
from vitcomp_jax.atomic import write_json
from vitcomp_jax.errors import UserError


class Record:
  """A dataclass stored as a JSON object of its fields; fields that are None are omitted."""

  def to_json(self) -> dict[str, Any]:
    """Returns the JSON object."""
    found = {}
    for name in _types(type(self)):
      value = getattr(self, name)
      if value is not None:
        found[name] = _plain(value)
    return found

  def write(self, path: pathlib.Path) -> None:
    """Writes a JSON file."""
    write_json(path, self.to_json())

  @classmethod
  def from_json(cls, values: Any, where: str) -> Self:
    """Reads a JSON object; unknown keys are ignored.

    Args:
      values: The object.
      where: File name for errors.

    Raises:
      UserError: If a field is missing or has another type.
    """
    if not isinstance(values, dict):
      raise _unexpected(where, "an object", values)
    kinds = _types(cls)
    known = {key: value for key, value in values.items() if key in kinds}
    fields = {key: _parsed(kinds[key], value, f"{where}: {key}") for key, value in known.items()}
    try:
      return cls(**fields)
    except TypeError as error:  # a field is missing
      raise _unexpected(where, f"the fields of a {cls.__name__}", values) from error

  @classmethod
  def read(cls, path: pathlib.Path) -> Self:
    """Reads a JSON file.

    Raises:
      UserError: If the file is missing or damaged.
    """
    return cls.from_json(strict_json.read(path), str(path))


def _types(cls: type[Record]) -> dict[str, Any]:
  """Returns the types of a record's fields."""
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(typing.cast(Any, cls))}


def _plain(value: Any) -> Any:
  """Returns a value as plain JSON types."""
  if isinstance(value, Record):
    return value.to_json()
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _parsed(kind: Any, value: Any, where: str) -> Any:
  """Converts a JSON value to a type; rejects a value of another type."""
  origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
  if origin in (types.UnionType, typing.Union):  # optional types
    return None if value is None else _parsed(args[0], value, where)
  if isinstance(origin, type) and issubclass(origin, Record):
    return origin.from_json(value, where)
  if origin is Mapping and isinstance(value, dict):
    return {key: _parsed(args[1], item, f"{where}: {key}") for key, item in value.items()}
  if origin is tuple and isinstance(value, list):
    kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
    if len(kinds) == len(value):
      return tuple(map(_parsed, kinds, value, [where] * len(value)))
  if origin is float and type(value) is int:
    return float(value)
  if origin is Any or type(value) is origin or (origin is Literal and value in args):
    return value
  raise _unexpected(where, str(getattr(kind, "__name__", kind)), value)


def _unexpected(where: str, expected: str, got: Any) -> UserError:
  return UserError(
    f"{where}: expected {expected}, got {reprlib.repr(got)}; remove the file, and run the stage "
    "that wrote it again."
  )
