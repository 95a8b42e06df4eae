"""Converts weights of google-research/vision_transformer (AugReg and older) to timm's names.

Steiner et al., `How to train your ViT? <https://arxiv.org/abs/2106.10270>`_, 2021.
"""

import re
from collections.abc import Mapping

import numpy as np

from vitcomp_jax.errors import UserError

# Training checkpoints hold the weights under this prefix, beside the optimizer's state.
TARGET = "opt/target/"
# A layer that timm dropped; in files that have it, the classifier is all zero.
IGNORED = "pre_logits/"

_OUTSIDE = {
  "cls": "cls_token",
  "Transformer/posembed_input/pos_embedding": "pos_embed",
  "embedding/kernel": "patch_embed.proj.weight",
  "embedding/bias": "patch_embed.proj.bias",
  "Transformer/encoder_norm/scale": "norm.weight",
  "Transformer/encoder_norm/bias": "norm.bias",
  "head/kernel": "head.weight",
  "head/bias": "head.bias",
}
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


def to_timm(arrays: Mapping[str, np.ndarray], path: str) -> dict[str, np.ndarray]:
  """Renames and transposes arrays to timm's names and PyTorch's layout.

  Args:
    arrays: Arrays by Google's names, such as `Transformer/encoderblock_0/LayerNorm_0/scale`.
    path: The file's path, for error messages.

  Returns:
    Arrays by timm's names, with query, key and value fused.

  Raises:
    UserError: If a name is unknown, or query, key and value differ in shape.
  """
  if any(name.startswith(TARGET) for name in arrays):
    arrays = {k.removeprefix(TARGET): v for k, v in arrays.items() if k.startswith(TARGET)}
  arrays = {name: array for name, array in arrays.items() if not name.startswith(IGNORED)}
  state, unknown = {}, []
  for name, array in arrays.items():
    block, inside = _split(name)
    if inside in _INSIDE:
      state[f"blocks.{block}.{_INSIDE[inside]}"] = _transposed(inside, array)
    elif inside == f"{_ATTENTION}/query/kernel":
      state[f"blocks.{block}.attn.qkv.weight"] = _fused(arrays, name, path).T
    elif inside == f"{_ATTENTION}/query/bias":
      state[f"blocks.{block}.attn.qkv.bias"] = _fused(arrays, name, path)
    elif name in _OUTSIDE:
      state[_OUTSIDE[name]] = _transposed(name, array)
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
  """Returns a block's number and the name inside it; both empty for names outside blocks."""
  match = re.fullmatch(r"Transformer/encoderblock_(\d+)/(.*)", name)
  return (match[1], match[2]) if match else ("", "")


def _fused(arrays: Mapping[str, np.ndarray], query: str, path: str) -> np.ndarray:
  """Concatenates query, key and value, [d h k] or [h k] each, to [d (3 h k)] or [(3 h k)]."""
  parts = [arrays.get(query.replace("/query/", f"/{part}/")) for part in ("query", "key", "value")]
  found = [part for part in parts if part is not None]
  if len(found) < len(parts) or any(part.shape != found[0].shape for part in found):
    raise UserError(
      f"weights {path}: expected key and value of the shape of {query} {found[0].shape}, got "
      f"{[None if part is None else part.shape for part in parts]}; fetch the file again."
    )
  heads = found[0].shape[-2:]
  width = int(np.prod(heads))
  return np.concatenate([part.reshape(*part.shape[:-2], width) for part in found], axis=-1)


def _transposed(name: str, array: np.ndarray) -> np.ndarray:
  """Transposes kernels: [in, out] to [out, in], [h k d] to [d (h k)], HWIO to OIHW."""
  if not name.endswith("/kernel"):
    return array
  if array.ndim == 4:
    return array.transpose(3, 2, 0, 1)
  return array.reshape(-1, array.shape[-1]).T
