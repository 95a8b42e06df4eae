"""Every variant has the parameters and the preprocessing of timm's model of the same name."""

import pytest

from vitcomp_jax import api
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.variants import VARIANTS, get_spec
from vitcomp_jax.models.vit import ViT

# timm 1.0.31; the MAE models with average pool and 1,000 classes, DINOv2 without classifier.
PARAMETERS = {
  "deit_tiny_patch16_224": 5_717_416,
  "deit_tiny_distilled_patch16_224": 5_910_800,
  "deit_small_patch16_224": 22_050_664,
  "deit_small_distilled_patch16_224": 22_436_432,
  "deit_base_patch16_224": 86_567_656,
  "deit_base_distilled_patch16_224": 87_338_192,
  "deit_base_patch16_384": 86_859_496,
  "deit_base_distilled_patch16_384": 87_630_032,
  "vit_tiny_patch16_224": 5_717_416,
  "vit_tiny_patch16_384": 5_790_376,
  "vit_small_patch16_224": 22_050_664,
  "vit_small_patch16_384": 22_196_584,
  "vit_base_patch16_224": 86_567_656,
  "vit_base_patch16_384": 86_859_496,
  "vit_large_patch16_224": 304_326_632,
  "vit_large_patch16_384": 304_715_752,
  "vit_base_patch16_224.mae": 86_567_656,
  "vit_large_patch16_224.mae": 304_326_632,
  "vit_huge_patch14_224.mae": 632_045_800,
  "vit_small_patch14_dinov2": 22_056_192,
  "vit_small_patch14_reg4_dinov2": 22_057_344,
  "vit_base_patch14_dinov2": 86_579_712,
  "vit_base_patch14_reg4_dinov2": 86_582_016,
  "vit_large_patch14_dinov2": 304_367_616,
  "vit_large_patch14_reg4_dinov2": 304_370_688,
  # Not timm's: embedding 28·64, CLS 64, positions 101·64, 8 layers of 49,984, norm 128, head 650.
  "vit_mini_patch3_30": 408_970,
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_every_variant_is_listed():
  assert set(PARAMETERS) == set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters(name):
  spec = get_spec(name)
  assert api.count_cost(ViT(spec, spec.dense_layers)).params == PARAMETERS[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_preprocessing(name):
  spec = get_spec(name)
  augreg = name.startswith("vit_") and not ("mae" in name or "dinov2" in name)
  whole = spec.image_size[0] == 384 or "dinov2" in name or "mini" in name
  assert (spec.mean, spec.std) == (HALF if augreg else IMAGENET)
  assert spec.crop_pct == (1.0 if whole else 0.9)
  assert spec.interpolation == "bicubic"


def test_a_pretraining_tag_may_follow_the_name():
  assert get_spec("deit_small_patch16_224.fb_in1k") == get_spec("deit_small_patch16_224")


def test_an_unknown_variant_names_near_ones():
  with pytest.raises(UserError, match="deit_small_patch16_224"):
    get_spec("deit_smal_patch16_224")


def test_an_image_size_that_the_patch_does_not_divide():
  with pytest.raises(UserError, match="multiple of the patch size 16.*got 230; use 224"):
    get_spec("deit_small_patch16_224", image_size=230)


def test_a_negative_number_of_classes():
  with pytest.raises(UserError, match="num_classes: expected 0 or more, got -1"):
    get_spec("deit_small_patch16_224", num_classes=-1)
