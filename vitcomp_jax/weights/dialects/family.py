"""Models whose authors published files under names of their own."""

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
  """Says how authors name tensors, and what their code fixes.

  Attributes:
    name: The family, as it is told in logs.
    is_in: Returns whether tensors' names are the authors' beyond doubt.
    select: Returns the tensors of the image encoder, where a file holds more.
    dropped: Regular expressions of the names of tensors that the model does not use.
    patterns: Regular expressions and replacements that make timm's names, applied in order.
    finish: Changes what renaming does not, such as the layout.
    fields: Returns what the authors' code fixes, from the tensors by the authors' names and from
      the fields that shapes tell.
  """

  name: str
  is_in: Callable[[Collection[str]], bool]
  select: Callable[[State], State] = _all
  dropped: tuple[str, ...] = ()
  patterns: tuple[tuple[str, str], ...] = ()
  finish: Callable[[dict[str, Array]], dict[str, Array]] = _as_it_is
  fields: Callable[[State, Mapping[str, object]], Fields] = _no_fields

  def to_timm(self, tensors: State) -> dict[str, Array]:
    """Returns the tensors under timm's names, without those that the model does not use."""
    return self.finish(renamed(self.select(tensors), self.patterns, self.dropped))


def heads_by_width(heads: Mapping[int, int], shapes: Mapping[str, object]) -> Fields:
  """Returns the number of heads of the authors' model of that width; nothing for other widths."""
  width = shapes.get("width")
  return {"num_heads": heads[width]} if isinstance(width, int) and width in heads else {}
