"""Writes models in the formats of the libraries that their weights came from."""

import json
import logging
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import safetensors.numpy

from vitcomp_jax.atomic import replacing_folder, write_json
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.spec import LayerSpec, ViTSpec, removes_tokens
from vitcomp_jax.models.variants import fields_of
from vitcomp_jax.weights import timm_slimmed
from vitcomp_jax.weights.dialects.huggingface_images import preparation_of
from vitcomp_jax.weights.dialects.huggingface_writing import to_huggingface
from vitcomp_jax.weights.loading import Params, save_params
from vitcomp_jax.weights.timm_names import to_timm

HUGGINGFACE = "huggingface"


def write(
  spec: ViTSpec,
  layers: Sequence[LayerSpec],
  params: Params,
  folder: pathlib.Path,
) -> str:
  """Writes `timm.safetensors`, and a folder for transformers if the weights came from there.

  Args:
    spec: Spec of the dense model, with class names.
    layers: Layers of the network.
    params: Parameters of the network.
    folder: Folder to write to.

  Returns:
    Text that says what was written and how to load it, or why it was not written.
  """
  try:
    timm_params, how = timm_slimmed.for_timm(spec, layers, params)
    save_params(spec, timm_params, folder / "timm.safetensors")
    told = f"timm.safetensors is {how}"
  except UserError as why:
    told = f"Not written for timm: {why}"
  if not spec.huggingface:
    return told
  try:
    save_huggingface(spec, layers, params, folder / HUGGINGFACE)
    return f"{told}; {HUGGINGFACE}/ is for from_pretrained of transformers"
  except UserError as why:
    return f"{told}; not written for transformers: {why}"


def save_huggingface(
  spec: ViTSpec, layers: Sequence[LayerSpec], params: Params, folder: str | os.PathLike[str]
) -> None:
  """Writes a folder that `from_pretrained` of Hugging Face's transformers loads.

  Args:
    spec: Spec of the dense model, whose weights came from transformers.
    layers: Layers of the network.
    params: Parameters of the network.
    folder: Folder to write, atomically.

  Raises:
    UserError: If no class of transformers can represent the model; the message gives the reason.
  """
  if not spec.huggingface:
    raise UserError(
      f"transformers: expected a model whose weights came from transformers, got {spec.name}."
    )
  if removes_tokens(layers):
    raise UserError("transformers: expected a model that keeps all tokens, got one that does not.")
  if any(layer.is_reordered for layer in layers):
    raise UserError("transformers: expected rotated channels in their order, got sorted ones.")
  target = pathlib.Path(folder)
  there = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
  if there - {"config.json", "model.safetensors", "preprocessor_config.json"} or target.is_file():
    raise UserError(
      f"transformers: expected a new folder, or one with such a model alone, got {target}; give "
      "another."
    )
  config = json.loads(spec.huggingface)
  fields = fields_of(spec, with_defaults=True)
  tensors, written = to_huggingface(to_timm(params), config, fields, spec.class_names)
  target.parent.mkdir(parents=True, exist_ok=True)
  with replacing_folder(target) as made:
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    safetensors.numpy.save_file(arrays, made / "model.safetensors", {"format": "pt"})
    write_json(made / "config.json", written)
    try:
      write_json(made / "preprocessor_config.json", preparation_of(fields))
    except UserError as why:
      logging.warning("%s: no preprocessor_config.json was written: %s", target, why)
  logging.info("%s is for from_pretrained of transformers", target)
