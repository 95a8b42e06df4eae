"""Tiny models made by Hugging Face transformers, see tools/huggingface_fixtures.py."""

import pathlib
import re

import numpy as np
import pytest

from tests.models import forward
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.build import build
from vitcomp_jax.models.variants import fields_of, spec_of
from vitcomp_jax.weights.dialects import huggingface
from vitcomp_jax.weights.dialects.huggingface_images import preparation_of
from vitcomp_jax.weights.dialects.huggingface_writing import to_huggingface
from vitcomp_jax.weights.files import open_source
from vitcomp_jax.weights.loading import check_params
from vitcomp_jax.weights.timm_names import to_flax

PEERS = pathlib.Path(__file__).parent / "peers" / "huggingface"
NAMES = sorted(path.name for path in PEERS.iterdir())


def read(source):
  """Returns the spec and the parameters of a folder of transformers."""
  fields = huggingface.describe(source.configs, source.tensors).fields
  spec = spec_of({"name": source.name, **fields})
  state = huggingface.to_timm(source.tensors, source.configs)
  params = to_flax({name: np.asarray(tensor) for name, tensor in state.items()})
  check_params(build(spec, spec.dense_layers), params)
  return spec, params


def difference(got, want):
  return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_transformers(name):
  spec, params = read(open_source(str(PEERS / name)))
  expected = np.load(PEERS / name / "expected.npz")
  output = forward(spec, spec.dense_layers, {"params": params}, expected["images"])
  assert difference(output.tokens.x, expected["tokens"]) < 2e-6
  assert difference(output.logits, expected["logits"]) < 2e-6


def described(name, tensors=None, **changes):
  """Describes a stored model whose configuration is changed."""
  source = open_source(str(PEERS / name))
  config = {**source.configs["config.json"], **changes}
  return huggingface.describe({"config.json": config}, tensors or source.tensors)


def test_class_names():
  assert described("vit_classifier").class_names == ("cat", "dog", "ox")
  assert described("vit_features").class_names == ()
  numbered = {str(index): f"LABEL_{index}" for index in range(3)}
  assert described("vit_classifier", id2label=numbered).class_names == ()
  # In the order of their indices, not of the file.
  mixed = {"2": "ox", "0": "cat", "1": "dog"}
  assert described("vit_classifier", id2label=mixed).class_names == ("cat", "dog", "ox")
  with pytest.raises(UserError, match="name the classifier's 3 outputs from 0 on, got 2 names"):
    described("vit_classifier", id2label={"0": "cat", "1": "dog"})


def test_defaults_of_older_files():
  # Version 4 wrote of the towers of SigLIP only what differs from the classes' defaults.
  source = open_source(str(PEERS / "siglip_both"))
  tower = {"model_type": "siglip_vision_model", "num_attention_heads": 2, "image_size": 16}
  config = {"model_type": "siglip", "vision_config": tower}
  fields = huggingface.describe({"config.json": config}, source.tensors).fields
  assert (fields["norm_eps"], fields["activation"], fields["pool"]) == (1e-6, "gelu_tanh", "map")


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("vit", {"model_type": "swin"}, "a model_type of vit, deit, .*, got 'swin'"),
    ("vit", {"architectures": ["ViTForDepth"]}, "an image classifier of ViT, got 'ViTForDepth'"),
    ("vit", {"hidden_act": "mish"}, "a hidden_act of gelu, .*, got 'mish'"),
    ("vit", {"hidden_size": 32}, "expected hidden_size 16 as the tensors have, got 32"),
    ("vit", {"num_hidden_layers": 3}, "expected num_hidden_layers 2 as the tensors have, got 3"),
    ("vit", {"patch_size": [4, 2]}, "expected a square patch_size, got 4 by 2"),
    ("vit", {"head_dim": 4}, "share the width 16, got 2 of 4 channels each"),
    ("vit", {"num_attention_heads": 3}, "share the width 16, got 3 of 5.33333 channels each"),
    ("beit", {"image_size": [12, 20]}, "expected a square image_size"),
    ("vit", {"num_attention_heads": "two"}, "configurations as transformers writes them"),
  ],
)
def test_unsupported_settings_are_refused(name, changes, message):
  with pytest.raises(UserError, match=message):
    described(name, **changes)


def test_another_library_s_configuration():
  source = open_source(str(PEERS / "vit"))
  assert huggingface.describe({"config.json": {"architecture": "vit"}}, source.tensors) is None
  assert huggingface.describe({}, {"patch_embed.proj.weight": np.zeros(1)}) is None


def test_parts_of_a_model_are_left_to_the_check_of_names():
  kernel = {"vit.embeddings.patch_embeddings.projection.weight": np.zeros((16, 3, 4, 4))}
  for configs in ({}, {"config.json": {"model_type": "vit"}}):
    assert not huggingface.describe(configs, kernel).fields
  assert huggingface.to_timm(kernel).keys() == {"patch_embed.proj.weight"}


def test_without_a_configuration_only_what_tensors_say():
  source = open_source(str(PEERS / "vit_classifier"))
  fields = huggingface.describe({}, source.tensors).fields
  assert (fields["width"], fields["depth"], fields["mlp_dim"]) == (16, 2, 24)
  assert not {"num_heads", "norm_eps", "activation", "pool"} & fields.keys()
  deit, taught = (
    huggingface.describe({}, open_source(str(PEERS / name)).tensors).fields["pool"]
    for name in ("deit_classifier", "deit_teacher")
  )
  assert (deit, taught) == ("cls", "cls_dist")


def test_names_under_a_wrapper_and_unknown_ones():
  source = open_source(str(PEERS / "vit_classifier"))
  wrapped = {f"net.{name}": tensor for name, tensor in source.tensors.items()}
  expected = huggingface.to_timm(source.tensors)
  assert huggingface.to_timm(wrapped).keys() == expected.keys()
  assert huggingface.to_timm({**source.tensors, "extra": np.zeros(1)}).keys() == {
    *expected,
    "extra",
  }


def test_what_is_left_out_is_told_in_one_line(caplog):
  caplog.set_level("INFO")
  huggingface.to_timm(open_source(str(PEERS / "clip_both")).tensors)
  (line,) = (message for message in caplog.messages if "left out" in message)
  assert "text_model.encoder.layers.*" in line and "logit_scale" in line


def test_two_encoders_are_refused():
  source = open_source(str(PEERS / "vit_classifier"))
  tensors = {f"{at}.{name}": t for name, t in source.tensors.items() for at in ("a", "b")}
  with pytest.raises(UserError, match="one encoder of images, got 2"):
    huggingface.to_timm(tensors)


CROP = {
  "do_center_crop": True,
  "crop_size": {"height": 224, "width": 224},
  "size": {"shortest_edge": 256},
}


@pytest.mark.parametrize(
  ("settings", "expected"),
  [
    (
      {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}},
      {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"},
    ),
    # As written before version 4.25: one number, of both sides or of the shorter one.
    ({"size": 16, "resample": 3}, {"interpolation": "bicubic", "crop_mode": "squash"}),
    (
      {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224},
      {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"},
    ),
    # Null is not said.
    ({"size": 16, "resample": None, "do_resize": None}, {"interpolation": "bilinear"}),
    (
      {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224},
      {"crop_pct": 0.875, "crop_mode": "squash"},
    ),
    ({"image_processor_type": "BitImageProcessor", **CROP}, {"crop_pct": 0.875}),
    (
      {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_resize": False},
      {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
    ),
    ({"do_normalize": False, "do_resize": False}, {"mean": (0, 0, 0), "std": (1, 1, 1)}),
    # Values in [-1, 1] before the mean: 2 x - 0 of x in [0, 1].
    (
      {"rescale_factor": 2 / 255, "image_mean": [1, 1, 1], "image_std": [2, 2, 2], "size": 16},
      {"mean": (0.5, 0.5, 0.5), "std": (1, 1, 1)},
    ),
  ],
)
def test_preprocessing(settings, expected):
  source = open_source(str(PEERS / "vit"))
  configs = {**source.configs, "preprocessor_config.json": settings}
  found = huggingface.describe(configs, source.tensors)
  assert {name: found.fields[name] for name in expected} == expected
  assert found.fields["image_size"] == (16, 16), "that of the model, which takes no other"
  assert {found.origins[name] for name in expected} == {"preprocessor_config.json"}


def test_models_that_take_any_size_take_that_of_the_preprocessing():
  source = open_source(str(PEERS / "dinov2"))
  settings = {"image_processor_type": "BitImageProcessor", **CROP}
  processor = {"processor_config.json": {"image_processor": settings}}
  found = huggingface.describe({**source.configs, **processor}, source.tensors)
  assert found.fields["image_size"] == (224, 224)
  assert found.origins["image_size"] == "processor_config.json"


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"image_processor_type": "SamImageProcessor"}, "one of ViT, .*, got Sam"),
    ({"size": 16, "resample": 4}, "resample to be one of .*, got 4"),
    ({"size": {"shortest_edge": 16}}, "with a square crop_size, got .* None"),
    ({"size": 8, "crop_size": 16, "do_center_crop": True}, "crop_size to be one share of size"),
    ({"image_mean": [0.5, 0.5], "size": 16}, "three numbers for image_mean"),
  ],
)
def test_unsupported_preprocessing_is_refused(settings, message):
  source = open_source(str(PEERS / "vit"))
  configs = {**source.configs, "preprocessor_config.json": settings}
  with pytest.raises(UserError, match=message):
    huggingface.describe(configs, source.tensors)


def all_fields(name, **changes):
  """Returns the configuration, the tensors by timm's names, and all fields of a stored model."""
  source = open_source(str(PEERS / name))
  spec = spec_of({"name": name, **huggingface.describe(source.configs, source.tensors).fields})
  fields = {**fields_of(spec, with_defaults=True), **changes}
  return source.configs["config.json"], huggingface.to_timm(source.tensors), fields


def test_gates_and_values_are_joined_in_files():
  config, state, fields = all_fields("dinov2_registers")
  tensors, _ = to_huggingface(state, config, fields)
  parts = [np.asarray(state[f"blocks.0.mlp.fc1_{part}.weight"]) for part in "gx"]
  joined = np.asarray(tensors["encoder.layer.0.mlp.weights_in.weight"])
  np.testing.assert_array_equal(joined, np.concatenate(parts))


# In the memory of that model gates and values are apart.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "dinov2_registers"])
def test_written_back(name):
  config, state, fields = all_fields(name)
  tensors, written = to_huggingface(state, config, fields)
  read = huggingface.describe({"config.json": written}, tensors).fields
  if read["rotary"]:
    fields["rotary"] = {key: fields["rotary"][key] for key in read["rotary"]}
  assert read == {key: fields[key] for key in read}
  again = huggingface.to_timm(tensors)
  assert again.keys() == state.keys()
  for key, tensor in state.items():
    np.testing.assert_array_equal(np.asarray(again[key]), np.asarray(tensor))


@pytest.mark.parametrize("name", ["vit_classifier", "siglip_classifier", "beit_classifier"])
def test_written_back_under_the_same_names(name):
  config, state, fields = all_fields(name)
  tensors, written = to_huggingface(state, config, fields, ("cat", "dog", "ox"))
  before = open_source(str(PEERS / name)).tensors
  assert tensors.keys() == {key for key in before if not key.startswith("vision_model.head.")}
  assert written["architectures"] == config["architectures"]
  assert written["id2label"] == config["id2label"]
  assert written["label2id"] == config["label2id"]


def changed(state, pattern, change):
  """Returns tensors of which those with a name are changed."""
  return {
    key: change(np.asarray(tensor)) if re.fullmatch(pattern, key) else np.asarray(tensor)
    for key, tensor in state.items()
  }


def test_slimmed_equally_and_other_classes():
  config, state, fields = all_fields("vit_classifier", num_classes=5)
  state = changed(state, r"blocks\.\d+\.mlp\.fc1\..*", lambda array: array[:20])
  state = changed(state, r"blocks\.\d+\.mlp\.fc2\.weight", lambda array: array[:, :20])
  state = changed(state, r"head\..*", lambda array: np.resize(array, (5, *array.shape[1:])))
  _, written = to_huggingface(state, config, fields)
  assert written["intermediate_size"] == 20
  assert written["id2label"] == {str(index): f"LABEL_{index}" for index in range(5)}
  assert written["label2id"] == {f"LABEL_{index}": index for index in range(5)}


@pytest.mark.parametrize(
  ("name", "pattern", "change", "changes", "message"),
  [
    ("vit", r"blocks\.1\.mlp\.fc2\.weight", lambda a: a[:, :20], {}, "in each MLP .*, of 20, 24"),
    ("vit", r"blocks\.\d\.attn\.qkv\.weight", lambda a: a[:24], {}, "the width 16 .* of 24 ch"),
    ("dinov2", r"blocks\.\d\.mlp\.fc2\.weight", lambda a: a[:, :20], {}, "a whole mlp_ratio .*20"),
    ("siglip", r"blocks\.\d\.mlp\.fc2\.weight", lambda a: a[:, :20], {}, "of 20, 24"),
    ("clip_projection", r"head\.bias", lambda a: a + 1, {}, "a projection without a bias"),
    (
      "vit",
      "",
      None,
      {"pool": "size_mean"},
      "whose pool is cls, as that of ViTModel is",
    ),
    ("vit", "", None, {"norm_eps": 1e-6}, "whose norm_eps is 0.001"),
    ("clip", "", None, {"image_size": (16, 20)}, "a square image size for CLIP"),
    ("dinov3", "", None, {"rotary": None}, "a rotary embedding of .*, got None"),
  ],
)
def test_what_no_class_holds_is_refused(name, pattern, change, changes, message):
  config, state, fields = all_fields(name, **changes)
  with pytest.raises(UserError, match=message):
    to_huggingface(changed(state, pattern, change), config, fields)


@pytest.mark.parametrize(
  ("name", "added", "message"),
  [
    (
      "vit",
      "blocks.0.select.in_conv.0.weight",
      "that ViTModel has, got blocks.0.select",
    ),
    ("dinov3", "head.weight", "a classifier, which DINOv3ViT has not"),
  ],
)
def test_parameters_that_no_class_has_are_refused(name, added, message):
  config, state, fields = all_fields(name)
  with pytest.raises(UserError, match=message):
    to_huggingface({**state, added: np.zeros((3, 16))}, config, fields)


@pytest.mark.parametrize(
  "changes",
  [
    {"crop_pct": 0.875, "crop_mode": "center", "image_size": (224, 224)},
    {"crop_pct": 224 / 240, "crop_mode": "squash", "image_size": (224, 224)},
    {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
  ],
)
def test_preparation_written_back(changes):
  source = open_source(str(PEERS / "dinov2"))
  _, _, fields = all_fields("dinov2", **changes)
  configs = {**source.configs, "preprocessor_config.json": preparation_of(fields)}
  read = huggingface.describe(configs, source.tensors)
  names = [name for name, origin in read.origins.items() if origin == "preprocessor_config.json"]
  assert len(names) == 6
  assert {name: read.fields[name] for name in names} == {name: fields[name] for name in names}
  with pytest.raises(UserError, match="got crop_mode border"):
    preparation_of({**fields, "crop_mode": "border"})
