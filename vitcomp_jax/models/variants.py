"""Model variants by timm's names, and a small one that this project trains."""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

from vitcomp_jax.errors import UserError
from vitcomp_jax.models import tags
from vitcomp_jax.models.caformer import caformer
from vitcomp_jax.models.spec import ViTSpec

_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_SIZES = {  # width, depth, heads, hidden units
  "tiny": (192, 12, 3, 768),
  "small": (384, 12, 6, 1536),
  "base": (768, 12, 12, 3072),
  "large": (1024, 24, 16, 4096),
  "so400m": (1152, 27, 16, 4304),
  "huge": (1280, 32, 16, 5120),
  "giantopt": (1536, 40, 16, 6144),
}
# Patch size, image size and `crop_pct`.
_CLIP = {
  "base": ((32, 224, 0.9), (32, 256, 1.0), (32, 384, 1.0), (16, 224, 0.95), (16, 384, 1.0)),
  "large": ((14, 224, 1.0), (14, 336, 1.0)),
  "huge": ((14, 224, 1.0), (14, 336, 1.0), (14, 378, 1.0)),
}
# The same, and the dimensions of the embedding shared with text, which the head computes.
_CLIP_QUICKGELU = {
  "base": ((32, 224, 0.9, 512), (16, 224, 0.9, 512)),
  "large": ((14, 224, 1.0, 768), (14, 336, 1.0, 768)),
  "huge": ((14, 224, 1.0, 1024), (14, 378, 1.0, 1024)),
}
_SIGLIP = {
  "base": ((32, (256,)), (16, (224, 256, 384, 512))),
  "large": ((16, (256, 384, 512)),),
  "so400m": ((14, (224, 378)), (16, (256, 384, 512))),
  "giantopt": ((16, (256, 384)),),
}


_CAFORMER = (  # blocks and channels of the four stages
  ("caformer_s18", (3, 3, 9, 3), (64, 128, 320, 512)),
  ("caformer_s36", (3, 12, 18, 3), (64, 128, 320, 512)),
  ("caformer_m36", (3, 12, 18, 3), (96, 192, 384, 576)),
  ("caformer_b36", (3, 12, 18, 3), (128, 256, 512, 768)),
)


def _vit(name: str, size: str, image_size: int, patch_size: int = 16, **options) -> ViTSpec:
  width, depth, heads, hidden = _SIZES[size]
  side = (image_size, image_size)
  return ViTSpec(name, side, patch_size, width, depth, heads, hidden, **options)


def _clip() -> Iterator[ViTSpec]:
  """Yields CLIP's vision towers: fine-tuned for ImageNet, and OpenAI's with QuickGELU."""
  clip = dict(norm_pre=True, norm_eps=1e-5)
  for size, sides in _CLIP.items():
    # LAION's large model uses another mean and standard deviation.
    scales = (_HALF, _HALF) if size == "large" else (_CLIP_MEAN, _CLIP_STD)
    for patch, side, crop in sides:
      options = dict(clip, mean=scales[0], std=scales[1], crop_pct=crop)
      yield _vit(f"vit_{size}_patch{patch}_clip_{side}", size, side, patch, **options)
  for size, towers in _CLIP_QUICKGELU.items():
    for patch, side, crop, outputs in towers:
      options = dict(clip, mean=_CLIP_MEAN, std=_CLIP_STD, crop_pct=crop, activation="quick_gelu")
      name = f"vit_{size}_patch{patch}_clip_quickgelu_{side}"
      yield _vit(name, size, side, patch, num_classes=outputs, **options)


def _siglip() -> Iterator[ViTSpec]:
  """Yields SigLIP's vision towers, which have no classifier."""
  options = dict(num_classes=0, class_token=False, pool="map", mean=_HALF, std=_HALF)
  for size, patches in _SIGLIP.items():
    for patch, sides in patches:
      for side in sides:
        # timm uses the exact GELU for the older ones, though all were trained with tanh.
        tanh = patch == 32 or (size, side) == ("large", 512) or size == "giantopt"
        tanh |= (size, patch) == ("so400m", 16)
        activation = "gelu_tanh" if tanh else "gelu"
        name = f"vit_{size}_patch{patch}_siglip_{side}"
        yield _vit(name, size, side, patch, activation=activation, **options)


def _build() -> dict[str, ViTSpec]:
  """Returns all variants by name, with the preprocessing of timm's weights of that name."""
  specs = []
  for size, side in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384)):
    crop = 1.0 if side == 384 else 0.9
    specs.append(_vit(f"deit_{size}_patch16_{side}", size, side, crop_pct=crop))
    name = f"deit_{size}_distilled_patch16_{side}"
    specs.append(_vit(name, size, side, distilled=True, pool="cls_dist", crop_pct=crop))
  for size in ("tiny", "small", "base", "large"):
    for side, crop in ((224, 0.9), (384, 1.0)):
      name = f"vit_{size}_patch16_{side}"
      specs.append(_vit(name, size, side, mean=_HALF, std=_HALF, crop_pct=crop))
  specs.append(_vit("vit_huge_patch14_224", "huge", 224, 14, mean=_HALF, std=_HALF))
  for size, patch in (("base", 16), ("large", 16), ("huge", 14)):
    name = f"vit_{size}_patch{patch}_224.mae"
    specs.append(_vit(name, size, 224, patch, pool="size_mean"))
  for size in ("small", "base", "large"):
    # The authors resample positions by PyTorch's plain bicubic interpolation.
    dino = dict(num_classes=0, layer_scale=True, crop_pct=1.0, antialias=False)
    specs.append(_vit(f"vit_{size}_patch14_dinov2", size, 518, 14, **dino))
    registers = dict(num_registers=4, pos_on_prefix=False)
    specs.append(_vit(f"vit_{size}_patch14_reg4_dinov2", size, 518, 14, **dino, **registers))
  specs += [*_clip(), *_siglip()]
  for name, depths, dims in _CAFORMER:
    specs.append(caformer(name, (224, 224), depths, dims, crop_pct=1.0))
  # Fashion-MNIST's 28 pixels padded to 30 give 100 patches, enough to compress.
  specs.append(
    ViTSpec(
      "vit_mini_patch3_30",
      image_size=(30, 30),
      patch_size=3,
      width=64,
      depth=8,
      num_heads=2,
      mlp_dim=256,
      num_classes=10,
      mean=_HALF,
      std=_HALF,
      crop_pct=1.0,
    )
  )
  return {spec.name: spec for spec in specs}


VARIANTS = _build()


def list_variants() -> list[str]:
  """Returns the names of all variants, sorted.

  Examples:
    >>> import vitcomp_jax as vc
    >>> "deit_small_patch16_224" in vc.list_variants()
    True
  """
  return sorted(VARIANTS)


def get_spec(
  variant: str,
  num_classes: int | None = None,
  image_size: int | tuple[int, int] | None = None,
  dtype: str | None = None,
) -> ViTSpec:
  """Returns the spec of a variant, by timm's name with or without a pre-training tag.

  Args:
    variant: Name such as `deit_small_patch16_224` or `vit_base_patch16_224.dino`; with a tag, the
      spec has timm's preprocessing for those weights.
    num_classes: Number of classes, 0 for features; None for the variant's or the tag's.
    image_size: Side of a square, or height and width, in pixels; None for the variant's or the
      tag's.
    dtype: Precision of the computation; None for that of inputs and weights.

  Raises:
    UserError: If the variant is unknown, or the patch size does not divide the image size.

  Examples:
    >>> import vitcomp_jax as vc
    >>> vc.get_spec("deit_small_patch16_224", image_size=384).num_tokens
    577
  """
  spec = VARIANTS.get(variant) or VARIANTS.get(variant.split(".")[0])
  if spec is None:
    near = difflib.get_close_matches(variant, VARIANTS, n=3, cutoff=0.0)
    raise UserError(f"variant {variant!r} is not known; near it are {', '.join(near)}.")
  changes: dict[str, Any] = {"dtype": dtype}
  if "." in variant and variant not in VARIANTS:
    changes |= _tagged(variant, spec)
  if num_classes is not None:
    if num_classes < 0:
      raise UserError(f"num_classes: expected 0 or more, got {num_classes}.")
    changes["num_classes"] = num_classes
  if image_size is not None:
    side = image_size
    changes["image_size"] = (side, side) if isinstance(side, int) else tuple(side)
  return dataclasses.replace(spec, **changes)


def _tagged(variant: str, spec: ViTSpec) -> dict[str, Any]:
  """Returns the fields of the architecture's spec that a pre-training tag changes."""
  if (tag := tags.tag_of(variant)) is not None:
    return tags.spec_changes(tag)
  tags.warn_unknown(variant, spec)
  return {}
