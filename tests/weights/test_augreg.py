"""Google's AugReg files read as timm reads them."""

import pathlib
import zipfile

import numpy as np
import pytest

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights import files

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def arrays():
  return dict(np.load(HERE / "augreg_google.npz"))


@pytest.fixture
def path(tmp_path):
  return str(tmp_path / "weights.npz")


def assert_timm(state):
  """`augreg_timm.npz` holds what timm 1.0 makes of the same file."""
  want = np.load(HERE / "augreg_timm.npz")
  assert state.keys() == set(want.files)
  for name in want.files:
    np.testing.assert_array_equal(state[name], want[name], err_msg=name)


def test_equals_timm():
  assert_timm(files.read(str(HERE / "augreg_google.npz")))


def test_checkpoint_with_optimizer_state(arrays, path):
  nested = {f"opt/target/{name}": array for name, array in arrays.items()}
  np.savez(path, **nested, **{"opt/state/step": np.array(3)})
  assert_timm(files.read(path))


def test_query_rows_come_first_and_head_by_head(arrays):
  state = files.read(str(HERE / "augreg_google.npz"))
  prefix = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
  d, h, k = arrays[f"{prefix}/query/kernel"].shape
  for part, name in enumerate(("query", "key", "value")):
    for head in range(h):
      rows = slice(part * d + head * k, part * d + (head + 1) * k)
      want = arrays[f"{prefix}/{name}/kernel"][:, head].T
      np.testing.assert_array_equal(state["blocks.1.attn.qkv.weight"][rows], want)
      want = arrays[f"{prefix}/{name}/bias"][head]
      np.testing.assert_array_equal(state["blocks.1.attn.qkv.bias"][rows], want)


@pytest.mark.parametrize("extra", ["Transformer/encoderblock_0/gate/kernel", "conv_root/kernel"])
def test_unknown_names_are_refused(arrays, path, extra):
  np.savez(path, **arrays, **{extra: np.ones((2, 2))})
  with pytest.raises(UserError, match=f"weights.npz.*got {extra};"):
    files.read(path)


def test_another_npz_is_refused(path):
  np.savez(path, images=np.ones(3))
  with pytest.raises(UserError, match=r"expected the names of Google's.*got images;"):
    files.read(path)


def test_missing_key_projection_is_refused(arrays, path):
  del arrays["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/key/bias"]
  np.savez(path, **arrays)
  with pytest.raises(UserError, match=r"expected key and value of the shape of .*/query/bias"):
    files.read(path)


def test_pickled_objects_are_never_loaded(arrays, path):
  np.savez(path, **arrays, evil=np.array([object()], dtype=object))
  with pytest.raises(UserError, match="cannot be read"):
    files.read(path)


def test_damaged_file_is_one_clear_line(path):
  whole = (HERE / "augreg_google.npz").read_bytes()
  pathlib.Path(path).write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError, match="cannot be read") as info:
    files.read(path)
  assert "\n" not in str(info.value)


def test_damage_inside_a_compressed_file_is_one_clear_line(arrays, path):
  large = np.random.default_rng(0).normal(size=(64, 64, 3, 8))  # not read with its header
  np.savez_compressed(path, **(arrays | {"embedding/kernel": large}))
  content = bytearray(pathlib.Path(path).read_bytes())
  with zipfile.ZipFile(path) as archive:
    member = max(archive.infolist(), key=lambda member: member.compress_size)
  middle = member.header_offset + member.compress_size // 2
  content[middle : middle + 20] = bytes(20)
  pathlib.Path(path).write_bytes(content)
  with pytest.raises(UserError, match=f"cannot be read .*{member.filename} is damaged") as info:
    files.read(path)
  assert "\n" not in str(info.value)
