"""Describes checkpoints from any library: their model, class names, preprocessing and tensors."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from vitcomp_jax.errors import UserError
from vitcomp_jax.models import tags
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.variants import (
  FREE_FIELDS,
  VARIANTS,
  fields_of,
  get_spec,
  is_plain,
  spec_of,
  values_of,
)
from vitcomp_jax.weights import description, dialects, files, timm_config
from vitcomp_jax.weights.description import Description
from vitcomp_jax.weights.dialects import open_clip
from vitcomp_jax.weights.dialects.described import Configs, Described, described
from vitcomp_jax.weights.dialects.shapes import fields_from_shapes, square_grid
from vitcomp_jax.weights.tensors import State

# Fields that every model needs and that have no suitable default.
_NEEDED = (
  "patch_size",
  "width",
  "depth",
  "mlp_dim",
  "num_heads",
  "norm_eps",
  "activation",
  "pool",
  "image_size",
)
_LISTED = 4  # number of variants to list in an error

Fields = Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Opened weights, under timm's names; no tensor is read yet.

  Attributes:
    name: The file, folder or hub id, as the user gave it.
    tensors: Tensors by timm's names, in PyTorch's layout.
    about: Description of the weights in this library's metadata.
    configs: JSON files beside the weights, by name.
    described: Description of the model by another library's names and configuration.
  """

  name: str
  tensors: State
  about: Description
  configs: Configs
  described: Described

  @property
  def architecture(self) -> str | None:
    """Returns timm's name of the model; None if no metadata, configuration or hub id has it."""
    known = self.about.variant or timm_config.architecture(self.configs)
    said = self.described.fields.get("name")
    return known or (str(said) if said else tags.architecture(self.name))

  @property
  def huggingface(self) -> str:
    """Returns the config.json of transformers, as text; empty without one."""
    config = self.configs.get("config.json", {})
    return json.dumps(config) if "model_type" in config else self.about.huggingface

  @property
  def class_names(self) -> tuple[str, ...]:
    """Returns the names of the classifier's outputs; empty if unknown."""
    names = self.about.class_names or self.described.class_names
    return names or timm_config.class_names(self.configs)


def open_checkpoint(weights: str, cache_dir: str | None = None, widen: bool = True) -> Checkpoint:
  """Opens weights and renames their tensors to timm's names.

  Args:
    weights: File, folder or hub id, as for `files.open_source`.
    cache_dir: Cache folder of the hub; None for the default.
    widen: Whether half precision is converted to float32.

  Raises:
    UserError: As for `files.open_source`, and if a configuration beside the weights is not
      understood.
  """
  source = files.open_source(weights, cache_dir, widen)
  tensors, described = dialects.translate(source.tensors, source.configs)
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  about = description.describe(weights, shapes, source.metadata)
  return Checkpoint(weights, tensors, about, source.configs, described)


def describe(
  checkpoint: Checkpoint, variant: str | None = None, given: Fields | None = None
) -> tuple[ViTSpec, dict[str, str]]:
  """Returns the spec of a checkpoint's model, and where each field comes from.

  Each field is taken from the first of these sources that has it: arguments; this library's
  metadata; the configuration of transformers, timm or OpenCLIP; the tensors' grid; the pre-training
  tag; the variant, if the user names one; the tensors; timm's table for the architecture that the
  weights name.

  Args:
    checkpoint: The weights.
    variant: A variant's name; its shapes are compared with the tensors' when these are read.
    given: Fields of `ViTSpec` that the user gives.

  Raises:
    UserError: If all sources lack a required field, or the weights are described as those of
      another variant.
  """
  shapes = fields_from_shapes(checkpoint.tensors)
  statements = _statements(checkpoint)
  base = _base(checkpoint, variant)
  if variant is not None and base is not None:
    for fields in (*statements.values(), _of_architecture(checkpoint)):
      _check_agrees(checkpoint, base, {k: v for k, v in fields.items() if k not in shapes})
  table = {} if base is None else _defaults(checkpoint, base, shapes)
  sources = {"arguments": given or {}} | statements
  known = described(*sources.items(), ("the table", table), ("tensors", shapes)).fields
  patch = shapes.get("patch_size", known.get("patch_size"))
  sources["the tensors' grid"] = _square_images(checkpoint, {**known, "patch_size": patch})
  sources["its pre-training tag"] = _tagged(checkpoint)
  if base is not None and (variant is not None or not is_plain(base)):
    said = described(*sources.items())
    asked = FREE_FIELDS | (given or {}).keys()
    free = {name: value for name, value in said.fields.items() if name in asked}
    return dataclasses.replace(base, **values_of(free)), dict(said.origins)
  # Extra rows of positions may belong to the prefix, or to a grid that is not square.
  if base is not None:
    shapes.pop("pos_on_prefix", None)
  else:
    shapes |= _prefix_positions(checkpoint, known)
  shapes.pop("image_size", None)
  sources["tensors"] = shapes
  if base is not None:
    sources[f"timm's table of {base.name}"] = table
  said = described(*sources.items())
  fields = dict(said.fields)
  _check_complete(checkpoint, fields, shapes)
  fields.setdefault("name", checkpoint.configs.get("config.json", {}).get("model_type", "vit"))
  return spec_of(fields), dict(said.origins)


def named_spec(name: str) -> ViTSpec:
  """Returns the spec of an architecture by its name in timm, with or without a tag, or OpenCLIP.

  Raises:
    UserError: If the name is unknown.
  """
  fields = open_clip.names().get(name)
  return get_spec(name) if fields is None else spec_of({"name": name, **fields})


def _base(checkpoint: Checkpoint, variant: str | None) -> ViTSpec | None:
  """Returns the spec of the variant, or of the architecture that the weights name."""
  if variant is not None:
    return named_spec(variant)
  name = checkpoint.architecture
  if name is None:
    return None
  if name not in VARIANTS and not checkpoint.about.fields:
    get_spec(name)  # raises an error that says why timm's model of that name is not supported
  return VARIANTS.get(name)


def _statements(checkpoint: Checkpoint) -> dict[str, Fields]:
  """Returns the fields that metadata and configurations state for these weights, by source."""
  about, configs, said = checkpoint.about, checkpoint.configs, checkpoint.described
  statements: dict[str, Fields] = {}
  if about.variant is not None:
    size = {} if about.image_size is None else {"image_size": about.image_size}
    known = about.fields or _table_of(about.variant)
    statements["its metadata"] = {**known, **about.preprocess, **size}
  stated = {k: v for k, v in said.fields.items() if said.origins.get(k) != "tensors"}
  if stated:
    statements["its configuration"] = stated
  if name := timm_config.architecture(configs):
    fields: dict[str, Any] = timm_config.model_fields(configs, checkpoint.name)
    if name in VARIANTS and "rotary" in fields:
      rotary = VARIANTS[name].rotary
      usual = {} if rotary is None else dataclasses.asdict(rotary)
      fields["rotary"] = {**usual, **fields["rotary"]}
    if "dist_token" in checkpoint.tensors:
      fields.pop("pool", None)  # timm writes `token` for CLS with a distillation token too
    statements[timm_config.CONFIG] = fields
  return statements


def _table_of(name: str | None) -> dict[str, object]:
  """Returns all fields of a variant; empty if there is no variant of that name."""
  spec = VARIANTS.get(name or "")
  return fields_of(spec, with_defaults=True) if spec is not None else {}


def _of_architecture(checkpoint: Checkpoint) -> dict[str, object]:
  """Returns the fields of the architecture that timm's config or the hub id names."""
  fields = _table_of(checkpoint.architecture)
  return fields | timm_config.model_fields(checkpoint.configs, checkpoint.name) if fields else {}


def _square_images(checkpoint: Checkpoint, known: Fields) -> dict[str, object]:
  """Returns the size of images whose patches fill the grid that the tensors have positions for.

  Args:
    checkpoint: The weights.
    known: The fields of the spec known so far; the patch size is that of the tensors.
  """
  grid = checkpoint.about.grid or square_grid(checkpoint.tensors, bool(known.get("pos_on_prefix")))
  patch = known.get("patch_size")
  if grid is None or not isinstance(patch, int):
    return {}
  # The sides of the model's own images may not be multiples of its patch size.
  size = known.get("image_size")
  if isinstance(size, tuple | list) and (size[0] // patch, size[1] // patch) == grid:
    return {"image_size": tuple(size)}
  return {"image_size": (grid[0] * patch, grid[1] * patch)}


def _prefix_positions(checkpoint: Checkpoint, known: Fields) -> dict[str, object]:
  """Returns whether the prefix has positions, if the known image size explains their number.

  Args:
    checkpoint: The weights.
    known: The fields of the spec known so far; the patch size is that of the tensors.
  """
  size, patch = known.get("image_size"), known.get("patch_size")
  if "pos_embed" not in checkpoint.tensors or not isinstance(size, tuple | list):
    return {}
  assert isinstance(patch, int)
  rows = checkpoint.tensors["pos_embed"].shape[1]
  tokens = ("cls_token", "dist_token", "reg_token")
  prefix = sum(checkpoint.tensors[n].shape[1] for n in tokens if n in checkpoint.tensors)
  patches = (size[0] // patch) * (size[1] // patch)
  return {"pos_on_prefix": rows > patches} if rows - patches in (0, prefix) else {}


def _tagged(checkpoint: Checkpoint) -> dict[str, object]:
  """Returns the preprocessing and image size from timm's config or the tag."""
  fields = timm_config.image_fields(checkpoint.configs)
  name = timm_config.tag(checkpoint.configs) or checkpoint.name
  if tag := tags.tag_of(name):
    fields = {**tags.spec_changes(tag), **fields}
    del fields["num_classes"]
  return fields


def _defaults(checkpoint: Checkpoint, base: ViTSpec, shapes: Fields) -> dict[str, object]:
  """Returns the architecture's fields, without those that a change of its width leaves unknown."""
  fields = fields_of(base, with_defaults=True)
  is_changed = shapes.get("width", base.width) != base.width
  if is_changed and not timm_config.has_arguments(checkpoint.configs):
    del fields["num_heads"]
  return fields


def _check_agrees(checkpoint: Checkpoint, spec: ViTSpec, statement: Fields) -> None:
  """Rejects weights that are described as those of another architecture than the variant's.

  Args:
    checkpoint: The weights.
    spec: The variant.
    statement: Fields that the weights state, except those that their shapes determine.
  """
  theirs = checkpoint.architecture or checkpoint.described.fields.get("name", "another model")
  # A variant with a dot in its name uses the same tensors differently, such as MAE's mean pooling.
  if theirs == spec.name.split(".")[0]:
    return
  for name, value in values_of(statement).items():
    mine = getattr(spec, name)
    if name not in FREE_FIELDS and value != mine:
      raise UserError(
        f"weights {checkpoint.name}: expected weights of {spec.name} ({name} {mine}), got those of "
        f"{theirs} ({value}); give that variant, or other weights."
      )


def _check_complete(checkpoint: Checkpoint, fields: Fields, shapes: Fields) -> None:
  """Raises an error if fields are missing, which names the variants that the tensors would fit."""
  missing = [name for name in _NEEDED if name not in fields]
  by_attention = {"rotary", "relative_bias"} & fields.keys()
  if fields.get("positions") == "none" and not by_attention:
    missing.append("rotary")
  if not missing:
    return
  fitting = _fitting(shapes)
  hint = f" (those with such tensors are {', '.join(fitting)})" if fitting else ""
  raise UserError(
    f"weights {checkpoint.name}: expected weights that say what they are of, got none that tell "
    f"{', '.join(missing)}; name the architecture{hint}, by config.model.variant or as the first "
    f"argument of load, or give load(…, {missing[0]}=…)."
  )


def _fitting(shapes: Fields) -> Sequence[str]:
  """Returns the names of variants whose tensors have these shapes."""
  free = {"image_size", "num_classes"}
  found = []
  for name, spec in VARIANTS.items():
    mine = fields_of(spec, with_defaults=True)
    if shapes and all(mine[field] == value for field, value in shapes.items() if field not in free):
      found.append(name)
  return found[:_LISTED] + (["…"] if len(found) > _LISTED else [])


def log_origins(checkpoint: Checkpoint, origins: Mapping[str, str]) -> None:
  """Logs where the fields of a spec come from."""
  by_source: dict[str, list[str]] = {}
  for name, origin in origins.items():
    by_source.setdefault(origin, []).append(name)
  for origin, names in by_source.items():
    logging.debug("weights %s: %s from %s", checkpoint.name, ", ".join(sorted(names)), origin)
