"""Static reducers: hashable values that serve as jit cache keys and as JSON in a plan."""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any, ClassVar

from vitcomp_jax.errors import UserError
from vitcomp_jax.models.gates import Gate, open_gate
from vitcomp_jax.models.importance import IMPORTANCES
from vitcomp_jax.models.tokens import AttentionStats, TokenReducer, Tokens

LARGEST = 2**31 - 1  # more would overflow int32


class StaticReducer:
  """Base of reducers whose fields are plain values; it reads, checks and writes their JSON.

  A subclass is a frozen dataclass or a Linen module. Its int fields are counts, and its float
  fields are shares in (0, 1].

  Attributes:
    type_name: Name in a plan's JSON.
    before_attention: Whether it can run before attention, without statistics.
    is_fixed: Whether it removes the same tokens from every image.
  """

  type_name: ClassVar[str]
  before_attention: ClassVar[bool] = False
  is_fixed: ClassVar[bool] = False

  def count(self, n: int) -> int:
    """Returns how many of `n` tokens remain."""
    raise NotImplementedError

  def counts(self, n: int) -> tuple[int, int]:
    """Returns how many of `n` tokens remain after pruning, and how many after merging."""
    return self.count(n), self.count(n)

  def token_gate(self, num_tokens: int) -> Gate:
    """Returns the gate that masks, in the dense model, the tokens that this reducer removes."""
    del num_tokens
    return open_gate

  def check(self, n: int, num_prefix: int, num_tokens: int, where: str) -> None:
    """Rejects counts that leave no patch token, or more tokens than the model has.

    Args:
      n: Number of tokens that enter.
      num_prefix: Number of prefix tokens of the model.
      num_tokens: Number of tokens of the model before any reduction.
      where: Place to name in the error.
    """
    del n
    least = num_prefix + 1
    for name in ("prune_keep", "merge_keep", "keep"):
      kept = getattr(self, name, least)
      if not least <= kept <= num_tokens:
        raise UserError(f"{where}: expected {name} from {least} to {num_tokens}, got {kept}.")

  def to_json(self) -> dict[str, Any]:
    """Returns the type's name and the fields that differ from their defaults."""
    values = {f.name: getattr(self, f.name) for f in _fields(type(self)).values()}
    shown = {
      f.name: values[f.name] for f in _fields(type(self)).values() if values[f.name] != f.default
    }
    return {"type": self.type_name, **shown}

  @classmethod
  def from_json(cls, values: Mapping[str, Any], where: str) -> "StaticReducer":
    """Reads a reducer from a JSON object such as `to_json` returns.

    Args:
      values: The JSON object.
      where: Place to name in errors.

    Raises:
      UserError: If a field is missing, wrong or unknown.
    """
    fields = _fields(cls)
    options = {key: value for key, value in values.items() if key != "type"}
    for key, value in options.items():
      if key not in fields:
        known = ", ".join(fields) or "none"
        raise UserError(f"{where}: expected options of {cls.type_name} ({known}), got {key!r}.")
      options[key] = _checked(fields[key], value, where)
    required = [key for key, field in fields.items() if field.default is dataclasses.MISSING]
    if not set(required) <= set(options):
      got = ", ".join(options) or "none"
      raise UserError(f"{where}: {cls.type_name} needs {', '.join(required)}, got {got}.")
    return cls(**options)


def _fields(reducer: type) -> dict[str, dataclasses.Field[Any]]:
  """Returns the fields that a reducer's JSON holds, without the two that Flax adds."""
  fields = dataclasses.fields(reducer)
  return {field.name: field for field in fields if field.name not in ("parent", "name")}


def _checked(field: dataclasses.Field[Any], value: Any, where: str) -> Any:
  """Returns a field's value, or raises if it is not of the field's type."""
  name, got = field.name, reprlib.repr(value)
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if field.type is int and not (type(value) is int and 0 < value <= LARGEST):
    raise UserError(f"{where}: expected a whole number from 1 to {LARGEST} for {name}, got {got}.")
  if field.type is float and not (is_number and 0 < value <= 1):
    raise UserError(f"{where}: expected {name} in (0, 1], got {got}.")
  if field.type is bool and not isinstance(value, bool):
    raise UserError(f"{where}: expected true or false for {name}, got {got}.")
  if name == "importance" and value not in IMPORTANCES:
    known = ", ".join(IMPORTANCES)
    raise UserError(f"{where}: expected importance among {known}, got {got}.")
  if name == "positions":
    whole = isinstance(value, list) and all(type(i) is int and 0 <= i <= LARGEST for i in value)
    if not (whole and value and sorted(set(value)) == value):
      raise UserError(f"{where}: expected ascending positions, got {got}.")
    return tuple(value)
  return value


@dataclasses.dataclass(frozen=True)
class KeepAll(StaticReducer):
  """Removes nothing."""

  type_name = "keep_all"
  before_attention = True
  is_fixed = True

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    return tokens

  def count(self, n: int) -> int:
    return n


keep_all: TokenReducer = KeepAll()
