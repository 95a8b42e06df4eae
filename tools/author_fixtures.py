"""Writes tiny models with their authors' tensor names, for the tests.

    python tools/author_fixtures.py [NAME ...]

rewrites folders below `tests/weights/peers/authors`; `open_clip_fixtures.py` describes their
content. The models are created with timm, and their tensors are renamed to the authors' names. If
timm can read the authors' files, its own conversion must restore the original names. The script
needs PyTorch and timm.
"""

import timm
import torch
from peer_writing import HEADS, SIZES, State, authors, drawn, run
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer


def dino() -> None:
  """Writes the teacher of a training checkpoint: a backbone and a projection."""

  def change(state: State) -> State:
    return state | {"head.mlp.0.weight": drawn(8, 16), "head.last_layer.weight_g": drawn(8, 1)}

  model = VisionTransformer(**SIZES, num_classes=0)
  authors("dino", model, "norm", ((r"^", "backbone."),), change, HEADS)


def moco_v3() -> None:
  def change(state: State) -> State:
    momentum = {f"momentum_encoder.{key}": tensor + 1 for key, tensor in state.items()}
    base = {f"base_encoder.{key}": tensor for key, tensor in state.items()}
    return base | momentum | {"base_encoder.head.0.weight": drawn(8, 16)}

  authors("moco_v3", VisionTransformer(**SIZES, num_classes=0), "norm", (), change, HEADS)


def mae() -> None:
  def change(state: State) -> State:
    decoder = {"decoder_embed.weight": drawn(8, 16), "decoder_blocks.0.norm1.weight": drawn(8)}
    decoder |= {"decoder_pos_embed": drawn(1, 17, 8), "decoder_pred.bias": drawn(48)}
    return state | decoder | {"mask_token": drawn(1, 1, 8)}

  authors("mae", VisionTransformer(**SIZES, num_classes=0), "norm", (), change, HEADS)


def i_jepa() -> None:
  """Writes the averaged encoder as in a checkpoint; it pools by a mean of normalized patches."""
  options = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
  model = VisionTransformer(**SIZES, **options)
  rules = ((r"^", "target_encoder.module."),)
  authors("i_jepa", model, "norm", rules, fields=HEADS)


def deit3() -> None:
  """Writes a model whose names timm's Eva uses too; the user has to specify the rest."""
  model = VisionTransformer(**SIZES, num_classes=5, init_values=0.1, no_embed_class=True)
  rules = ((r"\.ls([12])\.gamma$", r".gamma_\1"),)
  fields = HEADS | {"norm_eps": 1e-6, "activation": "gelu", "pool": "cls"}
  authors("../timm/deit3", model, "norm", rules, fields=fields)


def with_mask(state: State) -> State:
  return state | {"mask_token": drawn(1, 16)}


def dinov2() -> None:
  model = VisionTransformer(**SIZES, num_classes=0, init_values=0.1)
  authors("dinov2", model, "norm", (), with_mask, HEADS, timm_reads=True)


def dinov2_registers() -> None:
  """Writes a model like the giant one: packed SwiGLU, registers, separate CLS position."""
  mlp = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
  registers = {"reg_tokens": 3, "no_embed_class": True}
  model = VisionTransformer(**SIZES, num_classes=0, init_values=0.1, **mlp, **registers)
  rules = (
    (r"^reg_token$", "register_tokens"),
    (r"mlp\.fc1\.", "mlp.w12."),
    (r"mlp\.fc2\.", "mlp.w3."),
  )

  def change(state: State) -> State:
    position = drawn(1, 1, 16)
    state["cls_token"] = state["cls_token"] - position
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    return with_mask(state)

  authors("dinov2_registers", model, "norm", rules, change, HEADS, timm_reads=True)


def dinov2_training() -> None:
  """Writes layers in chunks, together with projections that only training uses."""
  model = VisionTransformer(**SIZES, num_classes=0, init_values=0.1)
  rules = ((r"^blocks\.(\d)\.", r"blocks.0.\1."), (r"^", "backbone."))

  def change(state: State) -> State:
    return state | {"backbone.mask_token": drawn(1, 16), "ibot_head.mlp.0.bias": drawn(8)}

  authors("dinov2_training", model, "norm", rules, change, HEADS)


class _LinearHead(torch.nn.Module):
  """Classifies CLS concatenated with the mean of patches, as DINOv2's one-layer classifiers do."""

  def __init__(self) -> None:
    super().__init__()
    self.backbone = VisionTransformer(**SIZES, num_classes=0, init_values=0.1)
    self.linear_head = torch.nn.Linear(32, 5)

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    tokens = self.backbone.forward_features(images)
    return self.linear_head(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1))


def dinov2_linear() -> None:
  def change(state: State) -> State:
    return state | {"backbone.mask_token": drawn(1, 16)}

  authors("dinov2_linear", _LinearHead(), "backbone.norm", (), change, HEADS)


def beit() -> None:
  options = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1}
  model = Beit(**SIZES, num_classes=5, **options)

  def change(state: State) -> State:
    index = {f"blocks.{i}.attn.relative_position_index": torch.zeros(17, 17).long() for i in (0, 1)}
    return state | index

  authors("beit", model, "blocks.1", (), change, timm_reads=True)


if __name__ == "__main__":
  run(
    (
      dino,
      moco_v3,
      mae,
      i_jepa,
      deit3,
      dinov2,
      dinov2_registers,
      dinov2_training,
      dinov2_linear,
      beit,
    )
  )
