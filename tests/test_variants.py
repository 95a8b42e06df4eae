"""Every variant has the parameters and the preprocessing of timm's model of the same name."""

import dataclasses
import importlib.util
import json
import pathlib

import pytest

from vitcomp_jax import api
from vitcomp_jax.errors import UserError
from vitcomp_jax.models import tags
from vitcomp_jax.models.build import build
from vitcomp_jax.models.variants import VARIANTS, get_spec

# The sizes of all parameters of `timm.create_model(name, num_classes=...)`, timm 1.0.31, summed: of
# CLIP with 1,000 classes, or the outputs that it shares with texts (quickgelu); of the MAE models
# with `global_pool="avg"` and 1,000 classes; of DINOv2 and SigLIP with none.
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
  "vit_huge_patch14_224": 632_045_800,
  "vit_base_patch16_224.mae": 86_567_656,
  "vit_large_patch16_224.mae": 304_326_632,
  "vit_huge_patch14_224.mae": 632_045_800,
  "vit_small_patch14_dinov2": 22_056_192,
  "vit_small_patch14_reg4_dinov2": 22_057_344,
  "vit_base_patch14_dinov2": 86_579_712,
  "vit_base_patch14_reg4_dinov2": 86_582_016,
  "vit_large_patch14_dinov2": 304_367_616,
  "vit_large_patch14_reg4_dinov2": 304_370_688,
  "vit_base_patch32_clip_224": 88_225_000,
  "vit_base_patch32_clip_256": 88_236_520,
  "vit_base_patch32_clip_384": 88_297_960,
  "vit_base_patch16_clip_224": 86_568_424,
  "vit_base_patch16_clip_384": 86_860_264,
  "vit_large_patch14_clip_224": 304_204_776,
  "vit_large_patch14_clip_336": 304_532_456,
  "vit_huge_patch14_clip_224": 632_047_080,
  "vit_huge_patch14_clip_336": 632_456_680,
  "vit_huge_patch14_clip_378": 632_652_520,
  "vit_base_patch32_clip_quickgelu_224": 87_849_728,
  "vit_base_patch16_clip_quickgelu_224": 86_193_152,
  "vit_large_patch14_clip_quickgelu_224": 303_966_976,
  "vit_large_patch14_clip_quickgelu_336": 304_294_656,
  "vit_huge_patch14_clip_quickgelu_224": 632_077_824,
  "vit_huge_patch14_clip_quickgelu_378": 632_683_264,
  "vit_base_patch32_siglip_256": 94_552_320,
  "vit_base_patch16_siglip_224": 92_884_224,
  "vit_base_patch16_siglip_256": 92_930_304,
  "vit_base_patch16_siglip_384": 93_176_064,
  "vit_base_patch16_siglip_512": 93_520_128,
  "vit_large_patch16_siglip_256": 315_956_224,
  "vit_large_patch16_siglip_384": 316_283_904,
  "vit_large_patch16_siglip_512": 316_742_656,
  "vit_so400m_patch14_siglip_224": 427_680_704,
  "vit_so400m_patch14_siglip_378": 428_225_600,
  "vit_so400m_patch16_siglip_256": 427_888_064,
  "vit_so400m_patch16_siglip_384": 428_256_704,
  "vit_so400m_patch16_siglip_512": 428_772_800,
  "vit_giantopt_patch16_siglip_256": 1_163_168_256,
  "vit_giantopt_patch16_siglip_384": 1_163_659_776,
  "caformer_s18": 26_341_656,
  "caformer_s36": 39_297_102,
  "caformer_m36": 56_204_878,
  "caformer_b36": 98_753_614,
  # Not timm's: embedding 28·64, CLS 64, positions 101·64, 8 layers of 49,984, norm 128, head 650.
  "vit_mini_patch3_30": 408_970,
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_every_variant_is_listed():
  assert set(PARAMETERS) == set(VARIANTS)


# Deep ones trace for seconds, and differ from the others in numbers alone.
_DEEP = [
  pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if get_spec(name).depth > 12
]
_OTHERS = [name for name in VARIANTS if get_spec(name).depth <= 12]


@pytest.mark.parametrize("name", [*_OTHERS, *_DEEP])
def test_parameters(name):
  spec = get_spec(name)
  assert api.count_cost(build(spec, spec.dense_layers)).params == PARAMETERS[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_preprocessing(name):
  # Of timm's first weights of that name; of vit_base_patch16_clip_quickgelu_224, of OpenAI's.
  spec = get_spec(name)
  half = name.startswith("vit_") and not ("mae" in name or "dinov2" in name)
  scales = CLIP if "clip" in name and "vit_large_patch14_clip_" not in name else None
  scales = CLIP if "quickgelu" in name else None if "siglip" in name else scales
  assert (spec.mean, spec.std) == (scales or (HALF if half else IMAGENET))
  larger = spec.image_size[0] > 224 and "siglip" not in name
  whole = (
    larger or "mini" in name or "caformer" in name or ("_clip_" in name and "base" not in name)
  )
  crop = 1.0 if whole else 0.95 if name == "vit_base_patch16_clip_224" else 0.9
  assert spec.crop_pct == crop
  assert spec.interpolation == "bicubic"


def test_a_pretraining_tag_may_follow_the_name():
  assert get_spec("deit_small_patch16_224.fb_in1k") == get_spec("deit_small_patch16_224")


ROOT = pathlib.Path(__file__).parents[1]
TAGS = json.loads((ROOT / "vitcomp_jax" / "bundled" / "timm_tags.json").read_text())["tags"]


def test_the_table_of_tags_is_that_of_timm():
  timm = pytest.importorskip("timm", reason="timm is not installed: its tags were not compared")
  place = importlib.util.spec_from_file_location("timm_tags", ROOT / "tools" / "timm_tags.py")
  tool = importlib.util.module_from_spec(place)
  place.loader.exec_module(tool)
  if tags.timm_version() != timm.__version__:
    pytest.skip(f"timm {tags.timm_version()} is not installed: its tags were not compared")
  assert tool.table() == TAGS


def test_the_table_has_tags_of_every_variant_of_timm():
  architectures = {name.split(".")[0] for name in TAGS}
  assert architectures == {name.split(".")[0] for name in VARIANTS} - {"vit_mini_patch3_30"}
  assert list(TAGS) == sorted(TAGS) and len(TAGS) == 164


@pytest.mark.parametrize("name", TAGS)
def test_a_tag_gives_its_preprocessing(name, caplog):
  spec = get_spec(name)
  assert not caplog.records
  if name in VARIANTS:  # The fine-tuned MAE models, where timm's tags are for the pre-trained.
    assert spec == VARIANTS[name]
    return
  changes = {key: tuple(v) if isinstance(v, list) else v for key, v in TAGS[name].items()}
  assert spec == dataclasses.replace(VARIANTS[name.split(".")[0]], **changes)
  build(spec, spec.dense_layers)


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("vit_base_patch16_224.dino", dict(mean=IMAGENET[0], std=IMAGENET[1], num_classes=0)),
    (
      "vit_large_patch14_clip_224.openai_ft_in12k_in1k",
      dict(mean=CLIP[0], std=CLIP[1], crop_pct=1.0, num_classes=1000),
    ),
    ("vit_base_patch16_clip_384.laion2b_ft_in12k_in1k", dict(crop_mode="squash", crop_pct=1.0)),
    ("vit_base_patch16_224.augreg_in21k", dict(num_classes=21843, crop_pct=0.9)),
    ("caformer_s18.sail_in1k_384", dict(image_size=(384, 384))),
  ],
)
def test_tags_differ_from_the_name_alone(name, changes):
  spec = get_spec(name)
  assert spec == dataclasses.replace(spec, **changes)
  assert spec != get_spec(name.split(".")[0]) and spec.name == name.split(".")[0]


def test_what_is_asked_for_goes_before_the_tag():
  spec = get_spec("caformer_s18.sail_in22k_ft_in1k_384", num_classes=7, image_size=224)
  assert (spec.num_classes, spec.image_size) == (7, (224, 224))


def test_an_unknown_tag_is_told_in_one_line(caplog):
  assert get_spec("vit_base_patch16_224.dinno") == get_spec("vit_base_patch16_224")
  (record,) = caplog.records
  line = record.getMessage()
  assert record.levelname == "WARNING" and "\n" not in line
  assert line.startswith("vit_base_patch16_224.dinno: timm 1.0.31 has no such tag")
  assert "vit_base_patch16_224 (mean (0.5, 0.5, 0.5), std" in line
  assert "near it are vit_base_patch16_224.dino, " in line
  caplog.clear()
  get_spec("vit_mini_patch3_30.mine")
  assert caplog.records[0].getMessage().endswith("and the keys beside it")


def test_a_tag_is_found_by_hub_ids_too():
  for prefix in ("", "timm/", "hf-hub:timm/"):
    assert tags.tag_of(prefix + "vit_base_patch16_224.dino") == TAGS["vit_base_patch16_224.dino"]
  assert (
    tags.tag_of("vit_base_patch16_224") is tags.tag_of("someone/vit_base_patch16_224.x") is None
  )
  changes = tags.spec_changes(tags.tag_of("timm/vit_base_patch16_224.dino"))
  assert changes["mean"] == IMAGENET[0] and changes["image_size"] == (224, 224)


def test_an_unknown_variant_names_near_ones():
  with pytest.raises(UserError, match="deit_small_patch16_224"):
    get_spec("deit_smal_patch16_224")


def test_an_image_size_that_the_patch_does_not_divide():
  with pytest.raises(UserError, match="multiple of the patch size 16.*got 230; use 224"):
    get_spec("deit_small_patch16_224", image_size=230)


def test_a_negative_number_of_classes():
  with pytest.raises(UserError, match="num_classes: expected 0 or more, got -1"):
    get_spec("deit_small_patch16_224", num_classes=-1)
