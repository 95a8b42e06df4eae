"""Writes a model in formats that run without this library, and checks each against the model."""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jaxtyping import Array

from vitcomp_jax import api, exported, multihost, onnx_conversion, paths, scoring
from vitcomp_jax.atomic import replacing, write_json
from vitcomp_jax.data import class_names
from vitcomp_jax.data.transforms import normalize
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.build import build, portable
from vitcomp_jax.models.reducers import StaticReducer
from vitcomp_jax.plans import Plan, plan_of
from vitcomp_jax.weights import loading, timm_slimmed, writing_back
from vitcomp_jax.weights.loading import Params

ENDINGS = {".stablehlo": "stablehlo", ".onnx": "onnx", ".safetensors": "timm"}
_IMAGES = 8  # on which `export` compares
# Relative to the largest output, by dtype of the computation; bfloat16 rounds by 1/256.
_TOLERANCE = {None: 1e-4, "float32": 1e-4, "bfloat16": 2e-2, "float16": 2.5e-3}
# Images that may keep other tokens: if two tokens are equally important up to rounding, either may
# be kept.
_TIES = 3
_BATCHES = (1, 8)  # split points of the images: batches of 1, 7 and the rest
_LARGEST_ONNX = 2**31 - 2**20  # bytes in a protobuf message, with some margin


@dataclasses.dataclass(frozen=True)
class Program:
  """A model to export.

  Attributes:
    model: The model, whose spec's preprocessing and class names are written too.
    params: Weights of the model.
    normalize: Whether the program takes uint8 pixels and normalises them itself, or takes
      normalised floats.
    platforms: Platforms of the StableHLO program.
  """

  model: Backbone
  params: Params
  normalize: bool = False
  platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")

  @property
  def input_dtype(self) -> str:
    """Returns the dtype of the input images."""
    return "uint8" if self.normalize else "float32"

  @property
  def output_name(self) -> str:
    """Returns the name of the output: logits, or features for a model without a classifier."""
    return "logits" if self.model.spec.num_classes else "features"

  @property
  def abstract_images(self) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a batch of any size."""
    (b,) = jax_export.symbolic_shape("b")
    return jax.ShapeDtypeStruct((b, *self.model.spec.image_shape), self.input_dtype)

  def __call__(self, images: Array) -> Array:
    """Computes the outputs, f32[b c], with the weights as constants."""
    images = normalize(images, self.model.spec.preprocess) if self.normalize else images
    outputs = portable(self.model).apply({"params": self.params}, images)
    return outputs.astype(jnp.float32)


def export(model: Backbone, params: Params, path: str | os.PathLike[str]) -> None:
  """Writes a model as one file that runs without this library.

  The file is read back, and its outputs are compared with the model's. `PATH.json` beside it
  describes its input and output; `load_exported` reads both files.

  Args:
    model: Result of `load` or `compress`.
    params: Parameters of the model.
    path: Path whose ending selects the format: `.stablehlo` (any plan; for CPU, CUDA and TPU),
      `.onnx` (any plan, in float32; needs `vitcomp_jax[onnx]`), `.safetensors` (weights for
      timm's model, which may be slimmed to equal widths), or none (a folder for Hugging Face's
      transformers, if the model came from there). The first two include the weights and accept
      any number of images, normalised as `preprocess` does.

  Raises:
    UserError: For another ending, or a model that the format cannot represent.
    RuntimeError: If the file's outputs differ from the model's; the file is removed.

  Examples:
    >>> import tempfile
    >>> import vitcomp_jax as vc
    >>> model, params = vc.load("vit_mini_patch3_30", "bundled")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   vc.export(model, params, f"{folder}/mini.safetensors")  # for timm
    ...   _, same = vc.load(f"{folder}/mini.safetensors")
    >>> bool((same["head"]["bias"] == params["head"]["bias"]).all())
    True
  """
  target, program = pathlib.Path(paths.expand(path)), Program(model, params)
  form = ENDINGS.get(target.suffix)
  if form is None and not (target.suffix == "" and model.spec.huggingface):
    known = ", ".join(f"{ending} ({name})" for ending, name in ENDINGS.items())
    raise UserError(
      f"export: expected a path that ends in one of {known}, or a folder for a model that came "
      f"from transformers, got {str(path)!r}."
    )
  plan = plan_of(model)
  loading.check_params(model, params)
  if form is None:
    writing_back.save_huggingface(model.spec, model.layers, params, target)
    return
  check(form, program)
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (_IMAGES, *model.spec.image_shape))
    entry = write(form, program, target, images.astype(np.uint8))
    about = manifest(program, plan) | {"artefacts": [entry]}
    write_json(exported.manifest_beside(target), about)
  except OSError as error:
    raise UserError(f"export: {target} cannot be written ({error.strerror}).") from error


def check(form: str, program: Program) -> None:
  """Rejects a format that cannot represent the model.

  Args:
    form: `stablehlo`, `onnx` or `timm`.
    program: The model; its weights are ignored.

  Raises:
    UserError: If the format cannot represent the model, with the reason.
  """
  if form == "onnx":
    _check_onnx(program.model)
  if form == "timm":
    try:
      _for_timm(program.model, {})
    except UserError as why:
      raise UserError(f"timm: {why}; choose another form.") from why


def write(form: str, program: Program, path: pathlib.Path, images: np.ndarray) -> dict[str, Any]:
  """Writes one format and compares it with the model.

  Args:
    form: `stablehlo`, `onnx` or `timm`.
    program: The model.
    path: Path of the file.
    images: Images to compare on, uint8[b h w 3].

  Returns:
    The manifest's entry for the file.

  Raises:
    UserError: If the format cannot represent the model, or the model's outputs are not finite.
    RuntimeError: If the file's outputs differ from the model's; the file is removed.
  """
  about = WRITERS[form](program, path)
  multihost.meet(f"export {form}")
  try:
    compared = _compare(form, program, path, images)
  except BaseException:
    path.unlink(missing_ok=True)
    raise
  logging.info("export: %s, largest difference %.2g", path, compared["largest_difference"])
  entry = {"format": form, "file": path.name, "bytes": path.stat().st_size}
  return {**entry, "sha256": exported.sha256(path), **about, "compared": compared}


def manifest(program: Program, plan: Plan | None) -> dict[str, Any]:
  """Returns the part of a manifest that all formats of a model share."""
  spec, cost = program.model.spec, api.count_cost(program.model)
  return {
    "format": exported.FORMAT,
    "version": exported.VERSION,
    "variant": spec.name,
    "plan": plan.to_json() if plan else None,
    "gmacs": round(cost.gmacs, 6),
    "params_m": round(cost.params / 1e6, 4),
    "input": {
      "name": "images",
      "shape": ["b", *spec.image_shape],
      "axes": "image, row, column, colour (red, green, blue)",
      "dtype": program.input_dtype,
      "range": [0, 255] if program.normalize else "(pixel / 255 - mean) / std",
      "normalized": not program.normalize,
      "preprocess": dataclasses.asdict(spec.preprocess),
    },
    "output": {
      "name": program.output_name,
      "shape": ["b", spec.num_classes or spec.num_features],
      "dtype": "float32",
    },
    "class_names": class_names.readable(spec.class_names) or None,
  }


def _write_stablehlo(program: Program, path: pathlib.Path) -> dict[str, Any]:
  made = jax_export.export(jax.jit(program.__call__), platforms=program.platforms)(
    program.abstract_images
  )
  with replacing(path) as temporary:
    temporary.write_bytes(made.serialize())
  return {
    "platforms": list(made.platforms),
    "calling_convention_version": made.calling_convention_version,
  }


def _write_onnx(program: Program, path: pathlib.Path) -> dict[str, Any]:
  made = onnx_conversion.convert(program.__call__, program.abstract_images, program.output_name)
  with replacing(path) as temporary:
    temporary.write_bytes(made.SerializeToString())
  opset = {o.domain or "ai.onnx": o.version for o in made.opset_import}
  return {"opset": opset, **onnx_conversion.versions()}


def _for_timm(model: Backbone, params: Params) -> tuple[Params, str]:
  return timm_slimmed.for_timm(model.spec, model.layers, params)


def _write_timm(program: Program, path: pathlib.Path) -> dict[str, Any]:
  params, how = _for_timm(program.model, program.params)
  loading.save_params(program.model.spec, params, path)
  return {"model": f"{path.name} is {how}"}


WRITERS: dict[str, Callable[[Program, pathlib.Path], dict[str, Any]]] = {
  "stablehlo": _write_stablehlo,
  "onnx": _write_onnx,
  "timm": _write_timm,
}


def _check_onnx(model: Backbone) -> None:
  onnx_conversion.check(model.spec.dtype)
  size = 4 * api.count_cost(model).params
  if size > _LARGEST_ONNX:
    raise UserError(
      f"onnx: expected weights that one ONNX file holds (2 GB), got {size / 1e9:.3g} GB."
    )


def _compare(form: str, program: Program, path: pathlib.Path, pixels: np.ndarray) -> dict[str, Any]:
  """Compares the outputs of a file with the model's, in batches of several sizes.

  Returns:
    The number of images, the largest difference relative to the largest output, and the number of
    images that differ.
  """
  model = program.model
  normal = np.asarray(normalize(pixels, model.spec.preprocess))
  # Formats with another runtime are compared on the CPU, in full precision.
  device = None if form == "stablehlo" else jax.local_devices(backend="cpu")[0]
  with jax.default_device(device):
    expected = np.asarray(api.apply(model, program.params, normal), np.float32)
    scoring.check_finite(expected, "export: the model")
    if form == "timm":
      got = _timm_outputs(model, path, normal)
    else:
      call = exported.RUNNERS[form](path)
      parts = np.split(pixels if program.normalize else normal, _BATCHES)
      got = np.concatenate([call(part) for part in parts if len(part)])
  if got.shape != expected.shape:
    raise RuntimeError(f"{path}: expected outputs {expected.shape}, got {got.shape}")
  difference = np.abs(got - expected).max(axis=1) / np.abs(expected).max()
  tolerance = _TOLERANCE[model.spec.dtype]
  differing = int(np.sum(~(difference <= tolerance)))  # NaN differs
  if differing > (_TIES if _chooses(model) else 0) or not np.isfinite(got).all():
    raise RuntimeError(
      f"{path}: {differing} of {len(got)} outputs differ from the model's by up to "
      f"{difference.max():.2g} of the largest one, more than {tolerance:g}; it was removed"
    )
  largest = float(difference.max())
  return {"images": len(got), "largest_difference": largest, "differing": differing}


def _chooses(model: Backbone) -> bool:
  """Returns whether the image determines which tokens are removed."""
  for layer in model.layers:
    for reducer in (layer.select, layer.reduce):
      if not (isinstance(reducer, StaticReducer) and reducer.is_fixed):
        return True
  return False


def _timm_outputs(model: Backbone, path: pathlib.Path, images: np.ndarray) -> np.ndarray:
  """Returns the outputs with timm's attention scale, which is that of the slimmed head size."""
  layers = tuple(dataclasses.replace(l, qk_scale=l.head_dim**-0.5) for l in model.layers)
  params = loading.load_params(model.spec, layers, str(path))
  return np.asarray(api.apply(build(model.spec, layers), params, images), np.float32)
