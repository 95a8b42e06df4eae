"""Converts weights of google-research/big_vision, such as SigLIP's image tower, to timm's names.

Zhai et al., `Sigmoid Loss for Language Image Pre-Training <https://arxiv.org/abs/2303.15343>`_,
2023.
"""

import logging
import re
from collections.abc import Iterable, Mapping

from vitcomp_jax.weights import augreg
from vitcomp_jax.weights.tensors import Tensor

# Possible prefixes of the image tower: with or without a text tower, and with or without the other
# parts of a training checkpoint.
_TOWERS = ("params/img/", "img/", "params/", "")
# Names in a block that differ from AugReg's: here Flax numbers the modules of each class
# separately, there it numbers all modules in sequence.
_INSIDE = {
  "MultiHeadDotProductAttention_0/": "MultiHeadDotProductAttention_1/",
  "LayerNorm_1/": "LayerNorm_2/",
  "MlpBlock_0/": "MlpBlock_3/",
}
# Blocks that `nn.scan` has stacked along the first axis of each tensor.
_STACKED = "Transformer/encoderblock/"
_ATTENTION = "MAPHead_0/MultiHeadDotProductAttention_0"
_POOL = {
  "MAPHead_0/probe": "latent",
  f"{_ATTENTION}/query/kernel": "q.weight",
  f"{_ATTENTION}/query/bias": "q.bias",
  f"{_ATTENTION}/key/kernel": "kv.weight",
  f"{_ATTENTION}/key/bias": "kv.bias",
  f"{_ATTENTION}/out/kernel": "proj.weight",
  f"{_ATTENTION}/out/bias": "proj.bias",
  "MAPHead_0/LayerNorm_0/scale": "norm.weight",
  "MAPHead_0/LayerNorm_0/bias": "norm.bias",
  "MAPHead_0/MlpBlock_0/Dense_0/kernel": "mlp.fc1.weight",
  "MAPHead_0/MlpBlock_0/Dense_0/bias": "mlp.fc1.bias",
  "MAPHead_0/MlpBlock_0/Dense_1/kernel": "mlp.fc2.weight",
  "MAPHead_0/MlpBlock_0/Dense_1/bias": "mlp.fc2.bias",
}


def is_big_vision(names: Iterable[str]) -> bool:
  """Returns whether names are big_vision's, not AugReg's: positions are outside the transformer."""
  return any(re.fullmatch("(params/)?(img/)?pos_embedding", name) for name in names)


def to_timm(arrays: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
  """Renames and transposes tensors to timm's names and PyTorch's layout.

  Args:
    arrays: Tensors by big_vision's names, such as `params/img/Transformer/encoderblock_0/…`, or
      `params/img/Transformer/encoderblock/…` with all blocks in one tensor. Tensors outside the
      image tower are left out, and logged.
    path: Path of the file, for error messages.

  Returns:
    Tensors by timm's names, with query, key and value fused.

  Raises:
    UserError: If a name is unknown, or query, key and value differ in shape.
  """
  tower = next(prefix for prefix in _TOWERS if f"{prefix}pos_embedding" in arrays)
  if others := sorted({_part(name) for name in arrays if not name.startswith(tower)}):
    logging.info("weights %s: read what is under %s, not %s", path, tower, ", ".join(others))
  blocks: dict[str, Tensor] = {}
  pool: dict[str, Tensor] = {}
  for name, tensor in arrays.items():
    inside = name.removeprefix(tower)
    if not name.startswith(tower):
      continue
    if inside in _POOL or inside.startswith(f"{_ATTENTION}/value/"):
      pool[inside] = tensor
    elif inside.startswith(_STACKED):
      for index in range(tensor.shape[0]):
        block = f"Transformer/encoderblock_{index}/{inside.removeprefix(_STACKED)}"
        blocks[_augreg_name(block)] = tensor.row(index)
    else:
      blocks[_augreg_name(inside)] = tensor
  return augreg.to_timm(blocks, path) | _pool_to_timm(pool, path)


def _part(name: str) -> str:
  """Returns the beginning of a name, which tells what part of a model it belongs to."""
  return "/".join(name.split("/")[:2])


def _augreg_name(name: str) -> str:
  """Returns AugReg's name for a tensor outside the pooling head."""
  if name == "pos_embedding":
    return augreg.POSITIONS
  match = re.fullmatch(r"(Transformer/encoderblock_\d+/)(\w+/)(.*)", name)
  return match[1] + _INSIDE.get(match[2], match[2]) + match[3] if match else name


def _pool_to_timm(pool: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
  """Converts the attention pooling head; its key and value are fused."""
  state = {}
  for name, tensor in pool.items():
    if name.startswith(f"{_ATTENTION}/value/"):
      continue
    if name.startswith(f"{_ATTENTION}/query/"):
      tensor = augreg.fused(pool, name, ("query",), path)
    elif name.startswith(f"{_ATTENTION}/key/"):
      tensor = augreg.fused(pool, name, ("key", "value"), path)
    else:
      tensor = augreg.transposed(name, tensor)
    state[f"attn_pool.{_POOL[name]}"] = tensor
  return state
