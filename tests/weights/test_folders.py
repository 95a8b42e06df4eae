"""Folders of weights, as the usual libraries write them."""

import json

import numpy as np
import pytest
import safetensors.numpy

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights import files, folders

STATE = {"head.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "head.bias": np.ones(2)}


def write(path, state=None):
  """Writes the content of a safetensors file, which is read under any name."""
  safetensors.numpy.save_file(STATE if state is None else state, path, {"format": "pt"})
  return path


def refused(weights, match):
  with pytest.raises(UserError, match=match) as info:
    files.open_source(str(weights))
  assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", [n for n in folders.WEIGHTS if not n.endswith(folders.INDEX)])
def test_known_files_go_before_others(tmp_path, name, caplog):
  caplog.set_level("INFO")
  write(tmp_path / name)
  for other in ("other.safetensors", "notes.txt", "optimizer.pt"):
    write(tmp_path / other, {"w": np.ones(2)})
  found = files.open_source(str(tmp_path))
  assert (found.path, found.tensors.keys()) == (tmp_path / name, STATE.keys())
  assert not caplog.text


def test_the_first_of_several_known_files_is_read_and_told(tmp_path, caplog):
  caplog.set_level("INFO")
  write(tmp_path / "model.safetensors")
  write(tmp_path / "pytorch_model.bin", {"w": np.ones(2)})
  assert files.open_source(str(tmp_path)).tensors.keys() == STATE.keys()
  assert "read model.safetensors, not pytorch_model.bin" in caplog.text


def test_a_folder_of_a_trainer_has_one_file_of_weights(tmp_path):
  path = write(tmp_path / "best.pth.tar")
  for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt"):
    write(tmp_path / name, {"w": np.ones(2)})
  write(tmp_path / "training_args.bin", {"w": np.ones(2)})
  (tmp_path / "trainer_state.json").write_text("{}")
  assert files.open_source(str(tmp_path)).path == path
  write(tmp_path / "last.pth.tar")
  refused(tmp_path, r"expected model.safetensors .* got best\.pth\.tar, last\.pth\.tar; give the")


def test_configs_beside_a_file_come_along(tmp_path):
  path = write(tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text('{"model_type": "vit"}')
  (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 8}}')
  (tmp_path / "tokenizer.json").write_text("not read")
  for weights in (path, tmp_path):
    found = files.open_source(str(weights))
    assert found.configs == {
      "config.json": {"model_type": "vit"},
      "preprocessor_config.json": {"size": {"height": 8}},
    }
    assert (found.name, found.metadata) == (str(weights), {"format": "pt"})


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_damaged_config(tmp_path, text):
  write(tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
  refused(tmp_path, r"config\.json.*; fetch or write it again")


@pytest.fixture
def shards(tmp_path):
  """Writes two shards and their index; returns the index, and where each tensor is."""
  places = {}
  for number, (name, array) in enumerate(STATE.items(), start=1):
    places[name] = f"model-0000{number}-of-00002.safetensors"
    write(tmp_path / places[name], {name: array})
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": places}))
  return index, places


def test_shards_are_read_together(shards):
  index, _ = shards
  for weights in (index, index.parent):
    found = files.open_source(str(weights))
    assert found.metadata == {"format": "pt"}
    assert found.tensors.keys() == STATE.keys()
    for name, array in STATE.items():
      np.testing.assert_array_equal(found.tensors[name], array)


def test_a_missing_shard_is_named(shards):
  index, places = shards
  (index.parent / places["head.bias"]).unlink()
  refused(index.parent, r"the shard model-00002-of-00002\.safetensors is not there")


def test_a_shard_without_its_tensor(shards):
  index, places = shards
  index.write_text(json.dumps({"weight_map": places | {"w": places["head.bias"]}}))
  refused(index, "expected w in model-00002-of-00002.safetensors, got a file without it")


@pytest.mark.parametrize("content", [{}, {"weight_map": ["a"]}, {"weight_map": {"w": 1}}])
def test_damaged_index(shards, content):
  index, _ = shards
  index.write_text(json.dumps(content))
  refused(index, "expected the names of shards under weight_map")


def test_one_shard_is_not_the_model(shards):
  index, places = shards
  refused(index.with_name(places["head.bias"]), "one of several shards; give the folder")


def test_the_only_shard_is_the_model(tmp_path):
  path = write(tmp_path / "model-00001-of-00001.safetensors")
  assert files.open_source(str(tmp_path)).path == path
