"""Loads and runs exported models, without the library's own modules.

The stage `export` writes a folder with `manifest.json` and the artefacts that it lists; the
function `export` writes a single file with its manifest beside it. StableHLO is serialised by
`jax.export`, and ONNX is for ONNX Runtime; both contain the weights and accept any batch size.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from vitcomp_jax import paths, strict_json
from vitcomp_jax.data.transforms import Preprocess
from vitcomp_jax.errors import UserError

FORMAT, VERSION = "vitcomp-export", 1
MANIFEST = "manifest.json"
FILES = {
  "stablehlo": "model.stablehlo",
  "onnx": "model.onnx",
  "timm": "timm.safetensors",
}


@dataclasses.dataclass(frozen=True)
class Exported:
  """Holds an exported model, which maps images to logits.

  Attributes:
    run: Maps images to logits, or to features for a model without a classifier.
    manifest: Content of the manifest.

  Examples:
    >>> import numpy as np
    >>> import vitcomp_jax as vc
    >>> wanted = {"shape": ["b", 30, 30, 3], "dtype": "float32"}
    >>> model = vc.Exported(lambda images: images.mean(axis=(1, 2)), {"input": wanted})
    >>> model(np.ones((2, 30, 30, 3), np.float32)).shape
    (2, 3)
  """

  run: Callable[[np.ndarray], np.ndarray]
  manifest: Mapping[str, Any]

  def __call__(self, images: np.ndarray | jax.Array) -> np.ndarray:
    """Computes logits, f32[b c], of images [b h w 3] in the dtype and range of `manifest["input"]`.

    Raises:
      ValueError: If the images have another shape or dtype.

    Examples:
      >>> import numpy as np
      >>> import vitcomp_jax as vc
      >>> wanted = {"shape": ["b", 30, 30, 3], "dtype": "float32"}
      >>> model = vc.Exported(lambda images: images.mean(axis=(1, 2)), {"input": wanted})
      >>> model(np.ones((2, 28, 28, 3), np.float32))
      Traceback (most recent call last):
      ValueError: images: expected float32['b', 30, 30, 3], got float32[2, 28, 28, 3]
    """
    images, wanted = np.asarray(images), self.manifest["input"]
    if images.shape[1:] != tuple(wanted["shape"][1:]) or images.dtype != wanted["dtype"]:
      shape = ["b", *wanted["shape"][1:]]
      raise ValueError(
        f"images: expected {wanted['dtype']}{shape}, got {images.dtype}{list(images.shape)}"
      )
    return self.run(images)

  @property
  def preprocess(self) -> Preprocess:
    """Returns the preprocessing of images.

    Examples:
      >>> import vitcomp_jax as vc
      >>> scales = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
      >>> crop = {"image_size": [30, 30], "crop_pct": 0.9, "interpolation": "bicubic"}
      >>> model = vc.Exported(lambda images: images, {"input": {"preprocess": scales | crop}})
      >>> model.preprocess.mean
      (0.5, 0.5, 0.5)
    """
    values = self.manifest["input"]["preprocess"]
    fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
      return Preprocess(**fields)
    except TypeError as error:
      raise UserError(
        f"{MANIFEST}: expected preprocessing that is known, got another ({error})."
      ) from error


def load_exported(path: str | os.PathLike[str]) -> Exported:
  """Loads an exported model.

  Args:
    path: A file written by `export`, `.stablehlo` or `.onnx`; or the folder of a run, its folder
      `export`, or a file in that folder.

  Raises:
    UserError: If the model does not exist, differs from its manifest, or cannot be run here.

  Examples:
    >>> import tempfile
    >>> import numpy as np
    >>> import vitcomp_jax as vc
    >>> model, params = vc.load("vit_mini_patch3_30", "bundled")
    >>> images = np.zeros((3, 30, 30, 3), np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   vc.export(model, params, f"{folder}/mini.stablehlo")
    ...   logits = vc.load_exported(f"{folder}/mini.stablehlo")(images)
    >>> logits.shape
    (3, 10)
  """
  path = pathlib.Path(paths.expand(path))
  if not path.exists():
    raise UserError(f"{path}: expected an export's folder or a file in it, got none.")
  if path.suffix == ".safetensors":
    raise UserError(f"{path}: expected a program, got weights for timm; load them by vc.load.")
  if (path / "export").is_dir():  # a run
    path = path / "export"
  where = (path if path.is_dir() else path.parent) / MANIFEST
  if not path.is_dir() and manifest_beside(path).is_file():
    where = manifest_beside(path)
  manifest = read_manifest(where)
  entries = {entry["file"]: entry for entry in manifest["artefacts"]}
  runnable = [name for kind in RUNNERS for name in entries if entries[name]["format"] == kind]
  name = next(iter(runnable), None) if path.is_dir() else path.name
  if name is None or name not in runnable:
    got = path.name if name else ", ".join(entries)
    known = ", ".join(FILES[kind] for kind in RUNNERS)
    raise UserError(f"{where.parent}: expected one of {known}, got {got}.")
  file, entry = where.parent / name, entries[name]
  if not file.is_file() or sha256(file) != entry["sha256"]:
    raise UserError(
      f"{file} is missing or not the file that {where.name} beside it lists; export the model "
      "again."
    )
  return Exported(RUNNERS[entry["format"]](file), manifest)


def manifest_beside(file: pathlib.Path) -> pathlib.Path:
  """Returns the path of the manifest of a single exported file."""
  return file.with_name(f"{file.name}.json")


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
  """Reads the manifest of an export.

  Args:
    path: Path of the manifest.

  Raises:
    UserError: If there is no manifest, or it is damaged or has another version.
  """
  try:
    manifest = strict_json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    why = error.strerror if isinstance(error, OSError) else error
    raise UserError(f"{path}: expected an export's folder, got none ({why}).") from error
  if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
    raise UserError(f'{path}: expected a JSON object with "format": "{FORMAT}".')
  if manifest.get("version") != VERSION:
    raise UserError(f"{path}: expected version {VERSION}, got {manifest.get('version')!r}.")
  if missing := {"artefacts", "input", "output", "class_names"} - set(manifest):
    raise UserError(f"{path}: expected {', '.join(sorted(missing))}, got none; export it again.")
  entries = manifest["artefacts"]
  for entry in entries if isinstance(entries, list) else [entries]:
    if not (isinstance(entry, dict) and {"file", "format", "sha256"} <= set(entry)):
      raise UserError(f"{path}: expected artefacts with file, format and sha256; export it again.")
  return manifest


def sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _run_stablehlo(path: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
  try:
    exported = jax_export.deserialize(bytearray(path.read_bytes()))
  except ValueError as error:
    raise UserError(f"{path} cannot be read by JAX {jax.__version__}: {error}") from error
  here = jax.default_backend()
  if not {"gpu": {"cuda", "rocm"}}.get(here, {here}) & set(exported.platforms):
    raise UserError(
      f"{path}: expected one of its platforms ({', '.join(exported.platforms)}), got {here}; "
      "export it again with config.export.platforms."
    )
  call = jax.jit(exported.call)
  return lambda images: np.asarray(call(images))


def _run_onnx(path: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
  try:
    import onnxruntime
  except ImportError as error:
    raise UserError(
      f"{path} needs ONNX Runtime, which is not installed; run `pip install vitcomp_jax[onnx]`."
    ) from error
  session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
  name = session.get_inputs()[0].name
  return lambda images: np.asarray(session.run(None, {name: images})[0])


RUNNERS: dict[str, Callable[[pathlib.Path], Callable[[np.ndarray], np.ndarray]]] = {
  "stablehlo": _run_stablehlo,
  "onnx": _run_onnx,
}
