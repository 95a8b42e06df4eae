"""The lists of a layer's units that can be shortened."""

import dataclasses

from vitcomp_jax.models.spec import ViTSpec

HIDDEN, QK, VALUE = "hidden", "qk", "value"


@dataclasses.dataclass(frozen=True)
class SortedList:
  """A list of units of which a layer keeps the first ones.

  Attributes:
    length: Number of units in a dense layer, or in each of its heads.
    step: Number of units that are kept or dropped together.
  """

  length: int
  step: int = 1


def sorted_lists(spec: ViTSpec) -> dict[str, SortedList]:
  """Returns the lists that can be cut in every layer of a model, by name.

  They are `hidden`, the MLP's hidden units; `qk`, the dimensions of each head's queries and keys,
  in pairs if they are rotated by position; and `value`, the dimensions of each head's values. All
  heads of a layer keep the same count. A list is missing if a norm spans its units: hidden units
  with `mlp_norm`, queries and keys with `qk_norm`, values with `attn_norm`.

  Args:
    spec: The dense model.

  Raises:
    UserError: If the model is not a plain Vision Transformer.
  """
  spec.check_plain("widths")
  head_dim = spec.width // spec.num_heads
  found = {}
  if not spec.mlp_norm:
    found[HIDDEN] = SortedList(spec.mlp_dim)
  if not spec.qk_norm:
    found[QK] = SortedList(head_dim, 1 if spec.rotary is None else 2)
  if not spec.attn_norm:
    found[VALUE] = SortedList(head_dim)
  return found
