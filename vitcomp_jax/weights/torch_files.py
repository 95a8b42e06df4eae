"""Opens PyTorch's files; reads only plain tensors, and never runs the code of a pickle."""

import argparse
import functools
import importlib
import logging
import pathlib
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights import archives, training_checkpoints
from vitcomp_jax.weights.tensors import Computed, Stored, Tensor
from vitcomp_jax.weights.unreadable import damaged, line

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# Types that training scripts often store beside the weights, such as their arguments and the best
# accuracy so far. Unpickling such an object runs no code from the pickle.
_HARMLESS: list[object] = [
  argparse.Namespace,
  pathlib.PosixPath,
  np.ndarray,
  np.dtype,
  *(type(np.dtype(kind)) for kind in ("?", "i4", "i8", "f4", "f8")),
]
# The functions that NumPy's pickles call for a scalar and an array, under the names that NumPy 1
# and NumPy 2 give them.
_NUMPY = [
  (np.float64().__reduce__()[0], "scalar"),
  (np.zeros(0).__reduce__()[0], "_reconstruct"),
]
_HARMLESS += [
  (function, f"numpy.{module}.multiarray.{name}")
  for function, name in _NUMPY
  for module in ("core", "_core")
]


def open_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
  """Opens the tensors of a PyTorch checkpoint, which only PyTorch can read safely.

  Args:
    path: The file. Files that predate PyTorch's zip format are read immediately.

  Returns:
    Tensors by name, and the text that a training script stored beside them, such as timm's `arch`.

  Raises:
    UserError: If PyTorch is not installed, or the file is damaged or holds no plain tensors.
  """
  try:
    torch = importlib.import_module("torch")
  except ImportError as error:
    raise UserError(
      f"weights {path} need PyTorch to be read, which is not installed; "
      "run `pip install torch`, or convert them to .safetensors."
    ) from error
  checkpoint, storages = _load(torch, path)
  found = training_checkpoints.in_effect(checkpoint, str(path))
  tensors = {k: v for k, v in found.items() if isinstance(k, str) and torch.is_tensor(v)}
  if not tensors:
    raise UserError(
      f"weights {path}: expected tensors by name, alone or under one of "
      f"{', '.join(training_checkpoints.NESTED)}, got "
      f"{', '.join(map(str, found)) or 'something else'}; convert them to .safetensors."
    )
  if others := [str(name) for name in found if name not in tensors]:
    logging.info("weights %s: left out what is no tensor: %s", path, ", ".join(others))
  texts = checkpoint.items() if isinstance(checkpoint, Mapping) else ()
  metadata = {k: v for k, v in texts if isinstance(k, str) and isinstance(v, str)}
  start = _mapped_at(path, storages)
  return {k: _lazy(torch, k, tensor, path, start) for k, tensor in tensors.items()}, metadata


def _load(torch: Any, path: Path) -> tuple[object, list[Any]]:
  """Returns the content of a file, and its storages, which are the memory of its tensors.

  A file in the zip format is memory-mapped, and no storage is read.

  Raises:
    UserError: If the file is damaged, or holds a program or an object whose code would have to run.
  """
  is_zip = zipfile.is_zipfile(path)
  if is_zip and _is_program(path):
    raise UserError(
      f"weights {path} are a TorchScript program, whose code is never run; expected tensors by "
      "name: open it with torch.jit.load, and save its state_dict() with torch.save."
    )
  storages = []

  def stay(storage: Any, location: str) -> Any:
    storages.append(storage)
    return storage  # on the CPU, wherever it was saved from

  try:
    with torch.serialization.safe_globals(_HARMLESS):
      return torch.load(path, map_location=stay, weights_only=True, mmap=is_zip), storages
  except pickle.UnpicklingError as error:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"a pickled Python object of class {found[1]}" if found else "Python objects"
    raise UserError(
      f"weights {path} hold {what}, or are damaged; such objects are never loaded, as they may "
      "run code: save the model's state_dict() alone with torch.save, or convert it to "
      ".safetensors."
    ) from error
  # The types of PyTorch's other errors depend on where the damage is.
  except Exception as error:
    raise damaged(path, error) from error


def _is_program(path: Path) -> bool:
  """Returns whether an archive was written by `torch.jit.save`."""
  with zipfile.ZipFile(path) as archive:
    return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _mapped_at(path: Path, storages: list[Any]) -> int | None:
  """Returns the address at which a file is mapped; None if it is not mapped, or this is unknown.

  The address allows tensors to be read from the file itself, because mapped memory would stay
  resident in addition to the arrays. The address is verified: all storages in the archive are
  mapped, and their layout in memory must equal that in the archive.
  """
  if not zipfile.is_zipfile(path):
    return None
  with path.open("rb") as file, zipfile.ZipFile(file) as archive:
    members = [m for m in archive.infolist() if re.search(r"/data/\d+$", m.filename)]
    offsets = sorted(archives.offset(file, member) for member in members if member.file_size)
    orders = [archive.read(m) for m in archive.infolist() if m.filename.endswith("/byteorder")]
  addresses = sorted(storage.data_ptr() for storage in storages if storage.nbytes())
  if not offsets or not addresses or sys.byteorder.encode() not in (orders or [b"little"]):
    return None
  start = addresses[0] - offsets[0]
  return start if [address - start for address in addresses] == offsets else None


def _lazy(torch: Any, name: str, tensor: Any, path: Path, start: int | None) -> Tensor:
  """Returns a tensor that becomes an array when it is read.

  Raises:
    UserError: If NumPy lacks its type, as for quantized, sparse and other tensors.
  """
  kind = str(tensor.dtype).removeprefix("torch.")
  try:
    if tensor.layout != torch.strided:
      raise TypeError(f"{name} is {str(tensor.layout).removeprefix('torch.')}")
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
  except TypeError as error:
    raise UserError(
      f"weights {path}: expected dense tensors of a type that NumPy has, got others "
      f"({line(error)}); convert them to float32."
    ) from error
  shape = tuple(tensor.shape)
  if start is not None and tensor.is_contiguous() and tensor.numel():
    return Stored(shape, dtype, path, tensor.data_ptr() - start)
  return Computed(shape, dtype, functools.partial(_to_array, torch, tensor))


def _to_array(torch: Any, tensor: Any) -> np.ndarray:
  """Returns a copy, so that changes to the array do not change the tensor."""
  if tensor.dtype == torch.bfloat16:  # PyTorch cannot convert it to NumPy
    return _to_array(torch, tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
  array: np.ndarray = tensor.detach().numpy()
  return array.copy()
