"""Derives fields of a Vision Transformer's spec from the shapes of tensors under timm's names."""

import math
import re

from vitcomp_jax.weights.tensors import State

_FIRST = "blocks.0."


def fields_from_shapes(tensors: State) -> dict[str, object]:
  """Derives fields of `models.spec.ViTSpec` from shapes.

  Fields that shapes do not determine are left out: activation, epsilons, pooling by a token or a
  mean, the number of heads unless a tensor has an axis for heads or for a head's channels, and the
  kind of norms without biases. The grid is assumed to be square.

  Args:
    tensors: Tensors by timm's names.

  Returns:
    Fields by name; empty if the tensors have no patch embedding or no layers.
  """
  shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
  kernel, down = (shapes.get(n) for n in ("patch_embed.proj.weight", _FIRST + "mlp.fc2.weight"))
  if kernel is None or down is None or len(kernel) != 4:
    return {}
  modules = {name.rpartition(".")[0] for name in shapes}
  head = shapes.get("head.weight")
  fields = {
    "patch_size": kernel[-1],
    "width": kernel[0],
    "depth": 1 + max(int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))),
    "mlp_dim": down[1],
    "in_chans": kernel[1],
    "num_classes": head[0] if head else 0,
    "class_token": "cls_token" in shapes,
    "distilled": "dist_token" in shapes,
    "num_registers": shapes["reg_token"][1] if "reg_token" in shapes else 0,
    "positions": "absolute" if "pos_embed" in shapes else "none",
    "norm_pre": "norm_pre" in modules,
    "final_norm": "norm" in modules,
    "fc_norm": "fc_norm" in modules,
    "patch_bias": "patch_embed.proj.bias" in shapes,
    "patch_norm": "patch_embed.norm" in modules,
    "linear_bias": _FIRST + "mlp.fc2.bias" in shapes,
    "qkv_bias": _qkv_bias(shapes),
    "qk_norm": _FIRST + "attn.q_norm" in modules,
    "attn_norm": _FIRST + "attn.norm" in modules,
    "mlp": _mlp(shapes),
    "mlp_norm": _FIRST + "mlp.norm" in modules,
    "layer_scale": _FIRST + "ls1.gamma" in shapes,
  }
  return fields | _norm(shapes) | _heads(shapes) | _pool(shapes) | _grid(shapes, fields)


def _qkv_bias(shapes: dict[str, tuple[int, ...]]) -> str:
  if _FIRST + "attn.qkv.bias" in shapes:
    return "qkv"
  return "qv" if _FIRST + "attn.q_bias" in shapes else ""


def _mlp(shapes: dict[str, tuple[int, ...]]) -> str:
  if _FIRST + "mlp.fc1_g.weight" in shapes:
    return "swiglu"
  up, down = (shapes.get(_FIRST + f"mlp.fc{i}.weight", (0, 0)) for i in (1, 2))
  return "glu" if up[0] == 2 * down[1] else "mlp"


def _norm(shapes: dict[str, tuple[int, ...]]) -> dict[str, object]:
  """Returns the kind of norm if it has biases, which only layer norms have."""
  return {"norm": "layer"} if _FIRST + "norm1.bias" in shapes else {}


def _heads(shapes: dict[str, tuple[int, ...]]) -> dict[str, object]:
  """Returns the number of heads and the kind of relative bias, if an axis determines them."""
  fields: dict[str, object] = {}
  width = shapes["patch_embed.proj.weight"][0]
  if head_norm := shapes.get(_FIRST + "attn.q_norm.weight"):
    fields["num_heads"] = width // head_norm[0]
  if freqs := shapes.get("rope.freqs"):
    fields["num_heads"] = freqs[2]
  places = {"layer": _FIRST + "attn", "shared": "rel_pos_bias"}
  for kind, module in places.items():
    if table := shapes.get(f"{module}.relative_position_bias_table"):
      fields |= {"relative_bias": kind, "num_heads": table[1]}
  return fields


def _pool(shapes: dict[str, tuple[int, ...]]) -> dict[str, object]:
  """Returns the pooling, if it has parameters of its own."""
  if "dist_token" in shapes:
    return {"pool": "cls_dist"}
  if hidden := shapes.get("attn_pool.mlp.fc1.weight"):
    return {"pool": "map", "pool_mlp_dim": hidden[0]}
  return {}


def _grid(shapes: dict[str, tuple[int, ...]], fields: dict[str, object]) -> dict[str, object]:
  """Returns the size of square images, and whether the prefix has positions."""
  patch = shapes["patch_embed.proj.weight"][-1]
  for on_prefix in (True, False):
    if grid := _square_of(shapes, on_prefix):
      size = {"image_size": (grid[0] * patch, grid[1] * patch)}
      return size | ({"pos_on_prefix": on_prefix} if "pos_embed" in shapes else {})
  return {}


def square_grid(tensors: State, on_prefix: bool) -> tuple[int, int] | None:
  """Returns the grid that position embeddings or a bias table have rows for, if it is square.

  Args:
    tensors: Tensors by timm's names.
    on_prefix: Whether position embeddings have rows for the prefix tokens.
  """
  return _square_of({name: tuple(tensor.shape) for name, tensor in tensors.items()}, on_prefix)


def _square_of(shapes: dict[str, tuple[int, ...]], on_prefix: bool) -> tuple[int, int] | None:
  side = 0
  if positions := shapes.get("pos_embed"):
    tokens = [shapes[name] for name in ("cls_token", "dist_token", "reg_token") if name in shapes]
    rows = positions[1] - sum(shape[1] for shape in tokens) * on_prefix
    side = math.isqrt(max(rows, 0))
    return (side, side) if side and side * side == rows else None
  for module in (_FIRST + "attn", "rel_pos_bias"):
    if table := shapes.get(f"{module}.relative_position_bias_table"):
      # A grid of r rows and columns has (2r - 1)^2 differences; CLS adds three more.
      side = (math.isqrt(max(table[0] - 3, 0)) + 1) // 2
      return (side, side) if (2 * side - 1) ** 2 + 3 == table[0] else None
  return None
