"""Reads weights from files and the Hugging Face hub, and writes them."""

import argparse
import contextlib
import importlib
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from vitcomp_jax import paths
from vitcomp_jax.atomic import replacing
from vitcomp_jax.errors import UserError
from vitcomp_jax.weights import augreg
from vitcomp_jax.weights.description import Description
from vitcomp_jax.weights.description import describe as describe_metadata
from vitcomp_jax.weights.timm_names import to_timm

HUB_PREFIX = "hf-hub:"
HUB_FILE = "model.safetensors"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".npz")
# Keys that hold the weights of training checkpoints; averaged weights first, as in timm.
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
# Prefixes that wrappers (DistributedDataParallel, torch.compile, Lightning) add to every name.
PREFIXES = ("module.", "_orig_mod.", "model.")


def read(weights: str, cache_dir: str | None = None, widen: bool = True) -> dict[str, np.ndarray]:
  """Reads weights of any kind, with timm's (or their authors') names and PyTorch's layout.

  The kind of a file is detected from its content. From a training checkpoint the averaged weights
  are read if it has them; the log states which. A prefix that a wrapper added to every name is
  removed.

  Args:
    weights: A safetensors file, a PyTorch file such as `.pth`, `.pt`, `.bin`, `.ckpt` or `.pth.tar`
      (requires PyTorch), an AugReg `.npz` file, or a Hugging Face id such as
      `timm/deit_small_patch16_224.fb_in1k`, with or without the prefix `hf-hub:`. Repositories in
      the local cache are read without network.
    cache_dir: The hub's cache; None for the default.
    widen: Whether half precision is converted to float32.

  Returns:
    Arrays by name.

  Raises:
    UserError: If the weights do not exist, are damaged, or are of an unknown kind.
  """
  path = locate(weights, cache_dir)
  state = _READERS[_kind(path)](path)
  if not state:
    raise UserError(f"weights {path} hold no tensors; expected those of a Vision Transformer.")
  names = _without_prefixes(state)
  return {names[name]: _widen(array) if widen else array for name, array in state.items()}


def describe(weights: str, cache_dir: str | None = None) -> Description:
  """Reads the shapes and metadata of weights; only the header of a safetensors file is read.

  Args:
    weights: As for `read`.
    cache_dir: As for `read`.

  Raises:
    UserError: As `read`, and if the metadata is damaged.
  """
  path = locate(weights, cache_dir)
  if _kind(path) != "safetensors":
    shapes = {name: array.shape for name, array in read(weights, cache_dir).items()}
    return describe_metadata(weights, shapes, {})
  with _opened(path) as file:
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    names = _without_prefixes(shapes)
    shapes = {names[name]: shape for name, shape in shapes.items()}
    return describe_metadata(weights, shapes, file.metadata() or {})


def read_metadata(weights: str, cache_dir: str | None = None) -> dict[str, str]:
  """Reads the metadata that `write` stored with weights.

  Args:
    weights: As for `read`.
    cache_dir: As for `read`.

  Returns:
    Text by key; empty for files without metadata.

  Raises:
    UserError: If the weights do not exist or are damaged.
  """
  path = locate(weights, cache_dir)
  if _kind(path) != "safetensors":
    return {}
  with _opened(path) as file:
    return dict(file.metadata() or {})


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
  """Opens a safetensors file, reading only its header."""
  try:
    with safetensors.safe_open(path, framework="np") as file:
      yield file
  except (safetensors.SafetensorError, OSError) as error:
    raise _damaged(path, error) from error


def write(params: Mapping[str, Any], path: str, metadata: Mapping[str, str] | None = None) -> None:
  """Writes parameters as a safetensors file with timm's names, atomically.

  Args:
    params: Flax parameter tree.
    path: The file to write; missing directories are created.
    metadata: Text to store with the parameters, by key.

  Raises:
    UserError: If the file cannot be written.
  """
  target = Path(path)
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as unfinished:
      unfinished.touch()
      mode = unfinished.stat().st_mode  # safetensors writes files that only their owner can read
      safetensors.numpy.save_file(to_timm(params), unfinished, dict(metadata or {}))
      unfinished.chmod(mode)
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f"weights cannot be written to {path}: {_line(error)}.") from error


def locate(weights: str, cache_dir: str | None = None) -> Path:
  """Returns the local file of weights, after downloading it from the hub if necessary.

  Args:
    weights: As for `read`.
    cache_dir: As for `read`.

  Raises:
    UserError: If there is no such file.
  """
  weights = paths.expand(weights)
  path = Path(weights)
  if is_hub_id(weights):
    return _from_hub(weights.removeprefix(HUB_PREFIX), cache_dir)
  if path.is_dir():
    raise UserError(f"weights {weights} are a directory; give one of the files in it.")
  if path.exists():
    return path
  raise UserError(
    f"weights {weights} are not there; expected a file, or a hub id such as "
    "timm/deit_small_patch16_224.fb_in1k: check the path."
  )


def is_hub_id(weights: str) -> bool:
  """Returns whether `weights` is a Hugging Face id; a file of that name takes priority."""
  path = Path(weights)
  looks_alike = re.fullmatch(r"[\w.-]+/[\w.-]+", weights) and path.suffix not in SUFFIXES
  return weights.startswith(HUB_PREFIX) or bool(looks_alike and not path.exists())


def _kind(path: Path) -> str:
  """Detects the kind of a file from its content, or from its suffix if the content is unknown.

  Raises:
    UserError: If it is empty, or of no known kind.
  """
  with path.open("rb") as file:
    head = file.read(9)
  if not head:
    raise UserError(f"weights {path} are an empty file; fetch or write them again.")
  if head[:2] == b"PK":  # a zip archive: NumPy's or PyTorch's
    try:
      names = zipfile.ZipFile(path).namelist()
    except zipfile.BadZipFile as error:
      raise _damaged(path, error) from error
    return "npz" if any(name.endswith(".npy") for name in names) else "torch"
  if head[:2] == b"\x80\x02":  # a pickle of protocol 2, PyTorch's format before zip
    return "torch"
  if head[8:] == b"{" or path.suffix == ".safetensors":
    return "safetensors"
  if path.suffix in SUFFIXES:
    return "npz" if path.suffix == ".npz" else "torch"
  raise UserError(
    f"weights {path} are of an unknown kind; expected the content of a safetensors, PyTorch or "
    ".npz file."
  )


def _without_prefixes(names: Iterable[str]) -> dict[str, str]:
  """Maps names to the same names without the wrapper prefixes that all of them share."""
  found = {name: name for name in names}
  while prefix := next((p for p in PREFIXES if _all_start(found.values(), p)), None):
    found = {name: new.removeprefix(prefix) for name, new in found.items()}
  return found


def _all_start(names: Iterable[str], prefix: str) -> bool:
  return all(name.startswith(prefix) for name in names)


def _from_hub(hub_id: str, cache_dir: str | None) -> Path:
  """Returns the cached file of a repository, after downloading it if necessary."""
  import huggingface_hub  # slow to import, and rarely needed
  from huggingface_hub.errors import LocalEntryNotFoundError

  def fetch(local_files_only: bool) -> Path:
    return Path(
      huggingface_hub.hf_hub_download(
        hub_id, HUB_FILE, cache_dir=cache_dir, local_files_only=local_files_only
      )
    )

  try:
    try:
      return fetch(local_files_only=True)
    except LocalEntryNotFoundError:
      return fetch(local_files_only=False)
  # The hub's client and the HTTP client below it raise many unrelated types.
  except Exception as error:
    raise UserError(
      f"weights {hub_id}: {HUB_FILE} is neither in the local hub cache nor could it be fetched "
      f"({_line(error)}); check the id and the network, or give a file."
    ) from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
  try:
    return dict(safetensors.numpy.load_file(path))
  # Unknown types raise various errors in NumPy, beside safetensors' own.
  except Exception as error:
    raise _damaged(path, error) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
  """Reads the tensors of a PyTorch checkpoint, which only PyTorch can read safely."""
  try:
    torch = importlib.import_module("torch")
  except ImportError as error:
    raise UserError(
      f"weights {path} need PyTorch to be read, which is not installed; "
      "run `pip install torch`, or convert them to .safetensors."
    ) from error
  try:
    # Training scripts often store their command-line arguments beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
      # Mapped, so that to look at the shapes reads no weight.
      mapped = zipfile.is_zipfile(path)
      state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
  except pickle.UnpicklingError as error:
    raise UserError(
      f"weights {path} hold Python objects beside tensors, or are damaged; such objects are "
      "never loaded, as they may run code: fetch the file again or convert it to .safetensors."
    ) from error
  # PyTorch's other errors depend on where the damage is.
  except Exception as error:
    raise _damaged(path, error) from error
  state = _in_effect(state, path)
  tensors = {k: v for k, v in state.items() if isinstance(k, str) and torch.is_tensor(v)}
  if not tensors:
    raise UserError(
      f"weights {path}: expected tensors by name, alone or under one of {', '.join(NESTED)}, got "
      f"{', '.join(map(str, state)) or 'something else'}; convert them to .safetensors."
    )
  if others := [str(name) for name in state if name not in tensors]:
    logging.info("weights %s: left out what is no tensor: %s", path, ", ".join(others))
  try:
    return {name: _from_torch(torch, tensor) for name, tensor in tensors.items()}
  # Quantized, sparse and other tensors without a NumPy type raise various errors.
  except Exception as error:
    raise UserError(
      f"weights {path}: expected dense tensors of a type that NumPy has, got others "
      f"({_line(error)}); convert them to float32."
    ) from error


def _in_effect(checkpoint: Any, path: Path) -> Mapping[str, Any]:
  """Returns the state dict of a training checkpoint, averaged if it has one; empty without one."""
  state, keys = checkpoint if isinstance(checkpoint, Mapping) else {}, []
  while key := next((k for k in NESTED if isinstance(state.get(k), Mapping)), None):
    others = [str(k) for k in state if k != key]
    keys.append(f"{key}, not {', '.join(others)}" if others else key)
    state = state[key]
  if keys:
    logging.info("weights %s: read what is under %s", path, "; there under ".join(keys))
  return state


def _from_torch(torch: Any, tensor: Any) -> np.ndarray:
  if tensor.dtype == torch.bfloat16:  # which NumPy lacks
    tensor = tensor.float()
  array: np.ndarray = tensor.detach().numpy()
  return array


def _read_npz(path: Path) -> dict[str, np.ndarray]:
  try:
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
      arrays = {name: _widen(file[name]) for name in file.files}
  # NumPy's errors depend on where the damage is; some advise loading pickles, which is unsafe.
  except Exception as error:
    raise _damaged(path, ValueError("not an archive of plain arrays")) from error
  return augreg.to_timm(arrays, str(path))


def _widen(array: np.ndarray) -> np.ndarray:
  """Converts half precision to float32; returns other types unchanged."""
  if array.dtype == np.dtype("V2"):  # how NumPy stores bfloat16
    array = array.view(ml_dtypes.bfloat16)
  half = array.dtype in (np.float16, ml_dtypes.bfloat16)
  return array.astype(np.float32) if half else array


def _damaged(path: Path, error: Exception) -> UserError:
  return UserError(
    f"weights {path} cannot be read ({_line(error)}); the file is damaged or not of the kind "
    "its name says: fetch or write it again."
  )


def _line(error: Exception) -> str:
  """Returns the first line of an error's message."""
  return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")


_READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
  "safetensors": _read_safetensors,
  "npz": _read_npz,
  "torch": _read_torch,
}
