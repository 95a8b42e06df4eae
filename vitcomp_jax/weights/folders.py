"""Finds weights in folders, along with all their shards and the JSON files beside them."""

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from vitcomp_jax import strict_json
from vitcomp_jax.errors import UserError
from vitcomp_jax.weights import formats
from vitcomp_jax.weights.tensors import Tensor

INDEX = ".index.json"
# The files that Hugging Face transformers, timm and OpenCLIP write, in order of preference.
WEIGHTS = (
  "model.safetensors",
  f"model.safetensors{INDEX}",
  "pytorch_model.bin",
  f"pytorch_model.bin{INDEX}",
  "open_clip_model.safetensors",
  "open_clip_pytorch_model.bin",
)
# The files in which they describe the model, beside its weights.
CONFIGS = (
  "config.json",
  "preprocessor_config.json",
  "processor_config.json",
  "open_clip_config.json",
)
# Files that training leaves beside the weights, which are not the model.
_TRAINING = re.compile(r"(optimizer|scheduler|scaler|rng_state|random_states|training_args).*")
_SHARD = re.compile(r".+-\d+-of-(?!0*1\.)\d+\.\w+")


def choose(names: Collection[str], folder: str) -> str | None:
  """Chooses the file of weights in a folder: one of `WEIGHTS`, or else the only candidate.

  Args:
    names: Names of the files in the folder.
    folder: The folder, for messages.

  Returns:
    The name of the file, or of the index of its shards; None if no file could hold weights.

  Raises:
    UserError: If several files are possible.
  """
  known = [name for name in WEIGHTS if name in names]
  if known:
    if known[1:]:
      logging.info("weights %s: read %s, not %s", folder, known[0], ", ".join(known[1:]))
    return known[0]
  others = sorted(name for name in names if name.endswith(formats.SUFFIXES))
  others = [name for name in others if not _TRAINING.fullmatch(name)]
  if len(others) > 1:
    raise UserError(
      f"weights {folder}: expected {WEIGHTS[0]} or one other file of weights in that folder, got "
      f"{', '.join(others)}; give the one that is meant."
    )
  return others[0] if others else None


def find(folder: Path) -> Path:
  """Returns the file of weights in a folder, or the index of its shards.

  Raises:
    UserError: If there is no such file, or several are possible.
  """
  name = choose([path.name for path in folder.iterdir() if path.is_file()], str(folder))
  if name is None:
    raise UserError(
      f"weights {folder} are a directory without weights; expected {', '.join(WEIGHTS)}, or one "
      f"other file that ends in {', '.join(formats.SUFFIXES)}: give the file, or its folder."
    )
  return folder / name


def open_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
  """Opens a file of weights, or all shards listed in an index.

  Args:
    path: The file.

  Returns:
    Tensors by name, and the text stored with them, by key.

  Raises:
    UserError: If the file or a shard is missing or damaged, or the file is itself a shard.
  """
  if _SHARD.fullmatch(path.name):
    raise UserError(f"weights {path} are one of several shards; give the folder that has them all.")
  if not path.name.endswith(INDEX):
    return formats.open_file(path)
  tensors: dict[str, Tensor] = {}
  metadata: dict[str, str] = {}
  places = shards(path)
  for name in sorted(set(places.values())):
    shard = path.with_name(name)
    if not shard.is_file():
      raise UserError(f"weights {path}: the shard {name} is not there; fetch it, or all of them.")
    found, about = formats.open_file(shard)
    tensors |= found
    metadata |= about
  if missing := sorted(places.keys() - tensors.keys()):
    raise UserError(
      f"weights {path}: expected {missing[0]} in {places[missing[0]]}, got a file without it; "
      "fetch the shards and their index again."
    )
  return tensors, metadata


def shards(index: Path) -> dict[str, str]:
  """Returns the name of the shard that holds each tensor, by tensor name.

  Raises:
    UserError: If the index is damaged.
  """
  places = _read_json(index).get("weight_map")
  if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
    raise UserError(
      f"{index}: expected the names of shards under weight_map, got {type(places).__name__}; "
      "fetch it again."
    )
  return places


def configs(folder: Path) -> dict[str, Mapping[str, object]]:
  """Reads the JSON files that describe the weights beside them.

  Returns:
    Their contents by name; empty if there are none.

  Raises:
    UserError: If one of them is damaged.
  """
  return {name: _read_json(folder / name) for name in CONFIGS if (folder / name).is_file()}


def _read_json(path: Path) -> dict[str, object]:
  try:
    values = strict_json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read ({error}); fetch or write it again.") from error
  if not isinstance(values, dict):
    raise UserError(
      f"{path}: expected a JSON object, got {type(values).__name__}; fetch or write it again."
    )
  return values
