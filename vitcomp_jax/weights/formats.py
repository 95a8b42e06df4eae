"""Opens a single file of weights of any kind: safetensors, NumPy's `.npz`, or PyTorch's."""

import json
import zipfile
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights import archives, augreg, big_vision, torch_files
from vitcomp_jax.weights.tensors import Computed, Stored, Tensor
from vitcomp_jax.weights.unreadable import damaged

SUFFIXES = (".safetensors", *torch_files.SUFFIXES, ".npz")

_DTYPES = {
  "BOOL": np.bool_,
  "U8": np.uint8,
  "I8": np.int8,
  "U16": np.uint16,
  "I16": np.int16,
  "U32": np.uint32,
  "I32": np.int32,
  "U64": np.uint64,
  "I64": np.int64,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F32": np.float32,
  "F64": np.float64,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
}


def open_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
  """Opens a file of weights and detects its kind from the content; no tensor is read.

  Args:
    path: The file.

  Returns:
    Tensors by name, and the text stored with them, by key.

  Raises:
    UserError: If the file is empty, damaged, of an unknown kind, or holds a program.
  """
  match _kind(path):
    case "safetensors":
      return _open_safetensors(path)
    case "npz":
      arrays = _open_npz(path)
      if "patch_embed.proj.weight" in arrays:  # the file uses timm's names, as others do
        return arrays, {}
      authors = big_vision if big_vision.is_big_vision(arrays) else augreg
      return authors.to_timm(arrays, str(path)), {}
    case _:
      return torch_files.open_file(path)


def _kind(path: Path) -> str:
  """Detects the kind of a file from its content, or from its suffix if the content is unclear.

  Raises:
    UserError: If the file is empty or of an unknown kind.
  """
  with path.open("rb") as file:
    head = file.read(9)
  if not head:
    raise UserError(f"weights {path} are an empty file; fetch or write them again.")
  if head[:2] == b"PK":  # a zip archive: NumPy's or PyTorch's
    try:
      names = zipfile.ZipFile(path).namelist()
    except zipfile.BadZipFile as error:
      raise damaged(path, error) from error
    return "npz" if any(name.endswith(".npy") for name in names) else "torch"
  if head[:2] == b"\x80\x02":  # a protocol 2 pickle, PyTorch's format before zip
    return "torch"
  if head[8:] == b"{" or path.suffix == ".safetensors":
    return "safetensors"
  if path.suffix in SUFFIXES:
    return "npz" if path.suffix == ".npz" else "torch"
  raise UserError(
    f"weights {path} are of an unknown kind; expected the content of a safetensors, PyTorch or "
    ".npz file."
  )


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
  """Reads the header: its length, then JSON of that length; the tensors' bytes follow it."""
  try:
    with safetensors.safe_open(path, framework="np"):  # checks the whole header
      pass
    with path.open("rb") as file:
      start = 8 + int.from_bytes(file.read(8), "little")
      header = json.loads(file.read(start - 8))
  except (safetensors.SafetensorError, OSError) as error:
    raise damaged(path, error) from error
  metadata = header.pop("__metadata__", None) or {}
  tensors: dict[str, Tensor] = {}
  for name, entry in header.items():
    if entry["dtype"] not in _DTYPES:
      raise damaged(path, TypeError(f"{name} is of the unknown type {entry['dtype']}"))
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    offset = start + entry["data_offsets"][0]
    tensors[name] = Stored(tuple(entry["shape"]), dtype, path, offset)
  return tensors, metadata


def _open_npz(path: Path) -> dict[str, Tensor]:
  """Reads the header of each array in an archive."""
  tensors = {}
  try:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
      for member in archive.infolist():
        tensors[member.filename.removesuffix(".npy")] = _member(path, file, archive, member)
  # Errors depend on where the damage is; some of NumPy's suggest loading pickles, which is unsafe.
  except Exception as error:
    raise damaged(path, ValueError("not an archive of plain arrays")) from error
  return tensors


def _member(
  path: Path, file: BinaryIO, archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> Tensor:
  """Returns an array in an archive; an uncompressed one can be read directly from the file."""
  with archive.open(member) as stream:
    version = np.lib.format.read_magic(stream)
    read_header = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, is_fortran, dtype = read_header(stream)
    header = stream.tell()
  if dtype.hasobject:
    raise ValueError(f"{member.filename} holds Python objects")
  # NumPy stores bfloat16 as two untyped bytes.
  meaning = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
  if is_fortran or member.compress_type != zipfile.ZIP_STORED:
    return Computed(shape, meaning, lambda: _read_member(path, member.filename).view(meaning))
  stored = Stored(shape, meaning, path, archives.offset(file, member) + header)
  if stored.offset + stored.size * dtype.itemsize > path.stat().st_size:
    raise ValueError(f"{member.filename} is cut off")
  return stored


def _read_member(path: Path, name: str) -> np.ndarray:
  try:
    with np.load(path, allow_pickle=False) as arrays:
      array: np.ndarray = arrays[name]
  # Errors of any type, as in `_open_npz`.
  except Exception as error:
    raise damaged(path, ValueError(f"{name} is damaged")) from error
  return array
