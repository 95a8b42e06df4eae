"""Converts the image preprocessing of Hugging Face transformers to fields of a spec, and back."""

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights.dialects.huggingface_configs import Config, Family

_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclasses.dataclass(frozen=True)
class _Processor:
  """What a class does if its file does not specify it.

  Attributes:
    resample: Resizing filter, by Pillow's number.
    crops: Whether a centre crop follows the resizing.
    keeps_ratio: Whether a single length is that of the shorter side rather than of both.
  """

  resample: int
  crops: bool = False
  keeps_ratio: bool = False


_PROCESSORS = {
  "ViT": _Processor(2),
  "DeiT": _Processor(3, crops=True),
  "Beit": _Processor(3),
  "Bit": _Processor(3, crops=True, keeps_ratio=True),
  "CLIP": _Processor(3, crops=True, keeps_ratio=True),
  "Siglip": _Processor(3),
  "Siglip2": _Processor(2),
  "DINOv3ViT": _Processor(2),
}


def find_preparation(configs: Mapping[str, Config]) -> tuple[str, Config] | None:
  """Returns the name and the settings of the file that describes the preprocessing, if any."""
  if "preprocessor_config.json" in configs:
    return "preprocessor_config.json", configs["preprocessor_config.json"]
  settings = configs.get("processor_config.json", {}).get("image_processor")
  if isinstance(settings, Mapping):  # beside the settings of a tokenizer
    return "processor_config.json", settings
  return None


def image_fields(
  file: str, settings: Config, family: Family, image_size: tuple[int, int]
) -> dict[str, object]:
  """Returns the fields of a spec that the preprocessing of images sets.

  Args:
    file: Name of the file, for messages.
    settings: Settings in the file.
    family: The model's family.
    image_size: Height and width in the model's configuration.

  Returns:
    Values by the names of `models.spec.ViTSpec`'s fields; the image size only if the model accepts
    any size.

  Raises:
    UserError: If this library does not support the preprocessing.
  """
  settings = {name: value for name, value in settings.items() if value is not None}
  kind = str(settings.get("image_processor_type", settings.get("feature_extractor_type", "")))
  kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind) or family.processor
  processor = _PROCESSORS.get(kind)
  if processor is None:
    raise UserError(
      f"{file}: expected images to be prepared by one of {', '.join(_PROCESSORS)}, got {kind}; "
      "remove the file, and give the preprocessing."
    )
  fields = _colours(file, settings)
  if kind == "Siglip2":
    logging.warning("%s: images are made square, not resized to a grid of their own shape", file)
    settings = {**settings, "size": {"height": image_size[0], "width": image_size[1]}}
  if not settings.get("do_resize", True):
    return fields
  number = settings.get("resample", processor.resample)
  if number not in _INTERPOLATIONS:
    raise UserError(
      f"{file}: expected resample to be one of {_INTERPOLATIONS}, got {number}; change it."
    )
  made, crop_pct, mode = _resize(file, settings, processor)
  fields |= {
    "interpolation": _INTERPOLATIONS[number],
    "crop_pct": crop_pct,
    "crop_mode": mode,
  }
  if family.any_size:
    fields["image_size"] = made
  elif made != image_size:
    logging.warning(
      "%s makes images of %d x %d pixels, the model takes %d x %d: images are made so",
      *(file, *made, *image_size),
    )
  return fields


def _resize(
  file: str, settings: Config, processor: _Processor
) -> tuple[tuple[int, int], float, str]:
  """Returns the size of the resulting images, the share that the crop keeps, and its mode."""
  size, crops = settings.get("size"), settings.get("do_center_crop", processor.crops)
  shorter = None
  if isinstance(size, int) and processor.keeps_ratio:
    shorter = size
  elif isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
    shorter = size["shortest_edge"]
  made = _pair(settings.get("crop_size") if crops else size)
  resized = (shorter, shorter) if shorter else _pair(size)
  if made is None or resized is None or (shorter and made[0] != made[1]):
    raise UserError(
      f"{file}: expected a size of height and width, or of shortest_edge with a square crop_size, "
      f"got size {size} and crop_size {settings.get('crop_size') if crops else None}; remove the "
      "file, and give the preprocessing."
    )
  shares = {kept / whole for kept, whole in zip(made, resized, strict=True)}
  crop_pct = min(shares)
  if len(shares) > 1 or crop_pct > 1:
    raise UserError(
      f"{file}: expected crop_size to be one share of size, got {made} of {resized}; remove the "
      "file, and give the preprocessing."
    )
  if math.floor(made[0] / crop_pct) != resized[0] or math.floor(made[1] / crop_pct) != resized[1]:
    crop_pct = made[0] / (resized[0] + 0.5)  # so that rounding down gives the size
  return made, crop_pct, "center" if shorter else "squash"


def _pair(size: object) -> tuple[int, int] | None:
  """Returns height and width; None unless both are given."""
  if isinstance(size, int):
    return size, size
  if isinstance(size, Mapping) and {"height", "width"} <= set(size):
    return int(size["height"]), int(size["width"])
  return None


def _colours(file: str, settings: Config) -> dict[str, object]:
  """Returns the mean and the standard deviation for values in [0, 1]."""
  scale = 255 * settings.get("rescale_factor", 1 / 255)
  if not settings.get("do_rescale", True):
    scale = 255.0
  scale = 1.0 if math.isclose(scale, 1.0, rel_tol=1e-6) else scale
  values = {"mean": settings.get("image_mean"), "std": settings.get("image_std")}
  if not settings.get("do_normalize", True):
    values = {"mean": 0.0, "std": 1.0}
  fields: dict[str, object] = {}
  for name, value in values.items():
    if value is None:
      continue
    channels = list(value) if isinstance(value, list | tuple) else [value]
    channels = channels * 3 if len(channels) == 1 else channels
    if len(channels) != 3:
      raise UserError(f"{file}: expected three numbers for image_{name}, got {value}; correct it.")
    fields[name] = tuple(float(channel) / scale for channel in channels)
  return fields


def preparation_of(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the content of a `preprocessor_config.json`; the inverse of `image_fields`.

  Args:
    fields: Fields of a spec.

  Raises:
    UserError: If transformers does not support the preprocessing.
  """
  height, width = fields["image_size"]
  resized = [math.floor(side / fields["crop_pct"]) for side in (height, width)]
  keeps_ratio = fields["crop_mode"] == "center"
  is_known = keeps_ratio and height == width or fields["crop_mode"] == "squash"
  if not is_known or fields["pad"] or fields["exif_orientation"]:
    raise UserError(
      "transformers: expected images that are resized and cropped, got crop_mode "
      f"{fields['crop_mode']}, pad {fields['pad']}, exif_orientation {fields['exif_orientation']}."
    )
  crops = keeps_ratio or resized != [height, width]
  kind = "CLIP" if keeps_ratio else "DeiT" if crops else "ViT"
  size = {"height": resized[0], "width": resized[1]}
  return {
    "image_processor_type": f"{kind}ImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": resized[0]} if keeps_ratio else size,
    "resample": next(n for n, name in _INTERPOLATIONS.items() if name == fields["interpolation"]),
    "do_center_crop": crops,
    "crop_size": {"height": height, "width": width},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(fields["mean"]),
    "image_std": list(fields["std"]),
  }
