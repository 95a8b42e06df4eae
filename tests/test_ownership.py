"""A workdir has one owner at a time."""

import concurrent.futures
import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

import tests.tiny_config
import vitcomp_jax as vc
from tests.stages.test_slim import tiny_config, tiny_variant  # noqa: F401
from tests.test_parallel import _finish, _losses, _start, _wait_for
from vitcomp_jax.runs.ownership import owned

STEPS = 150


def _refused(process: subprocess.Popen) -> str:
  """The one line with which a process was refused."""
  error = process.communicate(timeout=300)[1]
  assert process.returncode == 2 and "Traceback" not in error, error
  (line,) = [line for line in error.splitlines() if line.startswith("vitcomp_jax: ")]
  return line


def _in_use_by(pid: int) -> str:
  return (
    f"one that no other run is using, got one in use by process {pid} on {socket.gethostname()}"
  )


OWN = """
import pathlib, sys, time
from vitcomp_jax.runs.ownership import owned
with owned(pathlib.Path(sys.argv[1])):
  print("owned", flush=True)
  time.sleep(300)
"""


def test_what_another_process_owns_is_refused_until_it_is_killed(tmp_path):
  workdir = tmp_path / "run"
  command = [sys.executable, "-c", OWN, workdir]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "owned\n"
    with pytest.raises(vc.UserError, match=_in_use_by(process.pid)):
      vc.run_stage("evaluate", tiny_config(), workdir)
    process.kill()
  # What the killed one left behind names it still, and stops nobody.
  assert json.loads((workdir / ".owner.json").read_text())["pid"] == process.pid
  with owned(workdir):
    assert json.loads((workdir / ".owner.json").read_text())["pid"] == os.getpid()
  assert not list(workdir.iterdir())


@pytest.mark.slow
def test_a_second_run_is_refused_and_a_killed_one_is_no_obstacle(tmp_path):
  workdir, config = tmp_path / "run", tests.tiny_config.get_config()
  config.search.steps = STEPS
  (first,) = _start(workdir, ("search",), 1, options=[f"--config.search.steps={STEPS}"])
  _wait_for(workdir, "search", 3, first)
  with pytest.raises(vc.UserError, match=_in_use_by(first.pid)):
    vc.run_stage("search", config, workdir)
  assert first.poll() is None
  first.send_signal(signal.SIGKILL)
  first.communicate()
  done = max(_losses(workdir, "search"))
  assert done < STEPS
  # What the killed one left behind names it still, and stops nobody.
  assert json.loads((workdir / ".owner.json").read_text())["pid"] == first.pid
  vc.run_stage("search", config, workdir)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
  assert (workdir / "plan.json").exists() and not list(workdir.glob(".*"))


@pytest.mark.slow
def test_all_processes_of_a_run_hear_of_the_refusal(tmp_path):
  with owned(tmp_path):
    lines = {_refused(process) for process in _start(tmp_path, ("search",), 2)}
  (line,) = lines
  assert _in_use_by(os.getpid()) in line
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_all_processes_of_a_run_own_its_workdir(tmp_path):
  _finish(_start(tmp_path, ("search",), 2))
  assert (tmp_path / "plan.json").exists() and not list(tmp_path.glob(".*"))


def test_one_process_is_no_exception(tmp_path):
  config = tiny_config()
  with owned(tmp_path), pytest.raises(vc.UserError, match=_in_use_by(os.getpid())):
    vc.run_stage("evaluate", config, tmp_path)
  with owned(tmp_path), concurrent.futures.ThreadPoolExecutor() as pool:
    error = pool.submit(vc.run_stage, "evaluate", config, tmp_path).exception()
  assert isinstance(error, vc.UserError) and _in_use_by(os.getpid()) in str(error)
  assert not list(tmp_path.iterdir())


def test_a_comparison_owns_its_searches(tmp_path):
  config = tiny_config()
  config.compare.methods, config.compare.budgets, config.compare.seeds = ("diffrate",), (0.8,), 1
  config.compare.random_schedules = 0
  name = "compare/diffrate@0.8-seed0"
  with (
    owned(tmp_path / name),
    pytest.raises(vc.UserError, match=f"{name}: expected {_in_use_by(os.getpid())}"),
  ):
    vc.run_stage("compare", config, tmp_path)
  assert not list(tmp_path.rglob(".lock"))


def test_what_ends_a_run_ends_its_ownership(tmp_path, monkeypatch):
  workdir = tmp_path / "new" / "run"
  with pytest.raises(vc.UserError, match="not there"):
    config = tiny_config()
    config.model.weights = "/nowhere/w.safetensors"
    vc.run_stage("evaluate", config, workdir)
  assert not list(tmp_path.iterdir())  # Refused before it began, it leaves nothing.
  with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
    patch.setattr("vitcomp_jax.scoring.measured", lambda *_: 1 / 0)
    vc.run_stage("evaluate", tiny_config(), workdir)
  assert {path.name for path in workdir.iterdir()} == {"config.json"}
  vc.run_stage("evaluate", tiny_config(), workdir)


def test_what_was_there_before_stays(tmp_path):
  with contextlib.suppress(KeyError), owned(tmp_path / "a" / "b"):
    (tmp_path / "a" / "mine").touch()
    raise KeyError
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]
  (tmp_path / "empty").mkdir()
  with owned(tmp_path / "empty"):
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {".lock", ".owner.json"}
  assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("where", ["file", "file/run", "/proc/run"])
def test_a_workdir_that_cannot_be_written_is_refused(where, tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(vc.UserError, match=f"--workdir .*{where}: cannot be written"):
    vc.run_stage("evaluate", tiny_config(), tmp_path / where)


def test_without_locks_it_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
  def flock(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

  monkeypatch.setattr(fcntl, "flock", flock)
  with caplog.at_level(logging.WARNING), owned(tmp_path / "run"):
    assert not list((tmp_path / "run").iterdir())
  (record,) = caplog.records
  assert "without locks (Function not implemented)" in record.getMessage()
  assert not pathlib.Path(tmp_path / "run").exists()
