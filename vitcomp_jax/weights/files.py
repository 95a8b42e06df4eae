"""Opens weights from files, folders and the Hugging Face hub, and writes them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from vitcomp_jax import paths
from vitcomp_jax.atomic import replacing
from vitcomp_jax.errors import UserError
from vitcomp_jax.weights import folders, hub, training_checkpoints
from vitcomp_jax.weights.description import Description
from vitcomp_jax.weights.description import describe as describe_metadata
from vitcomp_jax.weights.dialects import timm_eva
from vitcomp_jax.weights.tensors import Tensor, widened
from vitcomp_jax.weights.timm_names import to_timm
from vitcomp_jax.weights.unreadable import line


@dataclasses.dataclass(frozen=True)
class Source:
  """Opened weights: the headers are read, but not the tensors.

  Attributes:
    name: The weights as the user gave them, for messages.
    path: The file that was found.
    tensors: Tensors in PyTorch's layout, by their names in the file without any prefixes that
      wrappers added to all of them; for a Google `.npz` file, by timm's names.
    metadata: Text that the file stores with its tensors, by key: the metadata of a safetensors
      file, or what a training script wrote, such as timm's `arch`.
    configs: Contents of the JSON files beside the weights, by file name.
  """

  name: str
  path: Path
  tensors: Mapping[str, Tensor]
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
  configs: Mapping[str, Mapping[str, object]] = dataclasses.field(default_factory=dict)


def open_source(weights: str, cache_dir: str | None = None, widen: bool = True) -> Source:
  """Opens weights of any kind.

  The kind of a file is detected from its content. If a training checkpoint has averaged weights,
  those are read. Prefixes that wrappers added to the names are removed. The log states what is read
  and what is not.

  Args:
    weights: A safetensors file, a PyTorch file such as `.pth`, `.pt`, `.bin`, `.ckpt` or `.pth.tar`
      (requires PyTorch), a Google `.npz` file, the index of a sharded file, or a folder with one of
      these. Or a Hugging Face id such as `timm/deit_small_patch16_224.fb_in1k`, with or without the
      prefix `hf-hub:` and a revision `@main`; repositories in the local cache are read without
      network access.
    cache_dir: Cache folder of the hub; None for the default.
    widen: Whether half precision is converted to float32.

  Raises:
    UserError: If the weights do not exist, are damaged, or have an unknown format.
  """
  path = _locate(weights, cache_dir)
  found, metadata = folders.open_file(path)
  if not found:
    raise UserError(f"weights {path} hold no tensors; expected those of a Vision Transformer.")
  tensors = {}
  for name, stored in training_checkpoints.model_names(found, str(path)).items():
    tensors[name] = widened(found[stored]) if widen else found[stored]
  return Source(weights, path, tensors, metadata, folders.configs(path.parent))


def read(weights: str, cache_dir: str | None = None, widen: bool = True) -> dict[str, np.ndarray]:
  """Reads weights of any kind, under timm's (or their authors') names and in PyTorch's layout.

  Args:
    weights: As for `open_source`.
    cache_dir: As for `open_source`.
    widen: As for `open_source`.

  Returns:
    Arrays by name.

  Raises:
    UserError: As for `open_source`.
  """
  source = open_source(weights, cache_dir, widen)
  return {name: np.asarray(tensor) for name, tensor in source.tensors.items()}


def describe(weights: str, cache_dir: str | None = None) -> Description:
  """Reads the shapes and metadata of weights, which needs only the headers.

  Args:
    weights: As for `open_source`.
    cache_dir: As for `open_source`.

  Raises:
    UserError: As for `open_source`, and if the metadata is damaged.
  """
  source = open_source(weights, cache_dir)
  shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
  return describe_metadata(weights, shapes, source.metadata)


def read_metadata(weights: str, cache_dir: str | None = None) -> dict[str, str]:
  """Reads the metadata that `write` stored with weights.

  Args:
    weights: As for `open_source`.
    cache_dir: As for `open_source`.

  Returns:
    Text by key; empty for files without metadata.

  Raises:
    UserError: As for `open_source`.
  """
  return dict(open_source(weights, cache_dir).metadata)


def write(
  params: Mapping[str, Any],
  path: str,
  metadata: Mapping[str, str] | None = None,
  naming: str = "vit",
) -> None:
  """Writes parameters atomically as a safetensors file with timm's names.

  Args:
    params: Flax parameter tree.
    path: The file to write; missing directories are created.
    metadata: Text to store with the parameters, by key.
    naming: timm class whose parameter names are used, see `models.spec.ViTSpec`.

  Raises:
    UserError: If the file cannot be written.
  """
  target = Path(path)
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as unfinished:
      unfinished.touch()
      mode = unfinished.stat().st_mode  # safetensors writes files that only the owner can read
      state = timm_eva.in_class(to_timm(params), naming)
      safetensors.numpy.save_file(
        {name: np.asarray(tensor, order="C") for name, tensor in state.items()},
        unfinished,
        dict(metadata or {}),
      )
      unfinished.chmod(mode)
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f"weights cannot be written to {path}: {line(error)}.") from error


def _locate(weights: str, cache_dir: str | None) -> Path:
  """Returns the file of weights, after downloading it from the hub if necessary.

  Raises:
    UserError: If there is no such file.
  """
  weights = paths.expand(weights)
  path = Path(weights)
  if hub.is_id(weights):
    return hub.find(weights, cache_dir)
  if path.is_dir():
    return folders.find(path)
  if path.exists():
    return path
  raise UserError(
    f"weights {weights} are not there; expected a file, a folder, or a hub id such as "
    "timm/deit_small_patch16_224.fb_in1k: check the path."
  )
