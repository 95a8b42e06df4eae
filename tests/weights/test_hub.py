"""Weights of the hub: those in its cache first, and exactly what is needed from the network."""

import json
import pathlib
import types

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.numpy

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights import files, hub

HUB_ID = "timm/deit_small_patch16_224.fb_in1k"
COMMIT = "0123456789" * 4
STATE = {"head.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "head.bias": np.ones(2)}


def assert_state(source):
  assert source.tensors.keys() == STATE.keys()
  for name, array in STATE.items():
    np.testing.assert_array_equal(source.tensors[name], array)


def refused(weights, match, **options):
  with pytest.raises(UserError, match=match) as info:
    files.open_source(weights, **options)
  assert "\n" not in str(info.value)
  return str(info.value)


def make_snapshot(root, revision="main", commit=COMMIT, hub_id=HUB_ID):
  """Makes the layout in which the hub's client keeps what it fetched; returns the empty folder."""
  repo = root / f"models--{hub_id.replace('/', '--')}"
  snapshot = repo / "snapshots" / commit
  snapshot.mkdir(parents=True, exist_ok=True)
  (repo / "refs").mkdir(exist_ok=True)
  (repo / "refs" / revision).write_text(commit)
  return snapshot


def make_hub_cache(root, hub_id=HUB_ID):
  """Makes a cache that has the weights, and nothing else."""
  snapshot = make_snapshot(root, hub_id=hub_id)
  safetensors.numpy.save_file(STATE, snapshot / "model.safetensors", {"grid": "2x3"})
  return snapshot


def write_shards(folder):
  """Writes two shards with their index, and returns the names of all files."""
  places = {}
  for number, (name, array) in enumerate(STATE.items(), start=1):
    places[name] = f"model-0000{number}-of-00002.safetensors"
    safetensors.numpy.save_file({name: array}, folder / places[name])
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
  return ["model.safetensors.index.json", *places.values()]


@pytest.fixture
def offline(monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("prefix", ["", hub.PREFIX])
def test_cached_weights_need_no_network(tmp_path, offline, prefix):
  snapshot = make_hub_cache(tmp_path)
  found = files.open_source(prefix + HUB_ID, cache_dir=str(tmp_path))
  assert_state(found)
  assert (found.name, found.metadata, found.configs) == (prefix + HUB_ID, {"grid": "2x3"}, {})
  (snapshot / "config.json").write_text('{"architecture": "deit_small_patch16_224"}')
  found = files.open_source(prefix + HUB_ID, cache_dir=str(tmp_path))
  assert found.configs == {"config.json": {"architecture": "deit_small_patch16_224"}}


def test_usual_cache(tmp_path, offline, monkeypatch):
  safetensors.numpy.save_file(STATE, make_snapshot(tmp_path) / "open_clip_model.safetensors")
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  assert_state(files.open_source(HUB_ID))


def test_revisions(tmp_path, offline):
  old = make_snapshot(tmp_path, "v1.0", "1" * 40)
  safetensors.numpy.save_file({"w": np.ones(2)}, old / "model.safetensors")
  make_hub_cache(tmp_path)
  assert_state(files.open_source(f"{HUB_ID}@main", cache_dir=str(tmp_path)))
  assert_state(files.open_source(f"{HUB_ID}@{COMMIT}", cache_dir=str(tmp_path)))
  for revision in ("v1.0", "1" * 40):
    found = files.open_source(f"hf-hub:{HUB_ID}@{revision}", cache_dir=str(tmp_path))
    assert found.tensors.keys() == {"w"}


@pytest.fixture
def network(tmp_path, monkeypatch):
  """Stands in for the hub's client: downloads come from a folder, and are listed."""
  remote = tmp_path / "remote"
  remote.mkdir()
  fetched = []

  def model_info(client, repo, revision):
    assert repo == HUB_ID
    names = [path.relative_to(remote).as_posix() for path in remote.rglob("*") if path.is_file()]
    return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=n) for n in names])

  def download(repo, name, revision, cache_dir):
    fetched.append(name)
    path = make_snapshot(pathlib.Path(cache_dir)) / name
    path.write_bytes((remote / name).read_bytes())
    return str(path)

  monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  return remote, fetched


def test_what_is_not_cached_is_fetched_once(tmp_path, network):
  remote, fetched = network
  safetensors.numpy.save_file(STATE, remote / "model.safetensors")
  (remote / "config.json").write_text("{}")
  for name in ("pytorch_model.bin", "README.md", "flax_model.msgpack"):
    (remote / name).touch()
  (remote / "onnx").mkdir()
  (remote / "onnx" / "model.bin").touch()
  for _ in range(2):
    found = files.open_source(HUB_ID, cache_dir=str(tmp_path / "cache"))
    assert_state(found)
    assert found.configs == {"config.json": {}}
  assert fetched == ["model.safetensors", "config.json"]


def test_all_shards_are_fetched(tmp_path, network):
  remote, fetched = network
  names = write_shards(remote)
  snapshot = make_snapshot(tmp_path / "cache")
  for name in names[:2]:  # an earlier download was interrupted
    (snapshot / name).write_bytes((remote / name).read_bytes())
  assert_state(files.open_source(HUB_ID, cache_dir=str(tmp_path / "cache")))
  assert fetched == names


def test_weights_that_cannot_be_had(tmp_path, offline):
  told = refused(HUB_ID, f"weights {HUB_ID}: none of model.safetensors,", cache_dir=str(tmp_path))
  assert f"local hub cache {tmp_path}, and they could not be fetched" in told
  assert told.endswith("check the id and the network, or give a file or a folder.")
  refused("hf-hub:not an id", "not an id: ", cache_dir=str(tmp_path))
  # What says what the weights are, without the weights.
  (make_snapshot(tmp_path) / "config.json").write_text("{}")
  refused(HUB_ID, "could not be fetched", cache_dir=str(tmp_path))


def test_a_repository_without_weights(tmp_path, network):
  (network[0] / "README.md").touch()
  refused(HUB_ID, r"fetched \(the repository has no weights\)", cache_dir=str(tmp_path / "cache"))
  for name in ("a.pth", "b.pth"):
    (network[0] / name).touch()
  refused(HUB_ID, r"expected .* got a\.pth, b\.pth;", cache_dir=str(tmp_path / "cache"))


def test_existing_file_goes_before_hub_id(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "timm").mkdir()
  (tmp_path / "timm" / "weights").write_bytes(b"1")
  refused("timm/weights", "unknown kind")
  (tmp_path / "timm" / "folder").mkdir()
  refused("timm/folder", "are a directory without weights")


def test_what_is_an_id():
  ids = ("google/vit-base-patch16-224", "a/b@v1.0", "a/b@refs/pr/3", "hf-hub:timm/x.y", "a/b.c_1")
  assert all(map(hub.is_id, ids))
  paths = ("vit-base-patch16-224", "weights/model.pth", "a/b/c", "./a/b", "a b/c", "/a/b", "~/a")
  assert not any(map(hub.is_id, paths))
