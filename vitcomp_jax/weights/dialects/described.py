"""Descriptions of models, collected from configurations and tensors."""

import dataclasses
from collections.abc import Mapping

# JSON files beside weights, by name.
Configs = Mapping[str, Mapping[str, object]]


@dataclasses.dataclass(frozen=True)
class Described:
  """A possibly incomplete description of a model.

  Attributes:
    fields: The known fields of `models.spec.ViTSpec`, by name; `rotary` is a dict of the fields of
      `models.rotary.Rotary`.
    class_names: Names of the classifier's outputs, in order; empty if unknown.
    origins: Where each field comes from: the name of a file, `tensors`, or the authors' code.
  """

  fields: Mapping[str, object]
  class_names: tuple[str, ...] = ()
  origins: Mapping[str, str] = dataclasses.field(default_factory=dict)


def described(*sources: tuple[str, Mapping[str, object]]) -> Described:
  """Collects fields from several sources; earlier sources take precedence.

  Args:
    *sources: Name of each source, and the fields that it has.
  """
  fields: dict[str, object] = {}
  origins: dict[str, str] = {}
  for origin, known in sources:
    new = {name: value for name, value in known.items() if name not in fields}
    fields |= new
    origins |= dict.fromkeys(new, origin)
  return Described(fields, origins=origins)
