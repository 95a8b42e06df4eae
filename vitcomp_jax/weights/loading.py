"""Loads specs and parameters of models from weights, and writes weights."""

import dataclasses
import functools
import importlib.resources
import logging
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
from vitcomp_jax.models.variants import fields_of, get_spec, is_variant, values_of
from vitcomp_jax.weights import description, files, hub
from vitcomp_jax.weights.checkpoint import (
  Checkpoint,
  describe,
  log_origins,
  named_spec,
  open_checkpoint,
)
from vitcomp_jax.weights.dialects import open_clip
from vitcomp_jax.weights.tensors import State
from vitcomp_jax.weights.timm import check, port, without_head

Params = dict[str, Any]


def spec_for(
  variant: str | None,
  weights: str | None = None,
  num_classes: int | None = None,
  image_size: int | tuple[int, int] | None = None,
  dtype: str | None = None,
  given: Mapping[str, object] | None = None,
) -> ViTSpec:
  """Returns the spec of weights or of a variant; no tensor is read.

  Args:
    variant: A variant's name; None: the one that the weights describe.
    weights: File, folder, hub id, or `bundled`, as in `load`; None: random weights of a variant.
    num_classes: Outputs of the classifier, as in `load`.
    image_size: Image size in pixels, as in `load`.
    dtype: Dtype of the computation; None: that of inputs and weights.
    given: Other fields of the spec, which take precedence over what the weights specify.

  Raises:
    UserError: If the variant is unknown, or the weights are missing, of another variant, or do not
      describe their model.
  """
  if num_classes is not None and (type(num_classes) is not int or num_classes < 0):
    raise UserError(f"num_classes: expected a whole number, 0 or more, got {num_classes!r}.")
  sides = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
  if image_size is not None and [type(side) for side in sides] != [int, int]:
    raise UserError(
      f"image size: expected a whole number of pixels, or height and width, got {image_size!r}."
    )
  if weights is None:
    if variant is None:
      raise UserError("weights: expected weights or an architecture's name, got neither.")
    if variant in open_clip.names():
      raise UserError(
        f"{variant} is OpenCLIP's name of an architecture with many weights: expected them too, as "
        "in weights=FILE or weights=laion/CLIP-ViT-B-32-laion2B-s34B-b79K, got none."
      )
    spec = get_spec(variant, num_classes, image_size, dtype)
    return dataclasses.replace(spec, **values_of(given or {}))
  # This raises an error for an unknown name, before any file is looked for.
  usual = None if variant is None else named_spec(variant).image_size
  checkpoint = open_checkpoint(_located(variant, weights))
  asked = dict(given or {}) | ({} if image_size is None else {"image_size": tuple(sides)})
  if image_size is not None and variant is not None and variant not in open_clip.names():
    get_spec(variant, image_size=image_size)  # rejects a size that the patch size does not divide
  spec, origins = describe(checkpoint, variant, asked)
  log_origins(checkpoint, origins)
  _check_grid(spec, checkpoint)
  changes: dict[str, Any] = {"dtype": dtype, "huggingface": checkpoint.huggingface}
  theirs = checkpoint.about.num_classes
  changes["num_classes"] = theirs if num_classes is None else num_classes
  if num_classes in (None, theirs):
    changes["class_names"] = checkpoint.class_names
  else:
    changes["projection"] = False
  if num_classes is None and not theirs:
    logging.warning("weights %s: they have no classifier, so the model gives features", weights)
  if image_size is None and usual not in (None, spec.image_size):
    logging.info("weights %s: they are for images of %d x %d pixels", weights, *spec.image_size)
  if hub.is_id(weights) and "mean" not in origins:
    tags.warn_unknown(weights, spec)
  return dataclasses.replace(spec, **changes)


def _check_grid(spec: ViTSpec, checkpoint: Checkpoint) -> None:
  """Rejects another grid for weights with relative position biases, which are not resampled."""
  if spec.relative_bias is None:
    return
  rows, columns = spec.grid
  expected = (2 * rows - 1) * (2 * columns - 1) + 3  # see `models.positions.RelativeBias`
  for name, table in checkpoint.tensors.items():
    if name.endswith("relative_position_bias_table") and table.shape[0] != expected:
      raise UserError(
        f"weights {checkpoint.name}: expected images of as many patches as in training, as biases "
        f"by relative position are not resampled, got {rows} x {columns}; leave out image_size."
      )


def save_params(spec: ViTSpec, params: Params, path: str | os.PathLike[str]) -> None:
  """Writes weights as safetensors, with timm's names and metadata.

  Args:
    spec: The model, whose name, class names, image size and preprocessing become the metadata.
    params: Parameters of the model.
    path: Path of the file; missing folders are created.

  Raises:
    UserError: If the file cannot be written.
  """
  is_named = is_variant(spec) and not spec.projection
  fields = None if is_named else fields_of(spec, with_defaults=True)
  metadata = description.metadata(
    spec.name, spec.class_names, spec.image_size, spec.grid, vars(spec), fields, spec.huggingface
  )
  files.write(params, os.fspath(path), metadata, spec.naming)


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
  """Returns a model's parameters: weights fitted to the model, or random parameters.

  Args:
    spec: The model.
    layers: Layers of the model.
    weights: File, hub id, or `bundled`, as in `load`; None: random weights.
    seed: Seed of random parameters.
    fresh_head: Whether to accept weights for another number of classes or other class names, with a
      random head and a warning.
    indices: Units that slimmed layers keep; weights of the dense network are sliced, those of the
      slimmed network are not.
    fresh_predictors: Whether to accept weights without DynamicViT's prediction modules, and make
      random ones.
    widen: Whether half precision is converted to float32.
  """
  if weights is None:
    model, images = build(spec, layers), jnp.zeros((1, *spec.image_shape))
    return dict(jax.jit(model.init)(jax.random.key(seed), images)["params"])
  checkpoint = open_checkpoint(_located(spec.name, weights), widen=widen)
  state, about = checkpoint.tensors, checkpoint.about
  names = checkpoint.class_names
  if fresh_head and names and spec.class_names not in ((), names):
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
    put=functools.partial(_put_on_device, weights),
  )
  if indices and not is_cut:
    params = slice_params(params, indices)
  for block, module in predictors.items():
    params[block] = params[block] | {"select": module}
  return jax.tree.map(jnp.asarray, params)


def _put_on_device(weights: str, array: np.ndarray, name: str) -> jax.Array:
  """Copies an array to the device; rejects values that are not finite floats."""
  with np.errstate(over="ignore"):  # float64 may exceed the range of float32
    array = np.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype))
  if not (jnp.issubdtype(array.dtype, jnp.floating) and np.isfinite(array).all()):
    raise UserError(f"weights {weights}: expected finite floats, got others in {name}.")
  return jnp.asarray(array)


def _split_predictors(
  spec: ViTSpec, layers: tuple[LayerSpec, ...], seed: int, fresh: bool
) -> tuple[tuple[LayerSpec, ...], Params]:
  """Returns layers without DynamicViT's prediction modules, and random modules by block name.

  Raises:
    UserError: If the layers have prediction modules, and random ones are not allowed.
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


def _has_widths(state: State, layers: tuple[LayerSpec, ...]) -> bool:
  """Returns whether weights with timm's names have the widths of the given layers."""
  expected = {}
  for i, layer in enumerate(layers):
    expected[f"blocks.{i}.attn.qkv.weight"] = 2 * layer.widths.qk + layer.widths.value
    expected[f"blocks.{i}.mlp.fc1.weight"] = layer.mlp_dim
  return all(name in state and state[name].shape[0] == rows for name, rows in expected.items())


def abstract_params(model: Backbone) -> Params:
  """Returns the shapes of a model's parameters."""
  return jax.tree.map(lambda shape: shape, _traced_params(model))  # a copy that callers may change


@functools.lru_cache(maxsize=32)
def _traced_params(model: Backbone) -> Params:
  images = jax.ShapeDtypeStruct((1, *model.spec.image_shape), jnp.float32)
  return dict(jax.eval_shape(model.init, jax.random.key(0), images)["params"])


def check_params(model: Backbone, params: Params) -> None:
  """Rejects parameters that do not fit a model.

  Raises:
    UserError: If parameters are missing, unexpected or misshapen; the message lists them by timm's
      names.
  """
  check(params, abstract_params(model))


def _located(variant: str | None, weights: str) -> str:
  """Returns the weights as given, but the path of the packaged file for `bundled`."""
  return bundled_weights(variant) if weights == "bundled" else weights


def bundled_weights(variant: str | None) -> str:
  """Returns the path of the weights that ship with the package.

  Raises:
    UserError: If there are no such weights for this variant.
  """
  folder = importlib.resources.files("vitcomp_jax") / "bundled"
  path = folder / f"{variant}.safetensors"
  if not path.is_file():
    known = sorted(p.name.removesuffix(".safetensors") for p in folder.iterdir())
    known = [name for name in known if not name.endswith(".json")]
    raise UserError(
      f"weights: expected a variant whose weights ship with the package ({', '.join(known)}), "
      f"got {variant}; give a file or a hub id."
    )
  return str(path)
