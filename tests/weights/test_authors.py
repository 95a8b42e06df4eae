"""Tiny models made by OpenCLIP, by timm's Eva and Beit, and under their authors' names."""

import json
import pathlib

import numpy as np
import pytest

from tests.models import forward
from vitcomp_jax.errors import UserError
from vitcomp_jax.weights import training_checkpoints
from vitcomp_jax.weights.dialects import authors, open_clip, timm_eva
from vitcomp_jax.weights.dialects.open_clip_configs import fields_from_config
from vitcomp_jax.weights.files import open_source
from vitcomp_jax.weights.loading import load_params, spec_for

PEERS = pathlib.Path(__file__).parent / "peers"
NAMES = sorted(
  f"{library}/{path.parent.name}"
  for library in ("open_clip", "timm", "authors")
  for path in (PEERS / library).glob("*/expected.npz")
)


def read(name):
  """Returns the spec and parameters of a stored model, told by its folder."""
  file, told = PEERS / name / "fields.json", {}
  if file.exists():
    told = _tuples(json.loads(file.read_text()))
  weights = str(PEERS / name / "model.safetensors")
  spec = spec_for(None, weights, given=told)
  return spec, load_params(spec, spec.dense_layers, weights)


def _tuples(value):
  """Returns JSON with tuples in place of lists, as fields of specs have them."""
  if isinstance(value, dict):
    return {key: _tuples(part) for key, part in value.items()}
  return tuple(value) if isinstance(value, list) else value


def difference(got, want):
  return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_the_peer(name):
  spec, params = read(name)
  expected = np.load(PEERS / name / "expected.npz")
  images = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
  output = forward(spec, spec.dense_layers, {"params": params}, images)
  assert difference(output.tokens.x, expected["tokens"]) < 2e-6
  assert difference(output.logits, expected["logits"]) < 2e-6


def little(*shapes):
  """Returns tensors of ones by name."""
  return {name: np.ones(shape, np.float32) for name, shape in shapes}


TOWER = (("visual.conv1.weight", (4, 3, 2, 2)), ("visual.ln_post.weight", (4,)))


@pytest.mark.parametrize(
  ("extra", "message"),
  [
    ("visual.attn_pool.query", r"attentional pooling \(CoCa\) \(attn_pool\.query\)"),
    ("visual.layer1.0.conv1.weight", "a ResNet as image tower"),
    ("visual.transformer.resblocks.0.attn.head_scale", "a scale for each head"),
    ("visual.transformer.resblocks.0.ln_attn.weight", "a norm behind attention"),
  ],
)
def test_open_clip_refuses_parts_by_name(extra, message):
  tensors = little(*TOWER, (extra, (4,)))
  assert open_clip.recognises(tensors.keys())
  with pytest.raises(UserError, match=message):
    open_clip.to_timm(tensors)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"attentional_pool": True}, "attentional_pool: expected False, got True"),
    ({"pool_type": "none"}, "pool_type: expected 'tok' or 'avg', got 'none'"),
    ({"layers": [3, 4, 6, 3]}, r"layers: expected a number, got \[3, 4, 6, 3\], a ResNet's"),
    ({"norm_kwargs": {"bias": False}}, r"norm_kwargs: expected eps and nothing else, got .*bias"),
    ({"act_kwargs": {"approximate": "some"}}, "act_kwargs.approximate: expected .*, got 'some'"),
    ({"timm_model_name": "x", "timm_proj": "mlp"}, "timm_proj: expected .*, got 'mlp'"),
  ],
)
def test_open_clip_refuses_values_by_name(change, message):
  config = {"model_cfg": {"embed_dim": 4, "vision_cfg": {"width": 4, **change}}}
  with pytest.raises(UserError, match=message):
    fields_from_config(config)


def test_open_clip_refuses_a_config_without_a_tower():
  with pytest.raises(UserError, match="expected model_cfg with vision_cfg in it, got some"):
    fields_from_config({"some": 1})


def test_open_clip_config_sets_the_activation():
  def activation(quick_gelu, **act_kwargs):
    model = {"embed_dim": 4, "quick_gelu": quick_gelu, "vision_cfg": {"act_kwargs": act_kwargs}}
    return fields_from_config({"model_cfg": model})["activation"]

  assert activation(False) == "gelu"
  assert activation(False, approximate="tanh") == "gelu_tanh"
  assert activation(True) == "quick_gelu"


def test_open_clip_names():
  names = open_clip.names()
  wanted = {"patch_size": 32, "width": 768, "depth": 12, "num_heads": 12, "activation": "gelu"}
  assert wanted.items() <= names["ViT-B-32"].items()
  assert names["ViT-B/32"]["activation"] == "quick_gelu"
  assert names["ViT-B/32"] == names["ViT-B-32-quickgelu"]
  assert names["ViT-H-14"]["num_heads"] == 16
  assert "mean" not in names["ViT-L-14"], "its weights differ in what they were trained with"
  assert names["ViT-B-16-SigLIP"]["name"] == "vit_base_patch16_siglip_224"
  assert names["ViT-L-14-CLIPA"]["fc_norm"]


def test_what_the_open_clip_tower_says_comes_first():
  source = open_source(str(PEERS / "open_clip/clipa" / "model.safetensors"))
  said = open_clip.describe(source.configs, source.tensors)
  assert said.origins["norm_eps"] == "open_clip_config.json"
  assert said.origins["in_chans"] == "tensors"
  assert said.fields["mean"] == (0.5, 0.4, 0.3)


def test_openai_program_has_quick_gelu():
  source = open_source(str(PEERS / "open_clip/no_config" / "model.safetensors"))
  assert "activation" not in open_clip.describe({}, source.tensors).fields
  said = open_clip.describe({}, {**source.tensors, **little(("input_resolution", ()))})
  assert said.fields["activation"] == "quick_gelu"
  assert said.fields["image_size"] == (16, 16)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("timm/")])
def test_back_to_the_names_of_timm_is_exact(name):
  tensors = open_source(str(PEERS / name / "model.safetensors")).tensors
  fused = "blocks.0.attn.qkv.weight" in tensors
  back = timm_eva.to_timm_eva(timm_eva.to_timm(tensors), fused)
  assert back.keys() == tensors.keys()
  for key in tensors:
    np.testing.assert_array_equal(back[key], tensors[key], err_msg=key)


def test_shared_keys_are_refused():
  attn = "blocks.0.attn."
  tensors = little((f"{attn}q_proj.weight", (4, 4)), (f"{attn}k_proj.weight", (2, 4)))
  with pytest.raises(UserError, match=r"as many keys and values .* share keys is not supported"):
    timm_eva.to_timm(tensors | little((f"{attn}v_proj.weight", (2, 4))))


def test_incomplete_attention_is_left_to_the_final_check():
  tensors = little(("blocks.0.attn.q_proj.weight", (4, 4)))
  assert timm_eva.to_timm(tensors).keys() == tensors.keys()


def shapes_only(path, width):
  """Returns a stored model's tensors at another width, without memory for their values."""
  tensors = open_source(str(PEERS / path / "model.safetensors")).tensors
  return {
    name: np.broadcast_to(np.float32(1), [width if side == 16 else side for side in tensor.shape])
    for name, tensor in tensors.items()
  }


@pytest.mark.parametrize(
  ("name", "heads"),
  [
    ("dino", {192: 3, 384: 6, 768: 12}),
    ("moco_v3", {384: 12, 768: 12}),
    ("mae", {768: 12, 1024: 16, 1280: 16}),
    ("dinov2", {384: 6, 768: 12, 1024: 16, 1536: 24}),
    ("dinov2_registers", {384: 6, 768: 12, 1024: 16, 1536: 24}),
    ("perception_core", {192: 3, 384: 6, 768: 12, 1024: 16, 1536: 16}),
  ],
)
def test_heads_are_known_for_the_authors_widths_alone(name, heads):
  for width, count in heads.items():
    assert authors.describe({}, shapes_only(f"authors/{name}", width)).fields["num_heads"] == count
  assert "num_heads" not in authors.describe({}, shapes_only(f"authors/{name}", 640)).fields


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("authors/")])
def test_authors_are_told_by_their_names_and_others_are_not(name):
  tensors = open_source(str(PEERS / name / "model.safetensors")).tensors
  assert authors.recognises(tensors.keys()) and not open_clip.recognises(tensors.keys())
  assert not authors.recognises(authors.to_timm(tensors).keys()), "timm's names say nothing"
  assert not authors.recognises([f"other.{key}" for key in tensors])


def test_describing_reads_no_layer():
  class Unread:
    def __init__(self, tensor):
      self.shape, self.ndim, self.dtype = tensor.shape, len(tensor.shape), tensor.dtype

  tensors = open_source(str(PEERS / "authors/eva02/model.safetensors")).tensors
  assert authors.describe({}, {name: Unread(t) for name, t in tensors.items()}).fields


def test_teacher_of_dino_is_read_by_dino(caplog):
  tensors = open_source(str(PEERS / "authors/dino/model.safetensors")).tensors
  names = [f"{part}.{name}" for part in ("student", "teacher") for name in tensors]
  found = training_checkpoints.model_names(names, "w")
  assert found == {name: f"teacher.{name}" for name in tensors}
  caplog.set_level("INFO")
  authors.to_timm({name: tensors[name] for name in found})
  assert "left out what the model does not use: head.last_layer.weight_g" in caplog.text


def test_base_encoder_of_moco_is_read_by_moco():
  tensors = open_source(str(PEERS / "authors/moco_v3/model.safetensors")).tensors
  found = training_checkpoints.model_names([f"module.{name}" for name in tensors], "w")
  assert found == {name: f"module.{name}" for name in tensors}


def test_moco_refuses_a_convolutional_stem():
  names = ("base_encoder.cls_token", "momentum_encoder.cls_token")
  tensors = little(*((name, (1, 1, 4)) for name in names))
  tensors |= little(("base_encoder.patch_embed.proj.0.weight", (4, 3, 3, 3)))
  with pytest.raises(UserError, match=r"convolutional stem \(patch_embed\.proj\.0\.weight\)"):
    authors.to_timm(tensors)


def test_dinov2_refuses_a_head_of_several_layers():
  tensors = shapes_only("authors/dinov2_linear", 16)
  tensors |= little(("linear_head.weight", (5, 80)))
  with pytest.raises(UserError, match="of the last layer, 32 features, got 80 features"):
    authors.to_timm(tensors)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dinov3_periods_tell_temperature_and_heads(dtype):
  tensors = dict(open_source(str(PEERS / "authors/dinov3/model.safetensors")).tensors)
  for temperature in (100.0, 1000.0):
    periods = temperature ** (np.arange(8) / 8)
    tensors["rope_embed.periods"] = periods.astype(dtype)
    fields = authors.describe({}, tensors).fields
    assert fields["rotary"] == {"kind": "centred", "temperature": temperature, "halves": True}
    assert fields["num_heads"] == 1


def test_pretraining_of_eva_and_beit_is_left_out():
  tensors = dict(open_source(str(PEERS / "timm/eva_fused/model.safetensors")).tensors)
  kept = set(tensors)
  tensors |= little(("mask_token", (1, 1, 16)), ("lm_head.weight", (8, 16)), ("lm_head.bias", (8,)))
  assert authors.to_timm(tensors).keys() == kept
  assert "activation" not in authors.describe({}, tensors).fields


def test_open_clip_tower_alone():
  tensors = open_source(str(PEERS / "open_clip/quickgelu/model.safetensors")).tensors
  tower = {
    name.removeprefix("visual."): tensor
    for name, tensor in tensors.items()
    if name.startswith("visual.")
  }
  whole, alone = open_clip.to_timm(tensors), open_clip.to_timm(tower)
  assert open_clip.recognises(tower.keys()) and whole.keys() == alone.keys()
  for name, tensor in whole.items():
    np.testing.assert_array_equal(tensor, alone[name])


def test_checkpoint_of_i_jepa(tmp_path):
  torch = pytest.importorskip("torch", reason="not run: only PyTorch reads such files")
  stored = open_source(str(PEERS / "authors/i_jepa/model.safetensors")).tensors
  state = {
    name.removeprefix("target_encoder."): torch.tensor(np.array(tensor))
    for name, tensor in stored.items()
  }
  parts = dict.fromkeys(("encoder", "predictor", "target_encoder"), state)
  torch.save({**parts, "epoch": 3}, tmp_path / "jepa.pth.tar")
  found = open_source(str(tmp_path / "jepa.pth.tar")).tensors
  assert found.keys() == stored.keys()
  assert authors.recognises(found.keys())
