"""Parses configs: nested frozen dataclasses whose annotations define valid values."""

import ast
import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import ml_collections

from vitcomp_jax.errors import UserError

C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class Range:
  """Finite numbers from `least` (or above `above`) to `most` (or below `below`)."""

  least: float = -math.inf
  above: float = -math.inf
  most: float = math.inf
  below: float = math.inf

  def __contains__(self, value: float) -> bool:
    return self.least <= value <= self.most and self.above < value < self.below

  def __str__(self) -> str:
    if self == Range():
      return "any finite value"
    words = ("at least", self.least), ("more than", self.above), ("at most", self.most)
    bounds = (*words, ("less than", self.below))
    return " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))


def defaults(cls: type) -> ml_collections.ConfigDict:
  """Returns every key of a config class with its default, for config files to change."""
  values: dict[str, Any] = {}
  for field in dataclasses.fields(cls):
    kind = _field_type(cls, field.name)
    if dataclasses.is_dataclass(kind):
      values[field.name] = defaults(typing.cast(type, kind))
    elif field.default is None:
      # The placeholder fixes the type of an override.
      values[field.name] = ml_collections.config_dict.placeholder(_plain_type(kind))
    else:
      values[field.name] = field.default
  return ml_collections.ConfigDict(values)


def with_overrides(
  cls: type, values: Mapping[str, Any], overrides: Mapping[str, str]
) -> dict[str, Any]:
  """Sets keys from the text of a command line: Python literals, or else strings.

  Args:
    cls: The config class.
    values: Nested values by key.
    overrides: Text by dotted key.

  Raises:
    UserError: For an unknown key (naming the nearest known one).
  """
  changed: dict[str, Any] = copy.deepcopy(dict(values))
  for key, text in overrides.items():
    if key not in all_keys(cls):
      raise _unknown(cls, key)
    *groups, last = key.split(".")
    group = changed
    for name in groups:
      group = group.setdefault(name, {})
    group[last] = _literal(text, _key_type(cls, key))
  return changed


def _key_type(cls: type, key: str) -> type:
  kind: Any = cls
  for name in key.split("."):
    kind = _field_type(kind, name)
  return _plain_type(kind)


def _literal(text: str, kind: type) -> Any:
  if kind is str:
    return text
  if kind is bool and text.lower() in ("true", "false"):
    return text.lower() == "true"
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return text  # the type check rejects it


def parse(cls: type[C], values: Mapping[str, Any]) -> C:
  """Makes a config from a (possibly partial) mapping.

  Args:
    cls: The config class.
    values: Nested values by key.

  Raises:
    UserError: For an unknown key (naming the nearest known one), or a value of the wrong type or
      out of range.
  """
  return typing.cast(C, _parsed(cls, cls, values, ""))


def _parsed(root: type, cls: type, values: Mapping[str, Any], path: str) -> Any:
  known = {field.name for field in dataclasses.fields(cls)}
  result = {}
  for key in values:
    if key not in known:
      raise _unknown(root, path + key)
    kind, value = _field_type(cls, key), values[key]
    if dataclasses.is_dataclass(kind):
      if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise UserError(f"config.{path}{key}: expected a group of keys, got {value!r}.")
      result[key] = _parsed(root, typing.cast(type, kind), value, f"{path}{key}.")
    else:
      result[key] = _checked(value, kind, path + key)
  return cls(**result)


def _unknown(cls: type, path: str) -> UserError:
  """Returns the error for an unknown key, which names the nearest known one."""
  inside = [key for key in all_keys(cls) if key.startswith(f"{path}.")]
  if inside:
    return UserError(
      f"config.{path} is a group of keys; set one of them, such as config.{inside[0]}."
    )
  near = difflib.get_close_matches(path, all_keys(cls), n=1, cutoff=0.0)
  return UserError(f"config.{path} does not exist; did you mean config.{near[0]}?")


def all_keys(cls: type, path: str = "") -> list[str]:
  """Returns the dotted names of all keys of a config class."""
  keys = []
  for field in dataclasses.fields(cls):
    kind = _field_type(cls, field.name)
    if dataclasses.is_dataclass(kind):
      keys += all_keys(typing.cast(type, kind), f"{path}{field.name}.")
    else:
      keys.append(path + field.name)
  return keys


def _checked(value: Any, kind: Any, path: str) -> Any:
  """Converts a value to a type; rejects a value that has another type or is out of range."""
  options = _options(kind)
  is_bool, is_empty = isinstance(value, bool), value == ""
  if type(None) in options and value in ("none", "None"):
    return None  # lets a command line unset a key
  for option in options:
    base, known = _base_and_known(option)
    if base is tuple and isinstance(value, tuple | list):
      return tuple(_checked(v, typing.get_args(option)[0], path) for v in value)
    if base is float and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    is_right = isinstance(value, base) and is_bool == (base is bool) and not is_empty
    if is_right and (known is None or value in known):
      return value
  raise UserError(f"config.{path}: expected {accepted(kind)}, got {value!r}.")


def accepted(kind: Any) -> str:
  """Describes the values that a field accepts."""
  return " or ".join(map(_described, _options(kind)))


def _options(kind: Any) -> tuple[Any, ...]:
  """Returns the alternatives of a union, or a single type."""
  union = typing.get_origin(kind) in (types.UnionType, typing.Union)
  return typing.get_args(kind) if union else (kind,)


def _base_and_known(option: Any) -> tuple[type, Any]:
  """Returns a plain type and its allowed values, which are None if any value is allowed."""
  if typing.get_origin(option) is Annotated:
    return typing.get_args(option)
  if typing.get_origin(option) is Literal:
    return str, typing.get_args(option)
  return typing.get_origin(option) or option, None


def _described(option: Any) -> str:
  if option is type(None):
    return "none"
  base, known = _base_and_known(option)
  if base is tuple:
    return f"tuple of {accepted(typing.get_args(option)[0])}"
  if isinstance(known, Range):
    return f"{base.__name__} of {known}"
  return base.__name__ if known is None else f"one of {', '.join(known)}"


def _plain_type(kind: Any) -> type:
  return next(_base_and_known(t)[0] for t in _options(kind) if t is not type(None))


def _field_type(cls: type, name: str) -> Any:
  return typing.get_type_hints(cls, include_extras=True)[name]


def to_dict(config: object) -> dict[str, Any]:
  """Returns a config as nested plain values, as stored in `config.json` (tuples become lists)."""
  return typing.cast(dict[str, Any], _listed(dataclasses.asdict(typing.cast(Any, config))))


def _listed(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _listed(v) for k, v in value.items()}
  return [_listed(v) for v in value] if isinstance(value, tuple | list) else value
