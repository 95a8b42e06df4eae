"""Metadata of weights: class names, position grid, image size and preprocessing."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vitcomp_jax.errors import UserError

# The metadata key under which this library describes the weights that it writes.
KEY = "vitcomp_jax"
# Names of the weight of a classifier's last layer: timm's, and those of CAFormer's authors.
_CLASSIFIERS = ("head.weight", "head.fc.fc2.weight", "head.fc2.weight")
# The fields of `data.Preprocess` that are stored with weights, and their types.
_COLOURS, _NUMBER = (list, tuple), (int, float)
PREPROCESS: dict[str, Any] = {
  "mean": _COLOURS,
  "std": _COLOURS,
  "crop_pct": _NUMBER,
  "crop_mode": str,
  "interpolation": str,
  "pad": int,
  "exif_orientation": bool,
}


@dataclasses.dataclass(frozen=True)
class Description:
  """A description of weights that needs no model.

  Attributes:
    source: The file or hub id, as the user gave it.
    shapes: Shapes of the tensors by name.
    variant: The variant that the weights were written for; None if unknown.
    class_names: Names of the classifier's outputs, in order; empty if unknown.
    image_size: Height and width of the input images, in pixels; None if unknown.
    grid: Rows and columns of the position embeddings; None if unknown.
    preprocess: Values of `data.Preprocess` by name; empty if unknown.
    fields: Fields of the model's spec; empty for weights of a variant.
    huggingface: The config.json of transformers that the weights came with, as text; or empty.
  """

  source: str
  shapes: Mapping[str, tuple[int, ...]]
  variant: str | None = None
  class_names: tuple[str, ...] = ()
  image_size: tuple[int, int] | None = None
  grid: tuple[int, int] | None = None
  preprocess: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  huggingface: str = ""

  @property
  def num_classes(self) -> int:
    """Returns the number of classifier outputs; 0 without a classifier."""
    return next((self.shapes[name][0] for name in _CLASSIFIERS if name in self.shapes), 0)


def describe(
  source: str, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
) -> Description:
  """Reads the description of weights from their metadata.

  Args:
    source: The file or hub id, as the user gave it, for error messages.
    shapes: Shapes of the tensors by name.
    metadata: Text stored with the tensors, by key.

  Returns:
    The description; only the shapes if the metadata lacks this library's key.

  Raises:
    UserError: If this library's part of the metadata is damaged, or its number of class names
      differs from the number of classifier outputs.
  """
  if KEY not in metadata:
    return Description(source, shapes)
  try:
    values = json.loads(metadata[KEY])
    found = Description(
      source,
      shapes,
      variant=str(values["variant"]),
      class_names=tuple(map(str, values["class_names"])),
      image_size=_pair(values["image_size"]),
      grid=_pair(values["grid"]),
      preprocess=_preprocess(values["preprocess"]),
      fields=dict(values.get("fields", {})),
      huggingface=str(values.get("huggingface", "")),
    )
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    raise UserError(
      f"weights {source}: expected metadata as this library writes it under {KEY!r}, got something "
      f"else ({type(error).__name__}: {error}); write them again, or remove it."
    ) from error
  if found.class_names and len(found.class_names) != found.num_classes:
    raise UserError(
      f"weights {source}: expected names of their {found.num_classes} classes, got "
      f"{len(found.class_names)}; write them again."
    )
  return found


def metadata(
  variant: str,
  class_names: Sequence[str],
  image_size: tuple[int, int],
  grid: tuple[int, int],
  preprocess: Mapping[str, Any],
  fields: Mapping[str, Any] | None = None,
  huggingface: str = "",
) -> dict[str, str]:
  """Returns the metadata that `describe` reads, as text by key.

  Args:
    variant: The variant that the weights are for.
    class_names: Names of the classifier's outputs; empty if unknown.
    image_size: Height and width of the input images, in pixels.
    grid: Rows and columns of the position embeddings.
    preprocess: Values of `data.Preprocess` by name; other values are ignored.
    fields: Fields of the model's spec; None for those of the variant.
    huggingface: The config.json of transformers that the weights came with, as text; or empty.
  """
  values: dict[str, Any] = {
    "variant": variant,
    "class_names": list(class_names),
    "image_size": list(image_size),
    "grid": list(grid),
    "preprocess": {name: preprocess[name] for name in PREPROCESS},
  }
  if fields:
    values["fields"] = dict(fields)
  if huggingface:
    values["huggingface"] = huggingface
  # A single key, because safetensors writes keys in arbitrary order: files of equal runs differed.
  return {KEY: json.dumps(values, allow_nan=False)}


def _pair(values: Sequence[int]) -> tuple[int, int]:
  height, width = map(int, values)
  if min(height, width) < 1:
    raise ValueError(f"{values} is no size")
  return height, width


def _preprocess(values: Mapping[str, Any]) -> dict[str, Any]:
  """Checks values of `data.Preprocess`, and converts lists to tuples."""
  found = {}
  for name, kind in PREPROCESS.items():
    value = values[name]
    if not isinstance(value, kind):
      raise TypeError(f"{name} is {value!r}")
    if kind is _COLOURS:
      red, green, blue = map(float, value)
      value = red, green, blue
    found[name] = value
  return found
