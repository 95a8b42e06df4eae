"""Folders that hold one model: its weights, its plan and its spec."""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vitcomp_jax import multihost, paths, strict_json
from vitcomp_jax.atomic import replacing_folder, write_json
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.plans import Plan, load_plan, plan_of, save_plan
from vitcomp_jax.weights import loading, writing_back
from vitcomp_jax.weights.loading import Params

WEIGHTS, PLAN, SPEC = "model.safetensors", "plan.json", "spec.json"
FORMAT, VERSION = "vitcomp-model", 1
# Fields of a spec that are not in the weights' metadata.
_FIELDS = ("dtype", "attention", "antialias")


def save(folder: str | os.PathLike[str], model: Backbone, params: Params) -> None:
  """Writes a model as a folder, which `load` reads back with bit-identical outputs.

  The folder holds `model.safetensors` (with timm's names, and class names, image size and
  preprocessing as metadata), `spec.json`, and `plan.json` if the model is compressed. For a model
  that came from Hugging Face's transformers, it also holds `huggingface/`, which `from_pretrained`
  loads, if its class can represent the model. The folder is written atomically; a kill may leave a
  hidden folder beside it. How the plan was made is not saved; `save_plan` writes a plan that
  records it.

  Args:
    folder: Folder to write. A folder written by `save` is replaced; any other is rejected.
    model: Result of `load` or `compress`, or built from a plan's layers.
    params: Parameters of the model, of any float type.

  Raises:
    UserError: If the folder holds something else, the parameters do not fit the model, or a
      variant's name and a plan do not describe the model.

  Examples:
    >>> import tempfile
    >>> import vitcomp_jax as vc
    >>> model, params = vc.load("vit_mini_patch3_30", "bundled")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   vc.save(f"{folder}/small", *vc.compress(model, params, vc.tome(model, r=7)))
    ...   small, small_params = vc.load(f"{folder}/small")
    >>> small.layers[0].reduce
    BipartiteMerge(remove=7)
  """
  target = pathlib.Path(paths.expand(folder))
  plan = plan_of(model)
  loading.check_params(model, params)
  try:
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if multihost.is_first():
      with replacing_folder(target) as made:
        _write(made, model, params, plan)
    multihost.meet("saved")
  except OSError as error:
    raise UserError(f"save: {target} cannot be written ({error.strerror}).") from error


def _write(made: pathlib.Path, model: Backbone, params: Params, plan: Plan | None) -> None:
  """Fills a folder and checks the spec by reading it back."""
  spec = model.spec
  loading.save_params(spec, params, made / WEIGHTS)
  if plan:
    save_plan(plan, made / PLAN)
  if spec.huggingface:
    try:
      writing_back.save_huggingface(spec, model.layers, params, made / writing_back.HUGGINGFACE)
    except UserError as why:
      logging.info("save: not written for transformers: %s", why)
  about = {"format": FORMAT, "version": VERSION, "variant": spec.name, "plan": plan is not None}
  write_json(made / SPEC, about | {name: getattr(spec, name) for name in _FIELDS})
  if read_spec(made) != spec:
    raise UserError(
      f"save: expected a model that differs from the variant {spec.name} in images, classes and "
      "plan alone, got another spec; add it to the variants under a name of its own."
    )


def is_folder(path: str) -> bool:
  """Returns whether a folder was written by `save`."""
  return (pathlib.Path(paths.expand(path)) / SPEC).is_file()


def read_spec(
  folder: str | os.PathLike[str],
  num_classes: int | None = None,
  image_size: int | tuple[int, int] | None = None,
  given: Mapping[str, object] | None = None,
) -> ViTSpec:
  """Reads a saved model's spec.

  Args:
    folder: Folder written by `save`.
    num_classes: Outputs of the classifier, as in `load`.
    image_size: Image size in pixels, as in `load`.
    given: Other fields of the spec, as in `load`.

  Raises:
    UserError: If the folder is incomplete or damaged.
  """
  values = _read_values(pathlib.Path(paths.expand(folder), SPEC))
  spec = loading.spec_for(None, weights_of(folder), num_classes, image_size, given=given)
  kept = [name for name in _FIELDS if name not in (given or {})]
  return dataclasses.replace(spec, **{name: values[name] for name in kept})


def weights_of(folder: str | os.PathLike[str]) -> str:
  """Returns the path of a saved model's weights."""
  return str(pathlib.Path(paths.expand(folder), WEIGHTS))


def read_plan(folder: str | os.PathLike[str]) -> Plan | None:
  """Reads a saved model's plan; None for a dense model."""
  folder = pathlib.Path(paths.expand(folder))
  expected, path = _read_values(folder / SPEC)["plan"], folder / PLAN
  if path.is_file() != expected:
    what = "a" if expected else "no"
    raise UserError(f"{folder}: expected {what} {PLAN}, as its {SPEC} says; save the model again.")
  return load_plan(path) if expected else None


def _read_values(path: pathlib.Path) -> dict[str, Any]:
  """Reads a spec.json, and rejects values of wrong types."""
  try:
    values = strict_json.loads(path.read_text(encoding="utf-8"))
    if (values["format"], values["version"]) != (FORMAT, VERSION):
      raise ValueError(f"another format, {values['format']} {values['version']}")
    if not jnp.issubdtype(jnp.dtype(values["dtype"] or "float32"), jnp.floating):
      raise TypeError(f"dtype is {values['dtype']!r}")
    if values["attention"] not in ("auto", "xla", "cudnn"):
      raise ValueError(f"attention is {values['attention']!r}")
    for name, kind in (("variant", str), ("plan", bool), ("antialias", bool)):
      if not isinstance(values[name], kind):
        raise TypeError(f"{name} is {values[name]!r}")
  except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
    raise UserError(
      f"{path}: expected what `save` writes, got something else ({type(error).__name__}: {error}); "
      "save the model again."
    ) from error
  return dict(values)


def _check_replaceable(target: pathlib.Path) -> None:
  """Refuses to replace anything but a folder that holds only a saved model."""
  if not os.path.lexists(target):
    return
  there = {entry.name for entry in target.iterdir()} if target.is_dir() else {target.name}
  if there and (SPEC not in there or there - {WEIGHTS, PLAN, SPEC, writing_back.HUGGINGFACE}):
    raise UserError(
      f"save: expected a new folder, or one with a saved model alone, got {target} with "
      f"{', '.join(sorted(there)[:3])}; give another."
    )
