"""Every variant has the parameters and the preprocessing of timm's model of the same name."""

import dataclasses
import json

import pytest

from tools import timm_table
from vitcomp_jax import api
from vitcomp_jax.errors import UserError
from vitcomp_jax.models import tags
from vitcomp_jax.models.build import build
from vitcomp_jax.models.rotary import Rotary
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.variants import VARIANTS, fields_of, get_spec

TABLE, TAGS = timm_table.bundled()
MODELS = TABLE["models"]
# The sizes of all parameters of timm's models, summed; of the MAE models with `global_pool="avg"`
# and 1,000 classes. The mini variant is not timm's: embedding 28·64, CLS 64, positions 101·64, 8
# layers of 49,984, norm 128, head 650.
PARAMETERS = TABLE["parameters"] | {
  "vit_base_patch16_224.mae": 86_567_656,
  "vit_large_patch16_224.mae": 304_326_632,
  "vit_huge_patch14_224.mae": 632_045_800,
  "caformer_s18": 26_341_656,
  "caformer_s36": 39_297_102,
  "caformer_m36": 56_204_878,
  "caformer_b36": 98_753_614,
  "vit_mini_patch3_30": 408_970,
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_every_variant_is_listed():
  assert set(PARAMETERS) == set(VARIANTS)
  assert set(MODELS) == set(TABLE["parameters"]) and len(MODELS) == 237
  assert not set(MODELS) & set(TABLE["refused"])


# Deep ones trace for seconds, and models of one structure differ in numbers alone.
_FIRST = [names[0] for names in timm_table.structures(MODELS)] + [
  *PARAMETERS.keys() - MODELS.keys()
]
_QUICK = {name for name in _FIRST if get_spec(name).depth <= 12}


@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=[] if name in _QUICK else pytest.mark.slow) for name in PARAMETERS],
)
def test_parameters(name):
  spec = get_spec(name)
  if name in MODELS:  # all layers are alike, so that two of them tell what the others have
    one, two = (_parameters(dataclasses.replace(spec, depth=depth)) for depth in (1, 2))
    assert one + (spec.depth - 1) * (two - one) == PARAMETERS[name]
  else:
    assert _parameters(spec) == PARAMETERS[name]


def _parameters(spec):
  return api.count_cost(build(spec, spec.dense_layers)).params


@pytest.mark.parametrize("name", MODELS)
def test_a_spec_has_the_fields_of_the_table(name):
  fields = {key: _tuples(value) for key, value in MODELS[name].items()}
  if "rotary" in fields:
    fields["rotary"] = Rotary(**fields["rotary"])
  spec = get_spec(name)
  assert spec == ViTSpec(name=name, **fields)
  assert spec.naming == fields.get("naming", "vit")  # is none of what is compared
  assert fields_of(spec).keys() == {"name", *fields}


def _tuples(value):
  """Returns JSON with tuples in place of lists."""
  if isinstance(value, dict):
    return {key: _tuples(part) for key, part in value.items()}
  return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize(
  ("name", "mean", "crop_pct", "interpolation"),
  [
    ("vit_mini_patch3_30", HALF, 1.0, "bicubic"),
    ("vit_large_patch16_224.mae", IMAGENET, 0.9, "bicubic"),
    ("caformer_m36", IMAGENET, 1.0, "bicubic"),
    ("vit_base_patch16_clip_quickgelu_224", CLIP, 1.0, "bicubic"),
    ("vit_so400m_patch14_siglip_384", HALF, 0.9, "bicubic"),
    ("deit_small_patch16_224", IMAGENET, 0.9, "bicubic"),
    ("vit_small_patch16_dinov3", IMAGENET, 1.0, "bicubic"),
  ],
)
def test_preprocessing(name, mean, crop_pct, interpolation):
  spec = get_spec(name)
  assert (spec.mean, spec.std) == mean
  assert (spec.crop_pct, spec.interpolation) == (crop_pct, interpolation)


@pytest.mark.parametrize("name", TABLE["refused"])
def test_a_refused_name_gives_its_reason(name):
  with pytest.raises(UserError) as error:
    get_spec(name + ".tag")
  assert str(error.value).endswith(f"got {TABLE['refused'][name]}.")
  assert "\n" not in str(error.value)


def test_a_pretraining_tag_may_follow_the_name():
  assert get_spec("deit_small_patch16_224.fb_in1k") == get_spec("deit_small_patch16_224")


@pytest.mark.slow
def test_the_tables_are_those_of_the_timm_that_is_installed():
  timm = pytest.importorskip("timm", reason="not run: timm is not installed, see the extra `peers`")
  if TABLE["timm"] != timm.__version__:
    pytest.skip(f"not run: timm {TABLE['timm']} is not installed, whose table ships")
  from tools import timm_models

  table = timm_models.models()
  assert _lists({"timm": timm.__version__, **table}) == TABLE
  assert _lists(timm_models.tags(table["models"])) == TAGS


def _lists(value):
  """Returns a value as JSON holds it."""
  return json.loads(json.dumps(value))


def test_the_table_has_tags_of_every_variant_of_timm():
  architectures = {name.split(".")[0] for name in TAGS}
  known = {name.split(".")[0] for name in VARIANTS} - {"vit_mini_patch3_30"}
  assert architectures <= known
  assert len(known - architectures) == 13  # that nobody has trained
  assert list(TAGS) == sorted(TAGS) and len(TAGS) == 438
  assert tags.timm_version() == TABLE["timm"]


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
    ("vit_base_patch32_clip_384.openai_ft_in12k_in1k", dict(crop_mode="squash", crop_pct=0.95)),
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
