"""PyTorch's files, made by PyTorch itself."""

import argparse
import os
import pathlib
import sys
import zipfile

import numpy as np
import pytest

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights import files, tensors, torch_files, training_checkpoints

torch = pytest.importorskip("torch", reason="PyTorch is not installed: its files were not read")
STATE = {
  "head.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
  "head.bias": torch.ones(2),
}


@pytest.fixture
def save(tmp_path):
  """Writes what a checkpoint holds, and returns the path."""

  def write(checkpoint, suffix=".pth", **options):
    path = str(tmp_path / f"weights{suffix}")
    torch.save(checkpoint, path, **options)
    return path

  return write


def assert_state(got, state=None):
  state = STATE if state is None else state
  assert got.keys() == state.keys()
  for name, tensor in state.items():
    np.testing.assert_array_equal(got[name], tensor.numpy(), strict=True)


def refused(path, match):
  with pytest.raises(UserError, match=match) as info:
    files.open_source(path)
  assert "\n" not in str(info.value)


@pytest.mark.parametrize("suffix", torch_files.SUFFIXES)
@pytest.mark.parametrize(
  "keys", [(), *[(key,) for key in training_checkpoints.NESTED], ("model", "state_dict")]
)
def test_reads_pytorch_files(save, keys, suffix):
  checkpoint = STATE
  for key in reversed(keys):
    checkpoint = {key: checkpoint, "epoch": 3}
  assert_state(files.read(save(checkpoint, suffix)))


def test_reads_files_older_than_zip(save):
  assert_state(files.read(save(STATE, _use_new_zipfile_serialization=False)))


@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("plain", ["state_dict", "model"])
def test_averaged_weights_go_first_and_the_log_says_so(save, averaged, plain, caplog):
  caplog.set_level("INFO")
  others = {name: tensor + 1 for name, tensor in STATE.items()}
  assert_state(files.read(save({plain: others, averaged: STATE, "optimizer": {}})))
  assert f"read what is under {averaged}, not {plain}, optimizer" in caplog.text


def test_text_beside_the_weights_is_kept(save):
  state = {"state_dict": STATE, "arch": "vit_tiny_patch16_224", "epoch": 3}
  assert files.open_source(save(state)).metadata == {"arch": "vit_tiny_patch16_224"}
  assert files.open_source(save(STATE)).metadata == {}


def test_what_is_no_tensor_is_left_out_and_named(save, caplog):
  caplog.set_level("INFO")
  assert_state(files.read(save(STATE | {"epoch": 3, "args": argparse.Namespace(lr=0.1)})))
  assert "left out what is no tensor: epoch, args" in caplog.text
  refused(save({"weights": STATE, "step": 3}), "got weights, step; convert")


def test_harmless_objects_beside_the_weights(save, caplog):
  caplog.set_level("INFO")
  args = argparse.Namespace(data=pathlib.Path("images"), lr=np.float32(0.1), steps=np.int64(3))
  checkpoint = {"args": args, "best": np.float64(0.8), "mean": np.ones(3), "state_dict": STATE}
  assert_state(files.read(save(checkpoint)))
  assert "read what is under state_dict, not args, best, mean" in caplog.text


def test_parameters_and_views_are_read_as_they_are(save):
  weight = torch.arange(12.0).reshape(3, 4)
  state = {"w": torch.nn.Parameter(weight), "t": weight.T, "part": weight[1:, ::2]}
  got = files.read(save(state))
  assert_state(got, {name: tensor.detach() for name, tensor in state.items()})


def test_tensors_are_read_from_the_file_alone(save):
  tied = torch.arange(5.0)
  state = {
    "w": torch.rand(3, 4),
    "half": torch.rand(7).bfloat16(),
    "count": torch.tensor(3),
    "tied": tied,
    "part": tied[2:],
    "twin": tied,
    "empty": torch.ones(0, 3),
    "more": torch.rand(3, 4),
  }
  averaged = {name: tensor + 1 for name, tensor in state.items()}
  for states in ({"model": state}, {"state_dict": state, "state_dict_ema": averaged}):
    path = save(states | {"optimizer": [torch.rand(3, 4)]})
    want = list(states.values())[-1]
    found = files.open_source(path, widen=False).tensors
    assert {k for k, t in found.items() if not isinstance(t, tensors.Stored)} == {"empty"}
    assert_state(files.read(path), {k: t.float() if k == "half" else t for k, t in want.items()})


def test_bytes_in_the_other_order(save, tmp_path):
  with zipfile.ZipFile(save(STATE)) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  swapped = str(tmp_path / "swapped.pth")
  with zipfile.ZipFile(swapped, "w") as archive:
    for name, content in members.items():
      if name.endswith("/byteorder"):
        content = b"big" if sys.byteorder == "little" else b"little"
      elif "/data/" in name:
        content = np.frombuffer(content, np.float32).byteswap().tobytes()
      archive.writestr(name, content)
  assert_state(files.read(swapped))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_tensors_that_numpy_cannot_hold(save):
  quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
  refused(save({"w": quantized}), "expected dense tensors .*qint8")
  refused(save({"w": torch.eye(2).to_sparse()}), "expected dense tensors .*w is sparse_coo")
  refused(save({0: torch.ones(2)}), "expected tensors by name")


def test_half_precision(save):
  state = {"w": torch.tensor([0.1, 3.0]).bfloat16(), "v": torch.tensor([0.1, 3.0]).half()}
  path = save(state | {"n": torch.arange(2)})
  assert_state(files.read(path), {k: v.float() for k, v in state.items()} | {"n": torch.arange(2)})
  got = files.read(path, widen=False)
  assert (str(got["w"].dtype), str(got["v"].dtype)) == ("bfloat16", "float16")
  np.testing.assert_array_equal(got["w"].astype(np.float32), state["w"].float().numpy())


@pytest.mark.parametrize("checkpoint", [[1, 2], {"epoch": 3}, {"model": {"step": 1}}])
def test_file_without_weights(save, checkpoint):
  refused(save(checkpoint), "expected tensors by name")


def test_damaged_file(save):
  path = pathlib.Path(save(STATE))
  path.write_bytes(path.read_bytes()[:-100])
  refused(str(path), "cannot be read .*damaged")


class Evil:
  """Its pickle runs a command when it is loaded as pickles are."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f"touch {self.path}",)


def test_code_in_a_pickle_is_never_run(save, tmp_path):
  refused(save(STATE | {"evil": Evil(tmp_path / "ran")}), "of class (posix|os).system")
  assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_is_refused_by_name(save, zipped):
  path = save({"model": torch.nn.Linear(3, 2)}, _use_new_zipfile_serialization=zipped)
  refused(path, r"a pickled Python object of class torch\.nn\.modules\.linear\.Linear")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_program_is_refused_by_name(tmp_path):
  path = str(tmp_path / "program.pt")
  torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 2), torch.ones(1, 3)), path)
  assert any("constants.pkl" in name for name in zipfile.ZipFile(path).namelist())
  refused(path, "are a TorchScript program, whose code is never run")
