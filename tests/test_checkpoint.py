"""Checkpoints survive damage, junk and a write that fails; so do the logged figures."""

import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vitcomp_jax.checkpoint import Checkpointer
from vitcomp_jax.errors import UserError
from vitcomp_jax.metrics import MetricsWriter, read_metrics
from vitcomp_jax.training.step import TrainState

ROOT = pathlib.Path(__file__).parents[1]


def make_state(step: int, width: int = 4) -> TrainState:
  rng = np.random.default_rng(step)
  params = {"layer": {"kernel": jnp.asarray(rng.normal(size=(3, width)).astype(np.float32))}}
  return TrainState(
    step=jnp.asarray(step, jnp.int32),
    params=params,
    arch={},
    opt_state=optax.adam(1e-3).init(params),
    ema=None,
    rng=jnp.asarray([0, step], jnp.uint32),
  )


def write(directory: pathlib.Path, *steps: int) -> None:
  with Checkpointer(directory) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_state(step))


def restore(directory: pathlib.Path) -> tuple[int, Any] | None:
  with Checkpointer(directory) as checkpoints:
    return checkpoints.restore(make_state(0))


def assert_restores(directory: pathlib.Path, step: int) -> None:
  restored = restore(directory)
  assert restored is not None and restored[0] == step
  want = make_state(step)
  assert jax.tree.structure(restored[1]) == jax.tree.structure(want)
  for got, expected in zip(jax.tree.leaves(restored[1]), jax.tree.leaves(want), strict=True):
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


def steps_in(directory: pathlib.Path) -> list[int]:
  return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def truncate_arrays(checkpoint: pathlib.Path) -> None:
  for file in checkpoint.glob("default/**/d/*"):
    file.write_bytes(file.read_bytes()[:20])


def damage_metadata(checkpoint: pathlib.Path) -> None:
  (checkpoint / "default" / "_METADATA").write_text("{")


def remove_metadata(checkpoint: pathlib.Path) -> None:
  (checkpoint / "default" / "_METADATA").unlink()


def remove_everything(checkpoint: pathlib.Path) -> None:
  for file in checkpoint.rglob("*"):
    if file.is_file():
      file.unlink()


DAMAGES = [truncate_arrays, damage_metadata, remove_metadata, remove_everything]


def test_nothing_is_restored_from_an_empty_folder(tmp_path):
  assert restore(tmp_path / "new") is None


def test_the_newest_is_restored_and_two_are_kept(tmp_path):
  write(tmp_path, 3, 6, 9)
  assert steps_in(tmp_path) == [6, 9]
  assert_restores(tmp_path, 9)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_replaced(damage, tmp_path, caplog, capfd):
  write(tmp_path, 3, 6)
  damage(tmp_path / "6")
  with Checkpointer(tmp_path) as checkpoints:
    restored = checkpoints.restore(make_state(0))
    assert restored is not None and restored[0] == 3
    assert "Checkpoint 6 cannot be read" in caplog.text
    checkpoints.save(6, make_state(6))
  assert_restores(tmp_path, 6)
  assert steps_in(tmp_path) == [3, 6]
  assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_only_damaged_ones_are_an_error_and_stay(tmp_path):
  write(tmp_path, 3, 6)
  for step in (3, 6):
    truncate_arrays(tmp_path / str(step))
  with pytest.raises(UserError, match=f"^{tmp_path}: .* damaged ones .6, 3.; remove this folder"):
    restore(tmp_path)
  assert steps_in(tmp_path) == [3, 6]


@pytest.mark.parametrize("width", [5, 3])
def test_another_shape_is_told_and_nothing_is_removed(width, tmp_path):
  write(tmp_path, 3, 6)
  message = rf"{tmp_path / '6'}: .*kernel: \(3, 4\) there, \(3, {width}\) here"
  with Checkpointer(tmp_path) as checkpoints, pytest.raises(UserError, match=message):
    checkpoints.restore(make_state(0, width))
  assert steps_in(tmp_path) == [3, 6]


def test_another_tree_is_told(tmp_path):
  write(tmp_path, 3)
  averaged = make_state(0).replace(ema=make_state(0).params)
  message = r"ema/layer/kernel: none there, \(3, 4\) here"
  with Checkpointer(tmp_path) as checkpoints, pytest.raises(UserError, match=message):
    checkpoints.restore(averaged)


def test_junk_does_not_matter(tmp_path):
  write(tmp_path, 3)
  (tmp_path / "notes.txt").write_text("not a checkpoint")
  (tmp_path / "9").write_text("not a folder")
  (tmp_path / "11").symlink_to("nowhere")
  for name in ("old", "3.bak", ".hidden", "7.orbax-checkpoint-tmp"):
    (tmp_path / name).mkdir()
  assert_restores(tmp_path, 3)
  write(tmp_path, 5)
  assert_restores(tmp_path, 5)
  # What a kill left half written takes room for nothing.
  assert (tmp_path / "old").exists() and not (tmp_path / "7.orbax-checkpoint-tmp").exists()


FAILING = """
import os, pathlib, resource, sys
import jax.numpy as jnp, numpy as np
from vitcomp_jax.checkpoint import Checkpointer

def limit(size):
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def state(step):
  rng = np.random.default_rng(step)
  return {str(i): jnp.asarray(rng.normal(size=20000).astype(np.float32)) for i in range(20)}

directory, last = pathlib.Path(sys.argv[1]), sys.argv[2] == "last"
try:
  with Checkpointer(directory) as checkpoints:
    checkpoints.save(1, state(1))
    checkpoints.save(2, state(2))
    checkpoints.close()
    checkpoints = Checkpointer(directory)
    limit(10000)
    checkpoints.save(3, state(3))
    checkpoints.close() if last else checkpoints.save(4, state(4))
except OSError as error:
  assert "File too large" in str(error) and str(directory) in str(error), error
else:
  raise AssertionError("nothing was raised")
limit(resource.RLIM_INFINITY)
with Checkpointer(directory) as checkpoints:
  step, restored = checkpoints.restore(state(0))
  assert step == 2 and all(np.array_equal(restored[k], v) for k, v in state(2).items())
  checkpoints.save(3, state(3))
with Checkpointer(directory) as checkpoints:
  assert checkpoints.restore(state(0))[0] == 3
assert not list(directory.glob("*tmp*")), list(directory.iterdir())
"""


@pytest.mark.parametrize("when", ["last", "before another"])
def test_a_write_that_fails_is_one_error_and_loses_nothing(when, tmp_path):
  """A limit on the size of files stops the writes where a full disk would."""
  command = [sys.executable, "-c", FAILING, str(tmp_path / "run"), when]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 0 and not result.stderr, result.stderr


# What a kill cuts off, a damaged disk leaves, and what is no record of a stage.
DAMAGED_LINES = ['{"stage": "search", "st', "\x00\x00", "12", "[1, 2]", "null", "", '{"step": 3}']
DAMAGED_LINES += ['{"stage": "search"}', '{"stage": "search", "step": 2}']


def test_damaged_figures_are_passed_over(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with MetricsWriter(tmp_path, "search", 0, 9) as metrics:
    for step in (1, 2, 3):
      metrics.write(step, {"loss": np.float32(step)})
  whole = path.read_text().splitlines()
  path.write_bytes("\n".join([*DAMAGED_LINES, *whole]).encode()[:-5] + b"\xff")
  got = [record["loss"] for record in read_metrics(tmp_path, "search") if "loss" in record]
  assert got == [1, 2]
  with MetricsWriter(tmp_path, "search", 1, 9) as metrics:
    assert metrics.seconds >= 0
    metrics.write(2, {"loss": 5.0})
  got = [record["loss"] for record in read_metrics(tmp_path, "search") if "loss" in record]
  assert got == [1, 5]
