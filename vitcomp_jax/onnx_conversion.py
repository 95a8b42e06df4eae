"""Converts functions to ONNX with jax2onnx, which `vitcomp_jax[onnx]` installs."""

import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from vitcomp_jax.errors import UserError

_PACKAGES = ("jax2onnx", "onnxruntime")


def check(dtype: str | None) -> None:
  """Checks that a model can be converted to ONNX.

  Args:
    dtype: Precision of the model's computation; None for float32.

  Raises:
    UserError: If a package is not installed, or the precision is not float32.
  """
  missing = [name for name in _PACKAGES if not importlib.util.find_spec(name)]
  if missing:
    raise UserError(
      f"onnx needs {' and '.join(missing)}, not installed; run `pip install vitcomp_jax[onnx]`."
    )
  if dtype not in (None, "float32"):
    raise UserError(
      "onnx: expected a model that computes in float32, which ONNX Runtime has on every platform, "
      f"got {dtype}; in a run, set config.model.dtype=float32."
    )


def convert(call: Callable[[Array], Array], images: jax.ShapeDtypeStruct, output: str) -> Any:
  """Converts a function of images to an ONNX model whose input is named `images`.

  Args:
    call: The function.
    images: Shape and type of the images; the batch size may be symbolic.
    output: Name of the output.

  Returns:
    The `onnx.ModelProto`.

  Raises:
    UserError: If the function cannot be converted.
  """
  import jax2onnx

  before = logging.root.manager.disable
  # jax2onnx logs its arguments and any missing plugins.
  logging.disable(logging.WARNING)
  try:
    return jax2onnx.to_onnx(call, [images], input_names=["images"], output_names=[output])
  except Exception as error:  # many unrelated types for unsupported programs
    what = str(error).strip().splitlines()[0]
    raise UserError(f"onnx: jax2onnx cannot convert it: {what}") from error
  finally:
    logging.disable(before)


def versions() -> dict[str, str]:
  """Returns the versions of the packages that convert and run ONNX models."""
  return {name: importlib.metadata.version(name) for name in _PACKAGES}
