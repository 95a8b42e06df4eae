"""Converts weights of google-research/vision_transformer (AugReg and older) to timm's names.

Steiner et al., `How to train your ViT? <https://arxiv.org/abs/2106.10270>`_, 2021.
"""

import math
import re
from collections.abc import Mapping

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights.tensors import Tensor, concatenate

# Training checkpoints hold the weights under this prefix, along with the optimizer's state.
TARGET = "opt/target/"
POSITIONS = "Transformer/posembed_input/pos_embedding"
# A layer that timm dropped; in files that have it, the classifier is all zero.
IGNORED = "pre_logits/"

_OUTSIDE = {
  "cls": "cls_token",
  POSITIONS: "pos_embed",
  "embedding/kernel": "patch_embed.proj.weight",
  "embedding/bias": "patch_embed.proj.bias",
  "Transformer/encoder_norm/scale": "norm.weight",
  "Transformer/encoder_norm/bias": "norm.bias",
  "head/kernel": "head.weight",
  "head/bias": "head.bias",
}
_PARTS = ("query", "key", "value")
_ATTENTION = "MultiHeadDotProductAttention_1"
_INSIDE = {
  "LayerNorm_0/scale": "norm1.weight",
  "LayerNorm_0/bias": "norm1.bias",
  f"{_ATTENTION}/out/kernel": "attn.proj.weight",
  f"{_ATTENTION}/out/bias": "attn.proj.bias",
  "LayerNorm_2/scale": "norm2.weight",
  "LayerNorm_2/bias": "norm2.bias",
  "MlpBlock_3/Dense_0/kernel": "mlp.fc1.weight",
  "MlpBlock_3/Dense_0/bias": "mlp.fc1.bias",
  "MlpBlock_3/Dense_1/kernel": "mlp.fc2.weight",
  "MlpBlock_3/Dense_1/bias": "mlp.fc2.bias",
}


def to_timm(arrays: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
  """Renames and transposes tensors to timm's names and PyTorch's layout.

  Args:
    arrays: Tensors by Google's names, such as `Transformer/encoderblock_0/LayerNorm_0/scale`.
    path: Path of the file, for error messages.

  Returns:
    Tensors by timm's names, with query, key and value fused.

  Raises:
    UserError: If a name is unknown, or query, key and value differ in shape.
  """
  if any(name.startswith(TARGET) for name in arrays):
    arrays = {k.removeprefix(TARGET): v for k, v in arrays.items() if k.startswith(TARGET)}
  arrays = {name: array for name, array in arrays.items() if not name.startswith(IGNORED)}
  state: dict[str, Tensor] = {}
  unknown = []
  for name, array in arrays.items():
    block, inside = _split(name)
    if inside in _INSIDE:
      state[f"blocks.{block}.{_INSIDE[inside]}"] = transposed(inside, array)
    elif inside == f"{_ATTENTION}/query/kernel":
      state[f"blocks.{block}.attn.qkv.weight"] = fused(arrays, name, _PARTS, path)
    elif inside == f"{_ATTENTION}/query/bias":
      state[f"blocks.{block}.attn.qkv.bias"] = fused(arrays, name, _PARTS, path)
    elif name in _OUTSIDE:
      state[_OUTSIDE[name]] = transposed(name, array)
    elif not re.fullmatch(f"{_ATTENTION}/(key|value)/(kernel|bias)", inside):
      unknown.append(name)
  if unknown or "patch_embed.proj.weight" not in state:
    raise UserError(
      f"weights {path}: expected the names of Google's vision_transformer (embedding/kernel, "
      f"Transformer/encoderblock_0/…), got {', '.join(sorted(unknown or arrays)[:5])}; "
      "convert them to .safetensors with timm's names."
    )
  return state


def _split(name: str) -> tuple[str, str]:
  """Returns the number of a block and the name inside it; both are empty outside the blocks."""
  match = re.fullmatch(r"Transformer/encoderblock_(\d+)/(.*)", name)
  return (match[1], match[2]) if match else ("", "")


def fused(arrays: Mapping[str, Tensor], first: str, parts: tuple[str, ...], path: str) -> Tensor:
  """Joins n attention projections, each [d h k] or [h k], into [(n h k) d] or [(n h k)].

  Args:
    arrays: Tensors by name.
    first: Name of the first projection's kernel or bias.
    parts: Names of all projections, such as query, key and value, in order.
    path: Path of the file, for error messages.

  Raises:
    UserError: If a projection is missing, or their shapes differ.
  """
  found = [arrays.get(first.replace(f"/{parts[0]}/", f"/{part}/")) for part in parts]
  there = [tensor for tensor in found if tensor is not None]
  shape = arrays[first].shape
  if len(there) < len(parts) or any(tensor.shape != shape for tensor in there):
    raise UserError(
      f"weights {path}: expected {' and '.join(parts[1:])} of the shape of {first} {shape}, got "
      f"{[None if tensor is None else tensor.shape for tensor in found]}; fetch the file again."
    )
  *inputs, heads, width = shape
  rows = (heads * width, *inputs)
  return concatenate([tensor.map(lambda a: a.reshape(rows[::-1]).T, rows) for tensor in there])


def transposed(name: str, array: Tensor) -> Tensor:
  """Transposes kernels: [in, out] to [out, in], [h k d] to [d (h k)], HWIO to OIHW."""
  if not name.endswith("/kernel"):
    return array
  if array.ndim == 4:
    shape = (array.shape[3], array.shape[2], *array.shape[:2])
    return array.map(lambda a: a.transpose(3, 2, 0, 1), shape)
  width = array.shape[-1]
  return array.map(lambda a: a.reshape(-1, width).T, (width, math.prod(array.shape[:-1])))
