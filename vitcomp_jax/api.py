"""Functions on models: load, compress, apply, preprocess, count; part of `import vitcomp_jax`."""

import dataclasses
import difflib
import functools
import os
from collections.abc import Mapping, Sequence

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float

from vitcomp_jax import paths, saved
from vitcomp_jax.cost import macs
from vitcomp_jax.data.transforms import evaluation_image, normalize
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.build import build
from vitcomp_jax.models.slicing import slice_params
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.variants import VARIANTS, get_spec
from vitcomp_jax.plans import Plan, load_plan
from vitcomp_jax.weights import formats, loading
from vitcomp_jax.weights.dialects import open_clip
from vitcomp_jax.weights.loading import Params, abstract_params, check_params

Path = str | os.PathLike[str]


def load(
  source: Path,
  weights: Path | None = None,
  plan: Plan | Path | None = None,
  num_classes: int | None = None,
  image_size: int | tuple[int, int] | None = None,
  **fields: object,
) -> tuple[Backbone, Params]:
  """Loads a model and its parameters.

  Args:
    source: A checkpoint, which describes its own model: a folder written by Hugging Face
      transformers, timm, OpenCLIP or `save`, a file, or a hub id such as
      `google/vit-base-patch16-224`. Or the name of an architecture in timm or OpenCLIP.
    weights: Weights of a named architecture: a file, a hub id, or `bundled`; None: random weights.
    plan: A plan, a published plan's name or the path of a plan.json; None: the folder's, or dense.
    num_classes: Outputs of the classifier. None: the weights' classifier; weights without one give
      pooled features, with a warning. 0: pooled features, without the weights' classifier. A number
      other than the weights': a new, random classifier to train, with a warning.
    image_size: Side of a square, or height and width, in pixels; None: the weights'. Position
      embeddings of another grid are resampled.
    **fields: Other fields of `ViTSpec` that a checkpoint may not specify, such as `num_heads`,
      `norm_eps`, `activation` or `pool`; they override the checkpoint's own values.

  Returns:
    A Flax module, and its parameter tree. `model.spec` has the class names and the preprocessing of
    the weights, if known.

  Raises:
    UserError: If source, weights or plan are missing or do not fit each other, or a checkpoint
      does not determine its model; the message names the missing argument.

  Examples:
    >>> import vitcomp_jax as vc
    >>> model, params = vc.load("vit_mini_patch3_30", "bundled")
    >>> model.spec.image_size, model.spec.num_classes
    ((30, 30), 10)
    >>> model, params = vc.load("vit_mini_patch3_30", "bundled", num_classes=0)  # features
    >>> "head" in params
    False
  """
  name, fresh = os.fspath(source), num_classes is not None
  _check_fields(fields)
  plan = load_plan(plan) if isinstance(plan, str | os.PathLike) else plan
  if _is_variant(name):
    path = None if weights is None else os.fspath(weights)
    spec = loading.spec_for(name, path, num_classes, image_size, given=fields)
    return _load(spec, path, plan, fresh)
  _check_checkpoint(name, weights)
  if saved.is_folder(name):
    spec = saved.read_spec(name, num_classes, image_size, fields)
    plan = plan or saved.read_plan(name)
    return _load(spec, saved.weights_of(name), plan, fresh, widen=False)
  spec = loading.spec_for(None, name, num_classes, image_size, given=fields)
  return _load(spec, name, plan, fresh)


def _check_fields(fields: Mapping[str, object]) -> None:
  """Rejects names that are not fields of a spec."""
  known = {field.name for field in dataclasses.fields(ViTSpec)} - {"name", "naming", "huggingface"}
  for name in fields:
    if name not in known:
      near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
      raise UserError(f"load: expected fields of ViTSpec, such as {near}, got {name!r}.")


def _load(
  spec: ViTSpec, weights: str | None, plan: Plan | None, fresh_head: bool, widen: bool = True
) -> tuple[Backbone, Params]:
  layers = plan.layers_for(spec) if plan else spec.dense_layers
  indices = plan.indices if plan else None
  params = loading.load_params(
    spec, layers, weights, fresh_head=fresh_head, indices=indices, widen=widen
  )
  return build(spec, layers), params


def _is_variant(name: str) -> bool:
  """Returns whether a source is the name of an architecture, with or without a tag."""
  is_tagged = name.split(".")[0] in VARIANTS and not name.endswith(formats.SUFFIXES)
  return name in VARIANTS or is_tagged or name in open_clip.names()


def _check_checkpoint(source: str, weights: Path | None) -> None:
  """Rejects a source that is not a checkpoint, and weights given along with a checkpoint."""
  path = paths.expand(source)
  if not (os.path.exists(path) or "/" in source or source.endswith(formats.SUFFIXES)):
    get_spec(source)  # raises, and names the nearest variants
  if weights is not None:
    raise UserError(
      f"weights: expected none beside the checkpoint {source}, got {os.fspath(weights)}; leave "
      "them out, or name the architecture instead of the checkpoint."
    )


def compress(model: Backbone, params: Params, plan: Plan | Path) -> tuple[Backbone, Params]:
  """Compresses a model by a plan.

  Args:
    model: A dense model, or one already slimmed by the plan's widths.
    params: Parameters of the model.
    plan: A plan, a published plan's name or the path of a plan.json.

  Returns:
    The compressed model and its parameters. For a dense model, these are the plan's own parameters
    if it has any, or slices of the model's if the plan has indices.

  Raises:
    UserError: If the plan is for another model, or needs weights that neither the plan nor the
      model has.

  Examples:
    >>> import vitcomp_jax as vc
    >>> model, params = vc.load("vit_mini_patch3_30", "bundled")
    >>> small, small_params = vc.compress(model, params, vc.tome(model, r=7))
    >>> round(vc.count_cost(small).gmacs / vc.count_cost(model).gmacs, 2)
    0.68
  """
  plan = load_plan(plan) if isinstance(plan, str | os.PathLike) else plan
  if not isinstance(plan, Plan):
    raise UserError(f"compress: expected a plan, its name or path, got {plan!r}.")
  layers = plan.layers_for(model.spec)
  is_dense = _units(model.layers) == _units(model.spec.dense_layers)
  if is_dense and plan.params is not None:
    params = dict(plan.params)
  elif is_dense and plan.indices:
    params = slice_params(params, plan.indices)
  elif _units(model.layers) != _units(layers):
    if not is_dense:
      raise UserError(
        f"compress: expected a plan that keeps what the slimmed {model.spec.name} has, got "
        "another; give the dense model and its parameters."
      )
    raise UserError(
      "compress: expected a plan with the weights of its slimmed network, got one read without "
      "them; load both by vc.load(weights, plan=plan)."
    )
  small = build(model.spec, layers)
  check_params(small, params)
  return small, jax.tree.map(jnp.asarray, params)


def _units(layers: Sequence[LayerSpec]) -> list[tuple[object, ...]]:
  """Returns each layer's units or widths, which are equal for models whose weights fit."""
  return [(layer.index, layer.widths, layer.rotated) for layer in layers]


def apply(
  model: Backbone, params: Params, images: Float[Array | np.ndarray, "b h w c"]
) -> Float[Array, "b c"]:
  """Computes logits (features without a classifier); compiled once per model and batch shape.

  Args:
    model: Result of `load` or `compress`. Models with equal plans are equal and share a
      compilation.
    params: Parameters of the model.
    images: Images, normalised by `model.spec.mean` and `model.spec.std` as `preprocess` does.

  Examples:
    >>> import vitcomp_jax as vc
    >>> model, params = vc.load("vit_mini_patch3_30", "bundled")
    >>> import numpy as np
    >>> vc.apply(model, params, np.zeros((2, 30, 30, 3), np.float32)).shape
    (2, 10)
  """
  shape, expected = getattr(images, "shape", ()), model.spec.image_shape
  if len(shape) != 4 or shape[1:] != expected:
    got = list(shape) if shape else type(images).__name__
    raise UserError(
      f"images: expected floats of shape [b, {', '.join(map(str, expected))}], got {got}."
    )
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise UserError(f"images: expected floats, as preprocess makes them, got {images.dtype}.")
  try:
    return _apply(model, params, images)
  except (flax.errors.FlaxError, TypeError) as error:
    check_params(model, params)  # names the parameter that is missing
    raise error


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: Backbone, params: Params, images: Array | np.ndarray) -> Array:
  return model.apply({"params": params}, images)


def preprocess(
  model: Backbone, images: Sequence[PIL.Image.Image | np.ndarray] | np.ndarray
) -> Float[np.ndarray, "b h w 3"]:
  """Converts images to a model's input as in evaluation: resizes, crops and normalises them.

  Args:
    model: Model whose `spec.preprocess` is applied.
    images: PIL images or arrays uint8[h w 3] (or uint8[h w], grey) of any sizes; or uint8[b h w 3].

  Raises:
    UserError: If an element is not an image, or the list is empty.

  Examples:
    >>> import vitcomp_jax as vc
    >>> model, params = vc.load("vit_mini_patch3_30", "bundled")
    >>> import numpy as np
    >>> vc.preprocess(model, [np.zeros((28, 28, 3), np.uint8), np.zeros((40, 60), np.uint8)]).shape
    (2, 30, 30, 3)
  """
  if isinstance(images, PIL.Image.Image) or getattr(images, "ndim", 4) != 4 or not len(images):
    raise UserError(
      "images: expected a list of images or uint8[b h w 3], got "
      f"{getattr(images, 'shape', None) or type(images).__name__}; put one image into a list."
    )
  pre = model.spec.preprocess
  pixels = [
    evaluation_image(image if isinstance(image, PIL.Image.Image) else np.asarray(image), pre)
    for image in images
  ]
  return normalize(np.stack(pixels), pre)


@dataclasses.dataclass(frozen=True)
class Cost:
  """The cost of a model.

  Attributes:
    gmacs: 1e9 multiply-accumulates per image (the papers' "GFLOPs").
    params: Number of parameters.

  Examples:
    >>> import vitcomp_jax as vc
    >>> model, params = vc.load("vit_mini_patch3_30", "bundled")
    >>> vc.count_cost(model).params
    408970
  """

  gmacs: float
  params: int


def count_cost(model: Backbone) -> Cost:
  """Counts a model's multiply-accumulates and parameters.

  Examples:
    >>> import vitcomp_jax as vc
    >>> model, params = vc.load("vit_mini_patch3_30", "bundled")
    >>> vc.count_cost(model)
    Cost(gmacs=0.05, params=408970)
  """
  params = abstract_params(model)
  gmacs = macs.static_macs(model.spec, model.layers) / 1e9
  return Cost(gmacs, sum(p.size for p in jax.tree.leaves(params)))
