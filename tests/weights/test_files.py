"""Reading weights of every kind, and writing them."""

import os
import pathlib
import stat
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights import description, files, formats
from vitcomp_jax.weights.timm import check
from vitcomp_jax.weights.timm_names import to_flax

ERRORS = pathlib.Path(__file__).parents[1] / "golden" / "errors"
STATE = {"head.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "head.bias": np.ones(2)}


def assert_state(got):
  assert got.keys() == STATE.keys()
  for name, array in STATE.items():
    np.testing.assert_array_equal(got[name], array)


def refused(weights, match, **options):
  """The one line that refuses the weights."""
  with pytest.raises(UserError, match=match) as info:
    files.read(str(weights), **options)
  assert "\n" not in str(info.value)
  return str(info.value)


def test_reads_safetensors(tmp_path):
  path = tmp_path / "weights.safetensors"
  safetensors.numpy.save_file(STATE, path)
  assert_state(files.read(str(path)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_float32(tmp_path, dtype):
  path = tmp_path / "weights.safetensors"
  safetensors.numpy.save_file({"w": np.array([0.1, 3.0], dtype), "n": np.arange(2)}, path)
  got = files.read(str(path))
  assert got["w"].dtype == np.float32
  assert got["n"].dtype == np.int64
  np.testing.assert_array_equal(got["w"], np.array([0.1, 3.0], dtype).astype(np.float32))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_half_precision_npz_is_read_as_float32(tmp_path, save):
  arrays = dict(np.load(pathlib.Path(__file__).with_name("augreg_google.npz")))
  half = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
  save(tmp_path / "half.npz", **{name: array.view("V2") for name, array in half.items()})
  np.savez(tmp_path / "single.npz", **{k: v.astype(np.float32) for k, v in half.items()})
  got, want = files.read(str(tmp_path / "half.npz")), files.read(str(tmp_path / "single.npz"))
  assert got.keys() == want.keys()
  for name, array in want.items():
    np.testing.assert_array_equal(got[name], array, strict=True)


def test_incomplete_weights_name_what_is_wrong():
  sound = to_flax(files.read(str(ERRORS / "deit_ok.safetensors")))
  broken = to_flax(files.read(str(ERRORS / "deit_missing_and_wrong_shape.safetensors")))
  check(sound, sound)
  with pytest.raises(UserError) as info:
    check(broken, sound)
  message = str(info.value)
  assert "1 missing: blocks.1.attn.proj.bias (48,)" in message
  assert "blocks.2.mlp.fc1.weight (expected (192, 48), got (191, 48))" in message


def test_truncated_weights():
  path = ERRORS / "deit_truncated.safetensors"
  assert str(path) in refused(path, "cannot be read .*damaged")


@pytest.mark.parametrize("content", [b"x", b"not safetensors at all" * 9, b"\xff" * 64])
def test_damaged_weights(tmp_path, content):
  path = tmp_path / "weights.safetensors"
  path.write_bytes(content)
  refused(path, "cannot be read")


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
def test_empty_file(tmp_path, suffix):
  path = tmp_path / f"weights{suffix}"
  path.touch()
  refused(path, "are an empty file")


def test_no_tensors(tmp_path):
  path = tmp_path / "weights.safetensors"
  safetensors.numpy.save_file({}, path)
  refused(path, "hold no tensors")


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.pth", "gone.npz"])
def test_missing_file(tmp_path, monkeypatch, name):
  refused(tmp_path / name, "are not there")
  monkeypatch.chdir(tmp_path)
  refused(f"weights/{name}", "are not there")


def test_directory(tmp_path):
  refused(tmp_path, "are a directory without weights; expected model.safetensors")


def test_unknown_kind(tmp_path):
  path = tmp_path / "weights.msgpack"
  path.write_bytes(b"1")
  refused(path, "unknown kind; expected the content of a safetensors")
  refused("weights", "weights weights are not there; expected a file, a folder, or a hub id")


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.ckpt", "w.pth.tar", "checkpoint"])
def test_the_content_says_what_a_file_is(tmp_path, name):
  path = tmp_path / name
  safetensors.numpy.save_file(STATE, path, {"grid": "2x3"})
  assert_state(files.read(str(path)))
  assert files.read_metadata(str(path)) == {"grid": "2x3"}
  archive = pathlib.Path(__file__).with_name("augreg_google.npz")
  path.write_bytes(archive.read_bytes())
  assert files.read(str(path)).keys() == files.read(str(archive)).keys()


@pytest.mark.parametrize(
  "prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module.", "model.module._orig_mod."]
)
def test_what_a_wrapper_puts_before_all_names_is_removed(tmp_path, prefix):
  path = tmp_path / "w.safetensors"
  safetensors.numpy.save_file({prefix + name: array for name, array in STATE.items()}, path)
  assert_state(files.read(str(path)))
  assert files.describe(str(path)).shapes == {"head.weight": (2, 3), "head.bias": (2,)}


def test_a_prefix_of_some_names_stays_and_is_named(tmp_path):
  path = tmp_path / "w.safetensors"
  mixed = {"model.head.weight": STATE["head.weight"], "head.bias": STATE["head.bias"]}
  safetensors.numpy.save_file(mixed, path)
  assert files.read(str(path)).keys() == mixed.keys()
  with pytest.raises(UserError, match="1 names would fit without 'model.'"):
    check(to_flax(files.read(str(path))), to_flax(STATE))


def test_weights_describe_themselves(tmp_path):
  path = str(tmp_path / "w.safetensors")
  preprocess = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "crop_pct": 0.9}
  preprocess |= {"crop_mode": "squash", "interpolation": "bilinear", "exif_orientation": True}
  preprocess["pad"] = 2
  metadata = description.metadata("mine", ("cat", "dog"), (8, 12), (2, 3), preprocess)
  files.write(PARAMS, path, metadata)
  found = files.describe(path)
  assert (found.variant, found.num_classes, found.class_names) == ("mine", 2, ("cat", "dog"))
  assert (found.image_size, found.grid) == ((8, 12), (2, 3))
  assert found.preprocess == preprocess
  files.write(PARAMS, path, metadata | {description.KEY: "{}"})
  with pytest.raises(UserError, match="expected metadata as this library writes it"):
    files.describe(path)
  for name, wrong in (("mean", (0.1, 0.2)), ("std", None), ("crop_pct", "1"), ("pad", 0.5)):
    damaged = description.metadata("mine", (), (8, 12), (2, 3), preprocess | {name: wrong})
    files.write(PARAMS, path, damaged)
    with pytest.raises(UserError, match="expected metadata as this library writes it"):
      files.describe(path)
  three = description.metadata("mine", ("cat", "dog", "eel"), (8, 12), (2, 3), preprocess)
  files.write(PARAMS, path, three)
  with pytest.raises(UserError, match="expected names of their 2 classes, got 3"):
    files.describe(path)


def test_weights_of_others_say_their_shapes():
  found = files.describe(str(pathlib.Path(__file__).with_name("augreg_google.npz")))
  assert found.num_classes == found.shapes["head.weight"][0] > 0
  assert (found.variant, found.class_names, found.grid) == (None, (), None)


def test_pytorch_file_without_pytorch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
  path = tmp_path / "weights.pth"
  path.write_bytes(b"\x80\x02")
  refused(path, "pip install torch")


PARAMS = to_flax(STATE)


def test_written_weights_are_read_back(tmp_path):
  path = str(tmp_path / "new" / "folder" / "weights.safetensors")
  files.write(PARAMS, path, {"grid": "14x14"})
  assert_state(files.read(path))
  assert files.read_metadata(path) == {"grid": "14x14"}


def test_weights_without_metadata(tmp_path):
  path = str(tmp_path / "weights.safetensors")
  files.write(PARAMS, path)
  assert files.read_metadata(path) == {}
  assert files.read_metadata(str(pathlib.Path(__file__).with_name("augreg_google.npz"))) == {}


def test_writes_jax_arrays(tmp_path):
  path = str(tmp_path / "weights.safetensors")
  files.write({"w": {"kernel": jnp.ones((2, 3), jnp.bfloat16), "gain": jnp.ones(())}}, path)
  got = files.read(path)
  assert got["w.weight"].shape == (3, 2)
  assert got["w.gain"].shape == ()


def test_write_leaves_nothing_else_behind(tmp_path):
  path = tmp_path / "weights.safetensors"
  files.write(PARAMS, str(path))
  files.write(PARAMS, str(path))
  assert list(tmp_path.iterdir()) == [path]
  assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()


def _umask():
  mask = os.umask(0)
  os.umask(mask)
  return mask


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "weights.safetensors"
  files.write(PARAMS, str(path))

  def fail(tensors, unfinished, metadata):
    pathlib.Path(unfinished).write_bytes(b"half")
    raise OSError("no space left")

  monkeypatch.setattr(safetensors.numpy, "save_file", fail)
  with pytest.raises(UserError, match=r"cannot be written to .*no space left"):
    files.write(to_flax({"other": np.ones(3)}), str(path))
  assert list(tmp_path.iterdir()) == [path]
  assert_state(files.read(str(path)))


def test_metadata_of_damaged_weights():
  with pytest.raises(UserError, match="cannot be read"):
    files.read_metadata(str(ERRORS / "deit_truncated.safetensors"))
