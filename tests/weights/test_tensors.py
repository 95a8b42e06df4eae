"""Tensors of files are read when they are needed, and are as good as arrays."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights import files, tensors

ARRAY = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.fixture
def stored(tmp_path):
  path = tmp_path / "values"
  path.write_bytes(b"head" + ARRAY.tobytes())
  return tensors.Stored(ARRAY.shape, ARRAY.dtype, path, 4)


def test_numpy_takes_a_tensor_for_an_array(stored):
  assert (stored.shape, stored.ndim, stored.size, stored.dtype) == ((2, 3, 4), 3, 24, np.float32)
  np.testing.assert_array_equal(np.asarray(stored), ARRAY, strict=True)
  np.testing.assert_array_equal(np.asarray(stored, np.float64), ARRAY.astype(np.float64))
  np.testing.assert_array_equal(np.array(stored) + 1, ARRAY + 1)
  with pytest.raises(ValueError, match="without a copy"):
    np.array(stored, copy=False)


def test_changes_wait_until_it_is_read(stored):
  changed = stored.map(lambda array: array.transpose(2, 0, 1), (4, 2, 3)).astype(np.float16)
  stored.path.write_bytes(b"head" + (ARRAY + 1).tobytes())
  want = (ARRAY + 1).transpose(2, 0, 1).astype(np.float16)
  assert (changed.shape, changed.dtype) == (want.shape, want.dtype)
  np.testing.assert_array_equal(changed, want, strict=True)
  np.testing.assert_array_equal(stored.map(np.negative), -ARRAY - 1)


def test_rows(stored):
  for row in (stored.row(1), stored.map(np.negative).row(1).map(np.negative)):
    assert row.shape == (3, 4)
    np.testing.assert_array_equal(row, ARRAY[1], strict=True)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_joins_tensors_and_arrays(stored, axis):
  joined = tensors.concatenate([stored, ARRAY.astype(np.float64), stored], axis)
  want = np.concatenate([ARRAY, ARRAY.astype(np.float64), ARRAY], axis)
  assert (joined.shape, joined.dtype) == (want.shape, want.dtype)
  np.testing.assert_array_equal(joined, want, strict=True)
  with pytest.raises(ValueError, match="cannot be joined"):
    tensors.concatenate([stored, stored.row(0)], axis)
  with pytest.raises(ValueError, match="cannot be joined"):
    tensors.concatenate([stored, ARRAY[:1, :2, :3]], axis)


def test_a_file_that_became_shorter_or_went_away(stored):
  stored.path.write_bytes(b"head")
  with pytest.raises(UserError, match="values cannot be read .*fetch or write it again"):
    np.asarray(stored)
  stored.path.unlink()
  with pytest.raises(UserError, match="values cannot be read .*No such file"):
    np.asarray(stored)


def test_opening_reads_no_tensor(tmp_path):
  path = str(tmp_path / "w.safetensors")
  size = 4_000_000
  safetensors.numpy.save_file({f"w{i}": np.ones(size // 4, np.float32) for i in range(8)}, path)
  tracemalloc.start()
  found = files.open_source(path).tensors
  opened = tracemalloc.get_traced_memory()[1]
  for tensor in found.values():
    np.asarray(tensor).sum()
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert opened < size / 4
  assert peak < 2 * size  # one at a time


RESIDENT = """
import resource, sys
from vitcomp_jax.weights import files
def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
arrays = files.read(sys.argv[1])
print(peak() - before, sum(array.nbytes for array in arrays.values()) // 1024)
"""


def test_reading_keeps_one_copy_in_memory(tmp_path):
  path = str(tmp_path / "w.safetensors")
  many = {f"model.w{i}": np.full(2_000_000, i, np.float32) for i in range(16)}
  safetensors.numpy.save_file(many, path)
  told = subprocess.run([sys.executable, "-c", RESIDENT, path], capture_output=True, check=True)
  grown, held = map(int, told.stdout.split())
  assert grown < 1.15 * held
