"""Reading weights from files and the Hugging Face hub, and writing them."""

import argparse
import importlib
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from vitcomp_jax import paths
from vitcomp_jax.atomic import replacing
from vitcomp_jax.convert import augreg
from vitcomp_jax.convert.timm import to_timm
from vitcomp_jax.errors import UserError

HUB_PREFIX = "hf-hub:"
HUB_FILE = "model.safetensors"
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".npz")
# Training checkpoints keep the weights under one of these.
NESTED = ("model", "state_dict")


def read(weights: str, cache_dir: str | None = None) -> dict[str, np.ndarray]:
  """Reads weights of any kind, with timm's (or the authors') names and PyTorch's layout.

  Args:
    weights: A `.safetensors` file, a PyTorch `.pth`, `.pt` or `.bin` file (PyTorch has to be
      installed), an AugReg `.npz` file, or the id of a Hugging Face repository such as
      `timm/deit_small_patch16_224.fb_in1k`, with or without `hf-hub:` in front. A repository
      that is in the local cache is taken from there, without network.
    cache_dir: The hub's cache; None: the usual one.

  Returns:
    Arrays by name; float32 where they are stored in half precision.

  Raises:
    UserError: If the weights are not there, or damaged, or of an unknown kind.
  """
  path = locate(weights, cache_dir)
  if path.stat().st_size == 0:
    raise UserError(f"weights {path} are an empty file; fetch or write them again.")
  state = _READERS[path.suffix](path)
  if not state:
    raise UserError(f"weights {path} hold no tensors; expected those of a Vision Transformer.")
  return {name: _widen(array) for name, array in state.items()}


def read_metadata(weights: str, cache_dir: str | None = None) -> dict[str, str]:
  """Reads the free text that `write` stored with weights.

  Args:
    weights: As for `read`.
    cache_dir: As for `read`.

  Returns:
    Text by key; empty for files that hold none.

  Raises:
    UserError: If the weights are not there or damaged.
  """
  path = locate(weights, cache_dir)
  if path.suffix != ".safetensors":
    return {}
  try:
    with safetensors.safe_open(path, framework="np") as file:
      return dict(file.metadata() or {})
  except (safetensors.SafetensorError, OSError) as error:
    raise _damaged(path, error) from error


def write(params: Mapping[str, Any], path: str, metadata: Mapping[str, str] | None = None) -> None:
  """Writes parameters as safetensors with timm's names; all of the file, or nothing.

  Args:
    params: Flax parameter tree.
    path: Where to; directories are made.
    metadata: Free text to store with them.

  Raises:
    UserError: If the file cannot be written.
  """
  target = Path(path)
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as unfinished:
      unfinished.touch()
      mode = unfinished.stat().st_mode  # safetensors makes files that only their owner can read
      safetensors.numpy.save_file(to_timm(params), unfinished, dict(metadata or {}))
      unfinished.chmod(mode)
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f"weights cannot be written to {path}: {_line(error)}.") from error


def locate(weights: str, cache_dir: str | None = None) -> Path:
  """The local file that holds weights; fetched first where it is on the hub only.

  Args:
    weights: As for `read`.
    cache_dir: As for `read`.

  Returns:
    A file with a known suffix.

  Raises:
    UserError: If there is no such file.
  """
  weights = paths.expand(weights)
  hub_id = weights.removeprefix(HUB_PREFIX)
  path = Path(weights)
  if hub_id != weights:
    return _from_hub(hub_id, cache_dir)
  if path.is_dir():
    raise UserError(f"weights {weights} are a directory; give one of the files in it.")
  if path.suffix in SUFFIXES and not path.exists():
    raise UserError(f"weights {weights} are not there; check the path.")
  if path.suffix in SUFFIXES:
    return path
  if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", weights):
    return _from_hub(hub_id, cache_dir)
  raise UserError(
    f"weights {weights} are of an unknown kind; expected a file that ends in "
    f"{', '.join(SUFFIXES)}, or a hub id such as timm/deit_small_patch16_224.fb_in1k."
  )


def _from_hub(hub_id: str, cache_dir: str | None) -> Path:
  """The cached file of a repository; fetched if it is not cached yet."""
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
  # Besides its own errors, whatever NumPy makes of a type that it does not know.
  except Exception as error:
    raise _damaged(path, error) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
  """Tensors of a PyTorch checkpoint, which only PyTorch can read safely."""
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
      state = torch.load(path, map_location="cpu", weights_only=True)
  except pickle.UnpicklingError as error:
    raise UserError(
      f"weights {path} hold Python objects beside tensors, or are damaged; such objects are "
      "never loaded, as they may run code: fetch the file again or convert it to .safetensors."
    ) from error
  # What else PyTorch raises depends on where the damage is.
  except Exception as error:
    raise _damaged(path, error) from error
  for key in NESTED:
    if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
      state = state[key]
  tensors = isinstance(state, Mapping) and all(torch.is_tensor(v) for v in state.values())
  if not tensors:
    raise UserError(
      f"weights {path}: expected tensors by name, alone or under {' or '.join(NESTED)}, got "
      "something else; convert them to .safetensors."
    )
  return {name: _from_torch(torch, tensor) for name, tensor in state.items()}


def _from_torch(torch: Any, tensor: Any) -> np.ndarray:
  # NumPy knows no bfloat16, so PyTorch has to widen it.
  array: np.ndarray = (
    (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
  )
  return array


def _read_npz(path: Path) -> dict[str, np.ndarray]:
  try:
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
      arrays = {name: _widen(file[name]) for name in file.files}
  # What NumPy raises depends on where the damage is; it advises to load pickles, which we never do.
  except Exception as error:
    raise _damaged(path, ValueError("not an archive of plain arrays")) from error
  return augreg.to_timm(arrays, str(path))


def _widen(array: np.ndarray) -> np.ndarray:
  """Half precision as float32; everything else as it is."""
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
  """The first line of what an error says."""
  return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")


_READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
  ".safetensors": _read_safetensors,
  ".npz": _read_npz,
  **dict.fromkeys(TORCH_SUFFIXES, _read_torch),
}
