"""Files in the form that the models' authors published.

A family is recognised by names that only its authors' code uses. Everything that this code fixes is
then known: the number of heads for the authors' widths, the norms' epsilon, activation and pooling.
"""

from collections.abc import Collection

from vitcomp_jax.weights.dialects import meta
from vitcomp_jax.weights.dialects.beit_eva import BEIT, EVA02, PRETRAINING
from vitcomp_jax.weights.dialects.described import Configs, Described, described
from vitcomp_jax.weights.dialects.family import Family
from vitcomp_jax.weights.dialects.metaformer import CAFORMER
from vitcomp_jax.weights.dialects.perception import PERCEPTION_ENCODER
from vitcomp_jax.weights.dialects.renaming import Array
from vitcomp_jax.weights.dialects.shapes import fields_from_shapes
from vitcomp_jax.weights.tensors import State

FAMILIES = (*meta.FAMILIES, PERCEPTION_ENCODER, EVA02, BEIT, PRETRAINING, CAFORMER)


def recognises(names: Collection[str]) -> bool:
  """Returns whether tensors have the names that the authors of a known family use."""
  return _family(names) is not None


def to_timm(tensors: State, configs: Configs | None = None) -> dict[str, Array]:
  """Renames tensors to timm's names; drops those that only pre-training uses.

  Args:
    tensors: Tensors by the authors' names.
    configs: JSON files beside the weights, by name; not used.

  Raises:
    UserError: If the model has a part that is not supported.
  """
  del configs
  family = _family(tensors.keys())
  return dict(tensors) if family is None else family.to_timm(tensors)


def describe(configs: Configs, tensors: State) -> Described | None:
  """Describes a model by the names and shapes of its tensors.

  Args:
    configs: JSON files beside the weights, by name; not used, as the authors have none.
    tensors: Tensors by the authors' names.

  Returns:
    The description; None if the names are not those of a known family.

  Raises:
    UserError: If the model has a part that is not supported.
  """
  del configs
  family = _family(tensors.keys())
  if family is None:
    return None
  shapes = fields_from_shapes(family.to_timm(tensors))
  fixed = family.fields(family.select(tensors), shapes)
  return described((f"{family.name}'s code", fixed), ("tensors", shapes))


def _family(names: Collection[str]) -> Family | None:
  return next((family for family in FAMILIES if family.is_in(names)), None)
