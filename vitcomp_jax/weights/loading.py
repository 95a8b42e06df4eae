"""Loads specs and parameters of models from weights, and writes weights."""

import dataclasses
import functools
import importlib.resources
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax.errors import UserError
from vitcomp_jax.models import tags
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.build import build
from vitcomp_jax.models.reducers import keep_all
from vitcomp_jax.models.slicing import LayerIndex, slice_params
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.variants import VARIANTS, get_spec
from vitcomp_jax.weights import description, files
from vitcomp_jax.weights.description import Description
from vitcomp_jax.weights.timm import check, port, without_head

Params = dict[str, Any]


def spec_for(
  variant: str,
  weights: str | None = None,
  num_classes: int | None = None,
  image_size: int | tuple[int, int] | None = None,
  dtype: str | None = None,
) -> ViTSpec:
  """Returns a variant's spec with the metadata of its weights; reads no tensors.

  Args:
    variant: timm's name.
    weights: File, hub id, or `bundled`, as in `load`; None: random weights.
    num_classes: Outputs of the classifier, as in `load`.
    image_size: Image size in pixels, as in `load`.
    dtype: Dtype of the computation; None: that of inputs and weights.

  Raises:
    UserError: For an unknown variant, or weights that are missing or for another variant.
  """
  if num_classes is not None and (type(num_classes) is not int or num_classes < 0):
    raise UserError(f"num_classes: expected a whole number, 0 or more, got {num_classes!r}.")
  sides = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
  if image_size is not None and [type(side) for side in sides] != [int, int]:
    raise UserError(
      f"image size: expected a whole number of pixels, or height and width, got {image_size!r}."
    )
  spec = get_spec(variant, num_classes, image_size, dtype)
  if weights is None:
    return spec
  about = files.describe(_located(spec, weights))
  _check_variant(spec, about)
  changes = _preprocess_of(spec, weights, about)
  if num_classes is None:
    changes["num_classes"] = about.num_classes
  if num_classes in (None, about.num_classes):
    changes["class_names"] = about.class_names
  if num_classes is None and not about.num_classes:
    logging.warning("weights %s: they have no classifier, so the model gives features", weights)
  size = about.image_size or _square_size(spec, about)
  if image_size is None and size is not None:
    changes["image_size"] = size
    if size != spec.image_size:
      logging.info("weights %s: they are for images of %d x %d pixels", weights, *size)
  return dataclasses.replace(spec, **changes)


def variant_of(weights: str) -> str:
  """Returns the variant that weights name, in their metadata or by timm's hub id.

  Raises:
    UserError: If the weights are missing, or name no variant.
  """
  about = files.describe(weights)
  name = about.variant or tags.architecture(about.source)
  if name is None:
    raise UserError(
      f"{weights}: expected weights that say what they are of, got none that do; name the "
      "architecture, by config.model.variant, or as the first argument of load."
    )
  return name


def _preprocess_of(spec: ViTSpec, weights: str, about: Description) -> dict[str, Any]:
  """Returns the preprocessing in the weights' metadata, or timm's for their hub id."""
  if about.preprocess:
    return dict(about.preprocess)
  if tag := tags.tag_of(weights):
    return {k: v for k, v in tags.spec_changes(tag).items() if k in description.PREPROCESS}
  if files.is_hub_id(weights):
    tags.warn_unknown(weights, spec)
  return {}


# Fields of a spec that do not affect the meaning of the weights.
_FREE_FIELDS = {"name", "image_size", "num_classes", "class_names", "dtype", "attention"}
_FREE_FIELDS |= {"antialias", *description.PREPROCESS}


def _check_variant(spec: ViTSpec, about: Description) -> None:
  """Refuses weights of an architecture whose tensors have equal shapes but another meaning."""
  name = about.variant or tags.architecture(about.source)
  theirs = VARIANTS.get(name or "")
  # A variant with a dot uses the same tensors differently, such as MAE's mean of patches.
  if theirs is None or name == spec.name.split(".")[0]:
    return
  values, mine = dataclasses.asdict(theirs), dataclasses.asdict(spec)
  for name in values.keys() - _FREE_FIELDS:
    if values[name] != mine.get(name):
      raise UserError(
        f"weights {about.source}: expected weights of {spec.name} ({name} {mine.get(name)}), got "
        f"those of {theirs.name} ({values[name]}); give that variant, or other weights."
      )


def _square_size(spec: ViTSpec, about: Description) -> tuple[int, int] | None:
  """Returns the image size of position embeddings on a square grid; None if not square."""
  rows = about.shapes.get("pos_embed", (1, 0, 0))[1]
  # DINOv2's authors have a row for CLS even with registers.
  patches = rows - spec.pos_prefix - ("register_tokens" in about.shapes)
  side = math.isqrt(max(patches, 0))
  return (side * spec.patch_size,) * 2 if patches > 0 and side**2 == patches else None


def save_params(spec: ViTSpec, params: Params, path: str | os.PathLike[str]) -> None:
  """Writes weights as safetensors with timm's names and metadata.

  Args:
    spec: The model, whose name, class names, image size and preprocessing are the metadata.
    params: Parameters of the model.
    path: Path of the file; folders are made.

  Raises:
    UserError: If the file cannot be written.
  """
  metadata = description.metadata(
    spec.name, spec.class_names, spec.image_size, spec.grid, vars(spec)
  )
  files.write(params, os.fspath(path), metadata)


def load_params(
  spec: ViTSpec,
  layers: tuple[LayerSpec, ...],
  weights: str | None,
  seed: int = 0,
  fresh_head: bool = False,
  indices: Sequence[LayerIndex] | None = None,
  fresh_predictors: bool = False,
  widen: bool = True,
) -> Params:
  """Returns a model's parameters: weights fitted to it, or random ones.

  Args:
    spec: The model.
    layers: Layers of the model.
    weights: File, hub id, or `bundled`, as in `load`; None: random weights.
    seed: Seed of random parameters.
    fresh_head: Whether to accept weights for another number of classes or other class names, with a
      random head and a warning.
    indices: Units that slimmed layers keep; weights of the dense network are sliced, those of the
      slimmed one are not.
    fresh_predictors: Whether to accept weights without DynamicViT's prediction modules, with random
      ones.
    widen: Whether weights of half precision become float32.
  """
  if weights is None:
    model, images = build(spec, layers), jnp.zeros((1, *spec.image_size, 3))
    return dict(jax.jit(model.init)(jax.random.key(seed), images)["params"])
  weights = _located(spec, weights)
  state = files.read(weights, widen=widen)
  shapes = {name: array.shape for name, array in state.items()}
  about = description.describe(weights, shapes, files.read_metadata(weights))
  if fresh_head and about.class_names and spec.class_names not in ((), about.class_names):
    state = without_head(state)
  predictors: Params = {}
  if not any(".select." in name or name.startswith("score_predictor.") for name in state):
    layers, predictors = _split_predictors(spec, layers, seed, fresh_predictors)
  is_cut = indices is None or _has_widths(state, layers)
  params = port(
    state,
    abstract_params(build(spec, layers if is_cut else spec.dense_layers)),
    grid=spec.grid,
    prefix_positions=spec.pos_prefix,
    antialias=spec.antialias,
    old_grid=about.grid,
    initial=functools.partial(load_params, spec, layers, None, seed) if fresh_head else None,
  )
  for path, value in jax.tree.leaves_with_path(params):
    with np.errstate(over="ignore"):  # float64 may exceed float32's range
      value = np.asarray(value, jax.dtypes.canonicalize_dtype(value.dtype))
    if not (jnp.issubdtype(value.dtype, jnp.floating) and np.isfinite(value).all()):
      name = ".".join(key.key for key in path)
      raise UserError(f"weights {weights}: expected finite floats, got others in {name}.")
  if indices and not is_cut:
    params = slice_params(params, indices)
  for block, module in predictors.items():
    params[block] = params[block] | {"select": module}
  return jax.tree.map(jnp.asarray, params)


def _split_predictors(
  spec: ViTSpec, layers: tuple[LayerSpec, ...], seed: int, fresh: bool
) -> tuple[tuple[LayerSpec, ...], Params]:
  """Returns layers without DynamicViT's prediction modules, and random modules by block name.

  Raises:
    UserError: If there are prediction modules, and they may not be random.
  """
  places = [i for i, layer in enumerate(layers) if isinstance(layer.select, nn.Module)]
  if not places:
    return layers, {}
  if not fresh:
    raise UserError(
      "weights: expected DynamicViT's prediction modules, which the plan has, got none; train them "
      "with the stage finetune, or give weights that were trained."
    )
  random = load_params(spec, layers, None, seed)
  without = tuple(
    dataclasses.replace(layer, select=keep_all) if i in places else layer
    for i, layer in enumerate(layers)
  )
  return without, {f"blocks_{i}": random[f"blocks_{i}"]["select"] for i in places}


def _has_widths(state: Mapping[str, np.ndarray], layers: tuple[LayerSpec, ...]) -> bool:
  """Returns whether weights with timm's names are those of slimmed layers."""
  expected = {}
  for i, layer in enumerate(layers):
    expected[f"blocks.{i}.attn.qkv.weight"] = 3 * layer.num_heads * layer.head_dim
    expected[f"blocks.{i}.mlp.fc1.weight"] = layer.mlp_dim
  return all(name in state and len(state[name]) == rows for name, rows in expected.items())


def abstract_params(model: Backbone) -> Params:
  """Returns the shapes of a model's parameters."""
  images = jax.ShapeDtypeStruct((1, *model.spec.image_size, 3), jnp.float32)
  return dict(jax.eval_shape(model.init, jax.random.key(0), images)["params"])


def check_params(model: Backbone, params: Params) -> None:
  """Refuses parameters that are not a model's.

  Raises:
    UserError: If parameters are missing, unexpected or misshapen; lists them by timm's names.
  """
  check(params, abstract_params(model))


def _located(spec: ViTSpec, weights: str) -> str:
  """Returns weights as given, with `bundled` replaced by the path of the packaged file."""
  return bundled_weights(spec) if weights == "bundled" else weights


def bundled_weights(spec: ViTSpec) -> str:
  """Returns the path of the weights that ship with the package.

  Raises:
    UserError: If there are none for this variant.
  """
  folder = importlib.resources.files("vitcomp_jax") / "bundled"
  path = folder / f"{spec.name}.safetensors"
  if not path.is_file():
    known = sorted(p.name.removesuffix(".safetensors") for p in folder.iterdir())
    known = [name for name in known if not name.endswith(".json")]
    raise UserError(
      f"weights: expected a variant whose weights ship with the package ({', '.join(known)}), "
      f"got {spec.name}; give a file or a hub id."
    )
  return str(path)
