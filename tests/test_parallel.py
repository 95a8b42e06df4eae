"""One mathematics on any number of devices and processes, in all three layouts."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import pytest

from vitcomp_jax.metrics import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
RANDOM = {
  "data.augment": "flip_shift",
  "data.erase": 0.5,
  "data.mixup": 0.8,
  "data.cutmix": 1.0,
  "data.repeats": 3,
}


def _environment(devices: int) -> dict[str, str]:
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
  return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def _cases(tmp_path: pathlib.Path, cases: dict) -> dict[str, list[float]]:
  command = [sys.executable, "-m", "tests.parallel_cases", str(tmp_path), json.dumps(cases)]
  result = subprocess.run(command, cwd=ROOT, env=_environment(8), capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout.splitlines()[-1])


def _check_equal(losses: dict[str, list[float]], to: str) -> None:
  for name, found in losses.items():
    assert len(found) == 20, name
    np.testing.assert_allclose(found, losses[to], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_search_is_the_same_on_any_devices(tmp_path):
  layouts = [("data", 1), ("data", 8), ("fsdp", 4), ("pmap", 2)]
  cases = {f"{mode}{n}": [("search", mode, n, {})] for mode, n in layouts}
  _check_equal(_cases(tmp_path, cases), to="data1")


@pytest.mark.slow
def test_a_training_is_the_same_on_any_devices(tmp_path):
  layouts = [("data", 1), ("data", 4), ("data", 8), ("fsdp", 8), ("pmap", 4)]
  cases = {f"{m}{n}": [("finetune", m, n, RANDOM)] for m, n in layouts}
  # Whose draws are each device's own under pmap.
  dropping = RANDOM | {"finetune.drop_path": 0.5}
  _check_equal(_cases(tmp_path / "all", cases), to="data1")
  cases = {f"{m}{n}": [("finetune", m, n, dropping)] for m, n in layouts[:4]}
  _check_equal(_cases(tmp_path / "dropping", cases), to="data1")


@pytest.mark.slow
def test_parts_of_a_batch_add_up(tmp_path):
  parts = RANDOM | {"finetune.parts": 2}
  cases = {
    "whole": [("finetune", "data", 1, RANDOM)],
    "data1": [("finetune", "data", 1, parts)],
    "data4": [("finetune", "data", 4, parts)],
    "fsdp4": [("finetune", "fsdp", 4, parts)],
    "pmap4": [("finetune", "pmap", 4, parts)],
  }
  _check_equal(_cases(tmp_path, cases), to="whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["search", "finetune"])
def test_a_run_goes_on_in_another_layout(stage, tmp_path):
  cases = {
    "alone": [(stage, "data", 1, {})],
    "fewer": [(stage, "data", n, {}) for n in (8, 4, 1)],
    "more": [(stage, "data", n, {}) for n in (1, 2, 8)],
    "others": [(stage, m, 4, {}) for m in ("data", "fsdp", "pmap", "data")],
  }
  _check_equal(_cases(tmp_path, cases), to="alone")


@pytest.mark.slow
def test_a_search_step_exchanges_only_what_it_learns():
  command = [sys.executable, "tools/collectives.py", "--config", "configs/quickstart.py"]
  command += ["--stage", "search", "--devices", "4"]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
  kind, count, _, size, _ = result.stdout.split()
  assert (kind, count) == ("all-reduce", "1") and result.stdout.count("\n") == 1
  # In float32: the masks of eight layers' 101 tokens, whose gradients are summed before those of
  # the shares, at most three each (pruned, merged, joining), and the metrics' few numbers.
  assert int(size.replace(",", "")) < 4 * (8 * 3 * 101 + 50)


# --- several processes ---


def _start(
  workdir: pathlib.Path,
  stages: tuple[str, ...],
  count: int,
  devices: int = 2,
  options: Sequence[str] = (),
) -> list[subprocess.Popen]:
  """Starts the processes of one run."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "tests.tiny_main", "--config", "tests/tiny_config.py"]
  command += ["--workdir", str(workdir), f"--config.stages={stages}", *options]
  found = []
  for i in range(count):
    joins = ["--coordinator", f"localhost:{port}", "--num_processes", str(count)]
    joins += ["--process_id", str(i)]
    options = dict(cwd=ROOT, env=_environment(devices), stderr=subprocess.PIPE, text=True)
    found.append(subprocess.Popen([*command, *(joins if count > 1 else [])], **options))
  return found


def _finish(processes: list[subprocess.Popen]) -> list[str]:
  """What they said; all must end well."""
  said = [process.communicate(timeout=900)[1] for process in processes]
  assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
  return said


def _losses(workdir: pathlib.Path, stage: str) -> dict[int, float]:
  return {record["step"]: record["loss"] for record in read_metrics(workdir, stage)}


def _wait_for(workdir: pathlib.Path, stage: str, step: int, process: subprocess.Popen) -> None:
  deadline = time.monotonic() + 900
  while max(_losses(workdir, stage), default=0) < step:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)


def _kept(workdir: pathlib.Path) -> np.ndarray:
  layers = json.loads((workdir / "plan.json").read_text())["layers"]
  return np.array([[r["prune_keep"], r["merge_keep"]] for r in (x["reduce"] for x in layers)])


@pytest.mark.slow
def test_processes_share_a_run(tmp_path):
  """Two processes with two devices each: equal to one, also after one of them was killed."""
  stages = ("search", "finetune", "evaluate")
  alone, shared, killed, moved = (tmp_path / n for n in ("alone", "shared", "killed", "moved"))
  _finish(_start(alone, stages, 1, devices=1))
  _finish(_start(shared, stages, 2))
  for stage in ("search", "finetune"):
    one, two = (list(_losses(w, stage).values()) for w in (alone, shared))
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)
  rows = [json.loads((w / "result.json").read_text())["rows"] for w in (alone, shared)]
  for one, two in zip(*rows, strict=True):
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5) and two["top1"] == one["top1"]

  for workdir, stage in ((killed, "finetune"), (moved, "search")):
    processes = _start(workdir, stages, 2)
    _wait_for(workdir, stage, 8, processes[0])
    processes[1].send_signal(signal.SIGKILL)
    processes[0].kill()
    for process in processes:
      process.communicate()
  _finish(_start(killed, stages, 2))
  for name in ("plan.json", "finetuned.safetensors", "result.json"):
    assert (killed / name).read_bytes() == (shared / name).read_bytes(), name
  assert _losses(killed, "finetune") == _losses(shared, "finetune")
  # On another number of devices and processes.
  _finish(_start(moved, stages, 1, devices=4))
  one, two = (list(_losses(w, "search").values()) for w in (moved, shared))
  np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)
  assert np.abs(_kept(moved) - _kept(shared)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_run_that_is_asked_to_end_saves_and_goes_on(count, tmp_path):
  alone, asked = tmp_path / "alone", tmp_path / "asked"
  _finish(_start(alone, ("search",), count))
  processes = _start(asked, ("search",), count)
  _wait_for(asked, "search", 3, processes[0])
  processes[-1].send_signal(signal.SIGTERM)  # a scheduler may tell one of them first
  said = _finish(processes)
  assert all("the same command goes on" in text for text in said)
  assert not (asked / "plan.json").exists()
  _finish(_start(asked, ("search",), count))
  assert (asked / "plan.json").read_bytes() == (alone / "plan.json").read_bytes()
  assert _losses(asked, "search") == _losses(alone, "search")


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_ends_as_one_left_alone(tmp_path):
  stages = ("search", "finetune", "evaluate")
  alone, killed = tmp_path / "alone", tmp_path / "killed"
  begin = time.monotonic()
  _finish(_start(alone, stages, 1))
  length = time.monotonic() - begin
  draw = random.Random(0)
  for _ in range(10):
    process = _start(killed, stages, 1)[0]
    time.sleep(draw.uniform(0.2, 0.9) * length)
    process.kill()
    process.communicate()
  _finish(_start(killed, stages, 1))
  for name in ("plan.json", "finetuned.safetensors", "result.json"):
    assert (killed / name).read_bytes() == (alone / name).read_bytes(), name
  for stage in ("search", "finetune"):
    assert _losses(killed, stage) == _losses(alone, stage)
