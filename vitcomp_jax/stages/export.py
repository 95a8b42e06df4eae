"""Stage `export`: the model in force, in formats that run without this library."""

import dataclasses
import importlib.metadata
import importlib.util
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jaxtyping import Array

from vitcomp_jax import api, exported, multihost, scoring
from vitcomp_jax.atomic import replacing, write_json
from vitcomp_jax.data import class_names
from vitcomp_jax.data.transforms import normalize
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.build import build
from vitcomp_jax.models.reducers import StaticReducer
from vitcomp_jax.results import ExportResult, environment
from vitcomp_jax.runs.run import Run
from vitcomp_jax.weights import loading, timm_slimmed

_IMAGES = 64  # on which every artefact is compared with the model
# Of the largest output, by the type that is computed in: bfloat16 rounds by 1/256.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
# Images whose tokens may be chosen otherwise: where two are equally important to rounding, either
# choice is right.
_TIES = 3
_BATCHES = (1, 8)  # where the images are parted: batches of 1, 7 and the rest
_LARGEST_ONNX = 2**31 - 2**20  # bytes that a protobuf message can hold, and some room


def check(run: Run) -> None:
  """Refuses formats that cannot hold the model."""
  if run.artefacts.plan:
    run.artefacts.plan.layers_for(run.inputs.spec)
  for name in run.config.export.formats:
    _CHECKS[name](run)


def run(run: Run) -> ExportResult:
  """Writes the artefacts, compares each with the model, and lists them in the manifest.

  Returns:
    What the manifest says of each artefact.

  Raises:
    UserError: If a format cannot hold the model, or the model's outputs are not finite.
    RuntimeError: If an artefact's outputs are not the model's.
  """
  check(run)  # Once more: the plan may be younger than the run.
  folder, entries = run.workdir.path / "export", []
  if multihost.is_first():
    folder.mkdir(exist_ok=True)
  for name in run.config.export.formats:
    path = folder / exported.FILES[name]
    about = _WRITERS[name](run, path)
    multihost.meet(f"export {name}")
    try:
      compared = _compare(run, name, path)
    except BaseException:
      path.unlink(missing_ok=True)
      raise
    entry = {"format": name, "file": path.name, "bytes": path.stat().st_size}
    entries.append({**entry, "sha256": exported.sha256(path), **about, "compared": compared})
    logging.info("export: %s, largest difference %.2g", path, compared["largest_difference"])
  write_json(folder / exported.MANIFEST, {**_manifest(run), "artefacts": entries})
  multihost.meet("exported")
  return ExportResult(tuple(entries))


def made(run: Run) -> dict[str, Any]:
  """The content of `manifest.json`."""
  return exported.read_manifest(run.workdir.path / "export")


def _manifest(run: Run) -> dict[str, Any]:
  """Returns the part of the manifest that all artefacts share."""
  spec, data, config = run.inputs.spec, run.inputs.eval_data, run.config.export
  cost = api.count_cost(build(spec, run.artefacts.layers))
  return {
    "format": exported.FORMAT,
    "version": exported.VERSION,
    "variant": spec.name,
    "plan": run.artefacts.plan.to_json() if run.artefacts.plan else None,
    "gmacs": round(cost.gmacs, 6),
    "params_m": round(cost.params / 1e6, 4),
    "input": {
      "name": "images",
      "shape": ["b", *spec.image_size, 3],
      "axes": "image, row, column, colour (red, green, blue)",
      "dtype": _input_dtype(run),
      "range": [0, 255] if config.normalize else "(pixel / 255 - mean) / std",
      "normalized": not config.normalize,
      "preprocess": dataclasses.asdict(data.pre),
    },
    "output": _output(run),
    "class_names": class_names.readable(run.inputs.class_names) or None,
    **environment(),
  }


def _output(run: Run) -> dict[str, Any]:
  classes, width = run.inputs.spec.num_classes, run.inputs.spec.width
  name = "logits" if classes else "features"
  return {"name": name, "shape": ["b", classes or width], "dtype": "float32"}


def _input_dtype(run: Run) -> str:
  return "uint8" if run.config.export.normalize else "float32"


def _function(run: Run) -> Callable[[Array], Array]:
  """Returns the exported function, from images to logits, with the weights as constants."""
  # cuDNN's kernel is a custom call, which no other platform has and no format may hold.
  spec = dataclasses.replace(run.inputs.spec, attention="xla")
  model, params, preprocess = (
    build(spec, run.artefacts.layers),
    run.artefacts.params,
    run.inputs.preprocess,
  )
  scales = run.config.export.normalize

  def logits(images: Array) -> Array:
    images = normalize(images, preprocess) if scales else images
    return model.apply({"params": params}, images).astype(jnp.float32)

  return logits


def _abstract_images(run: Run) -> jax.ShapeDtypeStruct:
  """Any number of them."""
  (b,) = jax_export.symbolic_shape("b")
  return jax.ShapeDtypeStruct((b, *run.inputs.spec.image_size, 3), _input_dtype(run))


def _write_stablehlo(run: Run, path: pathlib.Path) -> dict[str, Any]:
  platforms = run.config.export.platforms
  program = jax_export.export(jax.jit(_function(run)), platforms=platforms)(_abstract_images(run))
  with replacing(path) as temporary:
    temporary.write_bytes(program.serialize())
  return {
    "platforms": list(program.platforms),
    "calling_convention_version": program.calling_convention_version,
  }


def _write_onnx(run: Run, path: pathlib.Path) -> dict[str, Any]:
  import jax2onnx

  function, images, output = _function(run), _abstract_images(run), _output(run)["name"]
  before = logging.root.manager.disable
  # It tells of its arguments, and of plugins that it goes without.
  logging.disable(logging.WARNING)
  try:
    model = jax2onnx.to_onnx(function, [images], input_names=["images"], output_names=[output])
  except Exception as error:  # Many unrelated types, for what it does not know.
    what = str(error).strip().splitlines()[0]
    raise UserError(f"config.export.formats: onnx: jax2onnx cannot convert it: {what}") from error
  finally:
    logging.disable(before)
  with replacing(path) as temporary:
    temporary.write_bytes(model.SerializeToString())
  versions = {name: importlib.metadata.version(name) for name in ("jax2onnx", "onnxruntime")}
  return {"opset": {o.domain or "ai.onnx": o.version for o in model.opset_import}, **versions}


def _write_timm(run: Run, path: pathlib.Path) -> dict[str, Any]:
  params, how = _for_timm(run, run.artefacts.params)
  run.artefacts.save(params, path)
  return {"model": how}


def _for_timm(run: Run, params: loading.Params) -> tuple[loading.Params, str]:
  plan = run.artefacts.plan
  indices = plan.indices if plan else None
  return timm_slimmed.for_timm(run.inputs.spec, run.artefacts.layers, indices, params)


_WRITERS = {"stablehlo": _write_stablehlo, "onnx": _write_onnx, "timm": _write_timm}


def _check_onnx(run: Run) -> None:
  where = "config.export.formats: onnx"
  missing = [name for name in ("jax2onnx", "onnxruntime") if not importlib.util.find_spec(name)]
  if missing:
    raise UserError(
      f"{where} needs {' and '.join(missing)}, not installed; run "
      "`pip install vitcomp_jax[export]`."
    )
  if run.config.model.dtype != "float32":
    raise UserError(
      f"{where}: expected config.model.dtype float32, which ONNX Runtime has on every platform, "
      f"got {run.config.model.dtype}."
    )
  size = 4 * api.count_cost(build(run.inputs.spec, run.artefacts.layers)).params
  if size > _LARGEST_ONNX:
    raise UserError(
      f"{where}: expected weights that one ONNX file holds (2 GB), got {size / 1e9:.3g} GB."
    )


def _check_timm(run: Run) -> None:
  if "search" in run.config.stages:
    raise UserError(
      "config.export.formats: timm: timm's VisionTransformer does not remove tokens, which the "
      "search's plan does; leave timm out."
    )
  try:
    _for_timm(run, {})
  except UserError as why:
    raise UserError(f"config.export.formats: timm: {why}; leave timm out.") from why


_CHECKS: dict[str, Callable[[Run], None]] = {
  "stablehlo": lambda run: None,
  "onnx": _check_onnx,
  "timm": _check_timm,
}


def _compare(run: Run, name: str, path: pathlib.Path) -> dict[str, Any]:
  """Runs an artefact beside the model, in batches of several sizes.

  Returns:
    How many images there were, the largest difference relative to the largest output, and how
    many images differ.

  Raises:
    UserError: If the model's own outputs are not finite.
    RuntimeError: If it is not the same model.
  """
  images = run.inputs.eval_data.sample(_IMAGES)["image"]
  images = np.resize(images, (_IMAGES, *images.shape[1:]))  # of a small set, again
  normal = np.asarray(normalize(images, run.inputs.preprocess))
  inputs = images if run.config.export.normalize else normal
  # Another format's own runtime is here to be compared on the CPU, in full precision.
  device = None if name == "stablehlo" else jax.local_devices(backend="cpu")[0]
  with jax.default_device(device):
    expected = np.asarray(
      api.apply(build(run.inputs.spec, run.artefacts.layers), run.artefacts.params, normal),
      np.float32,
    )
    scoring.check_finite(expected, "stage export: the model")
    if name == "timm":
      got = _timm_outputs(run, path, normal)
    else:
      call = exported.RUNNERS[name](path)
      got = np.concatenate([call(part) for part in np.split(inputs, _BATCHES)])
  if got.shape != expected.shape:
    raise RuntimeError(f"{path}: expected outputs {expected.shape}, got {got.shape}")
  difference = np.abs(got - expected).max(axis=1) / np.abs(expected).max()
  reducers = [r for layer in run.artefacts.layers for r in (layer.select, layer.reduce)]
  chosen = not all(isinstance(r, StaticReducer) and r.is_fixed for r in reducers)
  tolerance = _TOLERANCE[run.config.model.dtype]
  differing = int(np.sum(~(difference <= tolerance)))  # what is not a number differs
  if differing > (_TIES if chosen else 0) or not np.isfinite(got).all():
    raise RuntimeError(
      f"{path}: {differing} of {_IMAGES} outputs differ from the model's by up to "
      f"{difference.max():.2g} of the largest one, more than {tolerance:g}; it was removed"
    )
  largest = float(difference.max())
  return {"images": _IMAGES, "largest_difference": largest, "differing": differing}


def _timm_outputs(run: Run, path: pathlib.Path, images: np.ndarray) -> np.ndarray:
  """The outputs of the weights as timm computes, which scales by the slimmed head's size."""
  layers = tuple(dataclasses.replace(l, qk_scale=l.head_dim**-0.5) for l in run.artefacts.layers)
  params = loading.load_params(run.inputs.spec, layers, str(path))
  return np.asarray(api.apply(build(run.inputs.spec, layers), params, images), np.float32)
