"""Which of the tensors that training stores are the model's."""

import numpy as np
import pytest

from vitcomp_jax.weights import training_checkpoints

NAMES = ["patch_embed.proj.weight", "blocks.0.norm1.weight", "head.weight"]


def with_prefix(prefix, names=NAMES):
  return [prefix + name for name in names]


def assert_found(names, prefix):
  """The model's names are found below a prefix."""
  assert training_checkpoints.model_names(names, "w") == {name: prefix + name for name in NAMES}


@pytest.mark.parametrize(
  "prefix", [*training_checkpoints.PREFIXES, "model._orig_mod.module.", "net.vit."]
)
def test_prefix_of_all_names(prefix, caplog):
  caplog.set_level("INFO")
  if prefix == "net.vit.":  # not a wrapper's: libraries have names of their own
    assert training_checkpoints.model_names(with_prefix(prefix), "w").keys() == set(
      with_prefix("vit.")
    )
  else:
    assert_found(with_prefix(prefix), prefix)
  assert not caplog.text


@pytest.mark.parametrize(
  "others",
  [
    ["criterion.weight", "loss_fn.pos_weight", "train_acc.tp", "val_metrics.f1.total"],
    ["n_averaged"],
    ["queue", "queue_ptr", "projector.0.weight", "predictor.3.bias"],
    ["dino_head.mlp.0.weight", "ibot_head.last_layer.weight", "head.mlp.2.bias"],
  ],
)
def test_what_is_no_models_is_left_out_and_told(others, caplog):
  caplog.set_level("INFO")
  assert_found([*with_prefix("model."), *others], "model.")
  assert f"read what is under model., not {', '.join(sorted(others))}" in caplog.text


@pytest.mark.parametrize(
  "others",
  [["classifier.weight"], ["head.1.weight"], ["decoder.norm.weight"], with_prefix("student.")],
)
def test_what_may_be_the_models_keeps_all_names(others):
  names = [*with_prefix("model."), *others]
  assert training_checkpoints.model_names(names, "w") == {name: name for name in names}


@pytest.mark.parametrize(
  ("averaged", "plain"),
  [("teacher.", "student."), ("ema.", "model."), ("ema.module.", "model."), ("model_ema.", "net.")],
)
def test_averaged_twin_goes_first(averaged, plain, caplog):
  caplog.set_level("INFO")
  assert_found([*with_prefix(plain), *with_prefix(averaged), "loss.center"], averaged)
  assert f"not loss.center, {plain}blocks.0.norm1.weight" in caplog.text


def test_self_supervised_checkpoints():
  dino = [*with_prefix("teacher.backbone."), "teacher.dino_head.mlp.0.weight"]
  dino += [name.replace("teacher", "student") for name in dino]
  assert_found(dino, "teacher.backbone.")
  backbone = [name for name in NAMES if name != "head.weight"]
  moco = []
  for encoder in ("base_encoder", "momentum_encoder"):
    moco += with_prefix(f"module.{encoder}.", [*backbone, "head.0.weight", "head.1.running_mean"])
  moco.append("module.predictor.0.weight")
  prefix = "module.base_encoder."
  assert training_checkpoints.model_names(moco, "w") == {name: prefix + name for name in backbone}


def test_names_of_libraries_stay():
  for names in (
    ["vit.embeddings.cls_token", "vit.encoder.layer.0.weight", "classifier.weight"],
    ["embeddings.cls_token", "encoder.layer.0.weight", "layernorm.weight"],
    ["class_token", "conv_proj.weight", "encoder.pos_embedding", "heads.head.weight"],
    ["vision_model.embeddings.class_embedding", "vision_model.head.probe"],
    ["visual.conv1.weight", "transformer.resblocks.0.ln_1.weight", "logit_scale"],
  ):
    assert training_checkpoints.model_names(names, "w") == {name: name for name in names}


@pytest.mark.parametrize("key", training_checkpoints.NESTED)
def test_weights_below_a_key(key, caplog):
  caplog.set_level("INFO")
  state = {"w": np.ones(2)}
  assert training_checkpoints.in_effect({key: state, "epoch": 3}, "f.pth") is state
  assert f"weights f.pth: read what is under {key}, not epoch" in caplog.text


def test_key_of_i_jepa_stays_before_names():
  state = {"w": np.ones(2)}
  checkpoint = {"encoder": state, "predictor": state, "target_encoder": state}
  assert training_checkpoints.in_effect(checkpoint, "f.pth") == {"target_encoder.w": state["w"]}


def test_keys_without_weights_are_passed_over():
  state = {"w": np.ones(2)}
  checkpoint = {"model_ema": None, "ema": {"decay": 0.9}, "teacher": {}, "model": {"module": state}}
  assert training_checkpoints.in_effect(checkpoint, "f.pth") is state
  assert training_checkpoints.in_effect(state, "f.pth") is state
  assert training_checkpoints.in_effect([1], "f.pth") == {}
