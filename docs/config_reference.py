"""The configuration reference, made of the comments in `vitcomp_jax/config.py`."""

import ast
import dataclasses
import inspect
import io
import tokenize
import typing
from collections.abc import Iterator
from typing import Any

from vitcomp_jax.config import Config
from vitcomp_jax.config_parsing import accepted


@dataclasses.dataclass(frozen=True)
class Key:
  """A key of the config.

  Attributes:
    name: With dots.
    accepted: What it may be set to, in words.
    default: As Python writes it.
    explanation: The comment behind or above its field.
  """

  name: str
  accepted: str
  default: str
  explanation: str


def keys(cls: type = Config, path: str = "config.") -> Iterator[Key]:
  """All keys, in the order of the fields."""
  comments = _comments(cls)
  kinds = typing.get_type_hints(cls, include_extras=True)
  for field in dataclasses.fields(cls):
    name, kind = path + field.name, kinds[field.name]
    if dataclasses.is_dataclass(kind):
      yield from keys(typing.cast(type, kind), f"{name}.")
    else:
      default = "none" if field.default is None else repr(field.default)
      yield Key(name, accepted(kind), default, comments[field.name])


def _comments(cls: type) -> dict[str, str]:
  """The comments of a dataclass's fields, inherited ones included; empty where there is none."""
  found: dict[str, str] = {}
  for owner in reversed(cls.__mro__[:-1]):
    source = inspect.getsource(owner)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
    (tree,) = ast.parse(source).body
    for node in typing.cast(ast.ClassDef, tree).body:
      if isinstance(node, ast.AnnAssign):
        lines = _comment_lines(node, comments)
        text = " ".join(comments[line].string.removeprefix("#").strip() for line in lines)
        found[typing.cast(ast.Name, node.target).id] = text
  return found


def _comment_lines(node: ast.AnnAssign, comments: dict[int, tokenize.TokenInfo]) -> list[int]:
  """Where the comments of a field are: whole lines right above it, and behind its parts."""
  first = node.lineno
  while first - 1 in comments and comments[first - 1].line.strip().startswith("#"):
    first -= 1
  return [line for line in range(first, (node.end_lineno or 0) + 1) if line in comments]


def markdown() -> str:
  """All keys under headings, as Sphinx's directive `confval`."""
  lines = []
  group: str | None = None
  for key in keys():
    head = key.name.rpartition(".")[0]
    if head != group:
      group = head
      lines += [f"## {'The run' if head == 'config' else head}", "", *_introduction(head)]
    lines += [f"```{{confval}} {key.name}", f":type: {key.accepted}", f":default: `{key.default}`"]
    lines += ["", _sentence(key.explanation), "```", ""]
  return "\n".join(lines)


def _introduction(group: str) -> list[str]:
  """The docstring of a group, where it has one of its own."""
  cls: Any = Config
  for name in group.split(".")[1:]:
    cls = typing.get_type_hints(cls)[name]
  text = cls.__doc__ or ""
  return [] if text.startswith(f"{cls.__name__}(") else [text, ""]


def _sentence(text: str) -> str:
  return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")
