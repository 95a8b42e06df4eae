"""Model variants under timm's names, and a small one that this project trains."""

import dataclasses
import difflib
import functools
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

from vitcomp_jax.errors import UserError
from vitcomp_jax.models import tags
from vitcomp_jax.models.caformer import caformer
from vitcomp_jax.models.rotary import Rotary
from vitcomp_jax.models.spec import ViTSpec

_HALF = (0.5, 0.5, 0.5)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MINI = "vit_mini_patch3_30"
_CAFORMER = (  # blocks and channels of the four stages
  ("caformer_s18", (3, 3, 9, 3), (64, 128, 320, 512)),
  ("caformer_s36", (3, 12, 18, 3), (64, 128, 320, 512)),
  ("caformer_m36", (3, 12, 18, 3), (96, 192, 384, 576)),
  ("caformer_b36", (3, 12, 18, 3), (128, 256, 512, 768)),
)


def _build() -> dict[str, ViTSpec]:
  """Returns all variants by name, with the preprocessing of timm's weights of that name."""
  models = _table()["models"]
  specs = {name: spec_of({"name": name, **fields}) for name, fields in models.items()}
  for name in ("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"):
    # MAE's authors classify the mean of the patches; the tensors are those of timm's model.
    mae: dict[str, Any] = {
      "pool": "size_mean",
      "final_norm": False,
      "fc_norm": True,
      "num_classes": 1000,
    }
    mae |= {"mean": _MEAN, "std": _STD}
    specs[f"{name}.mae"] = dataclasses.replace(specs[name], name=f"{name}.mae", **mae)
  for name, depths, dims in _CAFORMER:
    specs[name] = caformer(name, (224, 224), depths, dims, crop_pct=1.0)
  # Fashion-MNIST's 28 pixels padded to 30 give 100 patches, enough to compress.
  specs[_MINI] = ViTSpec(
    _MINI,
    image_size=(30, 30),
    patch_size=3,
    width=64,
    depth=8,
    num_heads=2,
    mlp_dim=256,
    num_classes=10,
    mean=_HALF,
    std=_HALF,
    crop_pct=1.0,
  )
  return specs


# Fields of a spec that do not affect the meaning of the weights.
FREE_FIELDS = frozenset(
  """antialias attention class_names crop_mode crop_pct dtype exif_orientation huggingface
  image_size interpolation mean name naming num_classes pad projection std""".split()
)
# Fields that weights and plans store elsewhere, or that the user chooses.
_NOT_KEPT = ("class_names", "huggingface", "dtype", "attention")


def spec_of(fields: Mapping[str, object]) -> ViTSpec:
  """Makes a spec from fields as they are in JSON: lists for tuples, an object for `rotary`."""
  return ViTSpec(**values_of(fields))


def values_of(fields: Mapping[str, object]) -> dict[str, Any]:
  """Converts fields as they are in JSON to values of a `ViTSpec`'s fields."""
  values = {name: _tuple(value) for name, value in fields.items()}
  rotary = values.get("rotary")
  if isinstance(rotary, Mapping):
    values["rotary"] = Rotary(**{name: _tuple(value) for name, value in rotary.items()})
  return values


def _tuple(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value


def fields_of(spec: ViTSpec, with_defaults: bool = False) -> dict[str, Any]:
  """Returns the fields of a spec that describe its model and images, as `spec_of` expects them.

  Args:
    spec: The model.
    with_defaults: Whether to include fields that have their default value.
  """
  fields = {}
  for field in dataclasses.fields(ViTSpec):
    value = getattr(spec, field.name)
    if field.name not in _NOT_KEPT and (with_defaults or value != field.default):
      fields[field.name] = value
  if spec.rotary is not None:
    fields["rotary"] = dataclasses.asdict(spec.rotary)
  return fields


def model_fields_of(spec: ViTSpec) -> dict[str, Any]:
  """Returns the fields of a spec that describe its model and differ from their defaults."""
  fields = fields_of(spec)
  return {
    name: value
    for name, value in fields.items()
    if name not in FREE_FIELDS or name in ("image_size", "num_classes")
  }


def is_plain(spec: ViTSpec) -> bool:
  """Returns whether a spec is of a plain Vision Transformer, not of a subclass such as CAFormer."""
  return type(spec) is ViTSpec


def is_variant(spec: ViTSpec) -> bool:
  """Returns whether a spec matches the variant of its name, except in `FREE_FIELDS`."""
  known = VARIANTS.get(spec.name)
  if known is None or type(known) is not type(spec):
    return False
  names = {field.name for field in dataclasses.fields(spec)} - FREE_FIELDS
  return all(getattr(spec, name) == getattr(known, name) for name in names)


@functools.cache
def _table() -> dict[str, Any]:
  """Reads the table that `tools/timm_models.py` writes."""
  file = importlib.resources.files("vitcomp_jax") / "bundled" / "timm_models.json"
  return json.loads(file.read_text(encoding="utf-8"))


VARIANTS = _build()


def list_variants() -> list[str]:
  """Returns the names of all variants, sorted.

  Examples:
    >>> import vitcomp_jax as vc
    >>> "deit_small_patch16_224" in vc.list_variants()
    True
  """
  return sorted(VARIANTS)


def get_spec(
  variant: str,
  num_classes: int | None = None,
  image_size: int | tuple[int, int] | None = None,
  dtype: str | None = None,
) -> ViTSpec:
  """Returns the spec of a variant, by timm's name with or without a pre-training tag.

  Args:
    variant: Name such as `deit_small_patch16_224` or `vit_base_patch16_224.dino`; with a tag, the
      spec has timm's preprocessing for those weights.
    num_classes: Number of classes, 0 for features; None for the variant's or the tag's.
    image_size: Side of a square, or height and width, in pixels; None for the variant's or the
      tag's.
    dtype: Precision of the computation; None for that of inputs and weights.

  Raises:
    UserError: If the variant is unknown, or the patch size does not divide the image size.

  Examples:
    >>> import vitcomp_jax as vc
    >>> vc.get_spec("deit_small_patch16_224", image_size=384).num_tokens
    577
  """
  spec = VARIANTS.get(variant) or VARIANTS.get(variant.split(".")[0])
  if spec is None:
    if why := _table()["refused"].get(variant.split(".")[0]):
      raise UserError(f"variant {variant}: expected a model that this library has, got {why}.")
    near = difflib.get_close_matches(variant, VARIANTS, n=3, cutoff=0.0)
    raise UserError(f"variant {variant!r} is not known; near it are {', '.join(near)}.")
  changes: dict[str, Any] = {"dtype": dtype}
  if "." in variant and variant not in VARIANTS:
    changes |= _tagged(variant, spec)
  if num_classes is not None:
    if num_classes < 0:
      raise UserError(f"num_classes: expected 0 or more, got {num_classes}.")
    changes["num_classes"] = num_classes
  if image_size is not None:
    side = image_size
    changes["image_size"] = (side, side) if isinstance(side, int) else tuple(side)
    _check_size(spec, changes["image_size"])
  return dataclasses.replace(spec, **changes)


def _check_size(spec: ViTSpec, image_size: tuple[int, int]) -> None:
  """Rejects a size that the patch size does not divide, unless it is the model's own size."""
  p = spec.patch_size
  for side in image_size:
    if (side < p or side % p) and image_size != spec.image_size:
      raise UserError(
        f"image size: expected a multiple of the patch size {p} for {spec.name}, got {side}; use "
        f"{max(side // p, 1) * p}."
      )


def _tagged(variant: str, spec: ViTSpec) -> dict[str, Any]:
  """Returns the fields of the architecture's spec that a pre-training tag changes."""
  if (tag := tags.tag_of(variant)) is not None:
    return tags.spec_changes(tag)
  tags.warn_unknown(variant, spec)
  return {}
