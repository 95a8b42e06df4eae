"""Models whose authors published files with their own tensor names."""

import dataclasses
from collections.abc import Callable, Collection, Mapping

from vitcomp_jax.weights.dialects.renaming import Array, renamed
from vitcomp_jax.weights.tensors import State

Fields = dict[str, object]


def _no_fields(tensors: State, shapes: Mapping[str, object]) -> Fields:
  del tensors, shapes
  return {}


def _all(tensors: State) -> State:
  return tensors


def _as_it_is(state: dict[str, Array]) -> dict[str, Array]:
  return state


@dataclasses.dataclass(frozen=True)
class Family:
  """Describes how authors name tensors, and what their code fixes.

  Attributes:
    name: Name of the family in logs.
    is_in: Returns whether the names of tensors are unmistakably the authors'.
    select: Returns the tensors of the image encoder, if a file holds more.
    dropped: Regular expressions for the names of tensors that the model does not use.
    patterns: Regular expressions and replacements that make timm's names, applied in order.
    finish: Makes the changes other than renaming, such as changes of layout.
    fields: Returns the fields that the authors' code fixes, given the tensors by the authors' names
      and the fields that the shapes determine.
  """

  name: str
  is_in: Callable[[Collection[str]], bool]
  select: Callable[[State], State] = _all
  dropped: tuple[str, ...] = ()
  patterns: tuple[tuple[str, str], ...] = ()
  finish: Callable[[dict[str, Array]], dict[str, Array]] = _as_it_is
  fields: Callable[[State, Mapping[str, object]], Fields] = _no_fields

  def to_timm(self, tensors: State) -> dict[str, Array]:
    """Returns the tensors by timm's names, without those that the model does not use."""
    return self.finish(renamed(self.select(tensors), self.patterns, self.dropped))


def heads_by_width(heads: Mapping[int, int], shapes: Mapping[str, object]) -> Fields:
  """Returns the number of heads of the authors' model of the same width; empty if there is none."""
  width = shapes.get("width")
  return {"num_heads": heads[width]} if isinstance(width, int) and width in heads else {}
