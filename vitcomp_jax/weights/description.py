"""Metadata of weights: class names, position grid, image size and preprocessing."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vitcomp_jax.errors import UserError

# The key of the metadata under which this library describes the weights that it writes.
KEY = "vitcomp_jax"
# The weight of a classifier's last layer: timm's names, and CAFormer's authors'.
_CLASSIFIERS = ("head.weight", "head.fc.fc2.weight", "head.fc2.weight")
# The values of `data.Preprocess` that belong to weights, and their types.
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
  """Facts about weights, read without building a model.

  Attributes:
    source: The file, or the hub id, as the user named it.
    shapes: Shapes of the tensors by name.
    variant: The variant that they were written for; None: not said.
    class_names: Of the classifier's outputs, in order; empty: not said.
    image_size: Height and width of the images that they were made for, in pixels; None: not said.
    grid: Rows and columns of the position embeddings; None: not said.
    preprocess: Values of `data.Preprocess` by name; empty: not said.
  """

  source: str
  shapes: Mapping[str, tuple[int, ...]]
  variant: str | None = None
  class_names: tuple[str, ...] = ()
  image_size: tuple[int, int] | None = None
  grid: tuple[int, int] | None = None
  preprocess: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def num_classes(self) -> int:
    """Outputs of the classifier; 0 where there is none."""
    return next((self.shapes[name][0] for name in _CLASSIFIERS if name in self.shapes), 0)


def describe(
  source: str, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
) -> Description:
  """Reads what `metadata` says.

  Args:
    source: As the user named the weights, for errors.
    shapes: Of the tensors, by name.
    metadata: What is stored with them.

  Raises:
    UserError: If this library's part of the metadata is damaged, or names another number of classes
      than the classifier has.
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
) -> dict[str, str]:
  """Writes what `describe` reads, as text by key.

  Args:
    variant: As in `Description`; so are the others.
    class_names: Of the classifier's outputs; empty: not known.
    image_size: In pixels.
    grid: Rows and columns of the position embeddings.
    preprocess: Values of `data.Preprocess` by name, or more.
  """
  values = {
    "variant": variant,
    "class_names": list(class_names),
    "image_size": list(image_size),
    "grid": list(grid),
    "preprocess": {name: preprocess[name] for name in PREPROCESS},
  }
  # One key: safetensors writes several in an order of its own, so that equal runs' files differed.
  return {KEY: json.dumps(values, allow_nan=False)}


def _pair(values: Sequence[int]) -> tuple[int, int]:
  height, width = map(int, values)
  if min(height, width) < 1:
    raise ValueError(f"{values} is no size")
  return height, width


def _preprocess(values: Mapping[str, Any]) -> dict[str, Any]:
  """Checks values of `data.Preprocess`, and makes tuples of lists."""
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
