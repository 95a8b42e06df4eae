"""The command as a user runs it: mistakes, a full disk, a kill in the middle."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

ROOT = pathlib.Path(__file__).parents[1]
QUICK = ("--config.search.steps=12", "--config.search.batch_size=8")
QUICK += ("--config.search.checkpoint_every=3", "--config.search.log_every=1")
QUICK += ("--config.data.eval_examples=40", "--config.evaluate.batch_size=20")


def _command(workdir: pathlib.Path, *options: str, config: str = "configs/quickstart.py"):
  program = [sys.executable, "-m", "vitcomp_jax.main", "--config", config]
  return [*program, "--workdir", str(workdir), *options]


def _run(workdir: pathlib.Path, *options: str, **settings) -> subprocess.CompletedProcess:
  command = _command(workdir, *options, **settings)
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _plan_file(path: pathlib.Path, layers: int, variant: str, num_tokens: int) -> str:
  values = {"format": "vitcomp-plan", "version": 1, "variant": variant, "num_tokens": num_tokens}
  values["layers"] = [{"prune_keep": 50, "merge_keep": 40}] * layers
  path.write_text(json.dumps(values))
  return str(path)


def _mistakes(tmp: pathlib.Path) -> dict[str, tuple[list[str], str]]:
  """Options, and what the line must say."""
  truncated, empty = tmp / "cut.safetensors", tmp / "empty"
  safetensors.numpy.save_file({"head.weight": np.zeros((10, 64), np.float32)}, truncated)
  truncated.write_bytes(truncated.read_bytes()[:-100])
  empty.mkdir()
  evaluate = "--config.stages=('evaluate',)"
  mini = "vit_mini_patch3_30"
  short = _plan_file(tmp / "short.json", 7, mini, 101)
  deep = _plan_file(tmp / "deep.json", 12, "deit_tiny_patch16_224", 197)
  return {
    "unknown key": (["--config.serch.steps=3"], "did you mean config.search.steps"),
    "wrong type": (["--config.search.steps=many"], "steps"),
    "unknown stage": (["--config.stages=('train',)"], "config.stages"),
    "no such config": ([], "nowhere.py"),
    "unknown variant": (["--config.model.variant=vit_enormous"], "not known"),
    "wrong plan length": ([evaluate, f"--config.model.plan={short}"], "expected 8 layers"),
    "plan of another depth": ([evaluate, f"--config.model.plan={deep}"], "expected 8 layers"),
    "other weights": (["--config.model.variant=deit_tiny_patch16_224"], "weights"),
    "truncated weights": ([f"--config.model.weights={truncated}"], "damaged"),
    "missing weights": (["--config.model.weights=/nowhere/w.safetensors"], "not there"),
    "missing data set": (["--config.data.name=no_such_set"], "TFDS"),
    "missing folder": (["--config.data.name=folder"], "config.data.dir"),
    "empty folder": (["--config.data.name=folder", f"--config.data.dir={empty}"], "split"),
    "budget of 0": (["--config.budget.fraction=0.0"], "config.budget"),
    "budget above dense": (["--config.budget.fraction=1.2"], "config.budget"),
    "budget below the smallest": (["--config.budget.fraction=0.01"], "smallest plan"),
    "image size": (["--config.model.image_size=31"], "multiple of the patch size"),
    "negative steps": (["--config.search.steps=-1"], "config.search"),
  }


MISTAKES = sorted(_mistakes(pathlib.Path(tempfile.mkdtemp())))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(name, tmp_path):
  options, said = _mistakes(tmp_path)[name]
  config = "configs/nowhere.py" if name == "no such config" else "configs/quickstart.py"
  result = _run(tmp_path / "run", *options, config=config)
  lines = [line for line in result.stderr.splitlines() if line.startswith("vitcomp_jax: ")]
  assert result.returncode == 2, result.stderr
  assert len(lines) == 1 and said in lines[0], result.stderr
  assert "Traceback" not in result.stderr


def test_a_corrupt_image_is_named(tmp_path):
  for split in ("train", "val"):
    for name in ("cat", "dog"):
      folder = tmp_path / "data" / split / name
      folder.mkdir(parents=True)
      for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (30, 30, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(folder / f"{i}.jpg")
  broken = tmp_path / "data" / "train" / "cat" / "2.jpg"
  broken.write_bytes(broken.read_bytes()[:300])
  options = [f"--config.data.dir={tmp_path / 'data'}", "--config.data.name=folder"]
  options += ["--config.data.pad=0", "--config.model.weights=None"]
  stopped = _run(tmp_path / "stop", *options, *QUICK[:4])
  assert stopped.returncode == 2 and str(broken) in stopped.stderr, stopped.stderr
  skipping = [*options, *QUICK[:4], "--config.data.on_error=skip"]
  skipped = _run(tmp_path / "skip", *skipping)
  assert skipped.returncode == 0, skipped.stderr


def test_a_full_disk_is_status_1_and_loses_nothing(tmp_path):
  """A save that fails leaves the checkpoint before, from which the same command goes on."""
  program = (
    "import errno, sys\n"
    "from vitcomp_jax import main, checkpoint\n"
    "save = checkpoint.Checkpointer.save\n"
    "def failing(self, step, state):\n"
    "  if step > 6: raise OSError(errno.ENOSPC, 'No space left on device')\n"
    "  save(self, step, state)\n"
    "checkpoint.Checkpointer.save = failing\n"
    "sys.exit(main.main(sys.argv))\n"
  )
  options = _command(tmp_path / "run", *QUICK)[3:]
  command = [sys.executable, "-c", program, *options]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 1, result.stderr
  assert "the disk is full" in result.stderr and "Traceback" not in result.stderr
  resumed = _run(tmp_path / "run", *QUICK)
  assert resumed.returncode == 0, resumed.stderr


def test_another_config_in_the_same_workdir_is_refused(tmp_path):
  workdir = tmp_path / "run"
  _run(workdir, *QUICK, "--config.stages=()")
  result = _run(workdir, *QUICK, "--config.stages=()", "--config.seed=1")
  assert result.returncode == 2 and "config.seed" in result.stderr, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["search", "pretrain"])
def test_a_killed_run_ends_as_one_left_alone(stage, tmp_path):
  options = list(QUICK)
  if stage == "pretrain":
    options += ["--config.stages=('pretrain','search','evaluate')", "--config.pretrain.epochs=1.0"]
    options += ["--config.data.train_examples=160", "--config.pretrain.batch_size=16"]
    options += ["--config.pretrain.checkpoint_every=3", "--config.pretrain.log_every=1"]
  alone, killed = tmp_path / "alone", tmp_path / "killed"
  assert _run(alone, *options).returncode == 0
  _kill_at(killed, stage, 7, *options)
  result = _run(killed, *options)
  assert result.returncode == 0, result.stderr
  for name in ("plan.json", "result.json"):
    assert (killed / name).read_text() == (alone / name).read_text()
  figures = [_figures(workdir, stage) for workdir in (alone, killed)]
  assert figures[0] == figures[1]


def _kill_at(workdir: pathlib.Path, stage: str, step: int, *options: str) -> None:
  process = subprocess.Popen(_command(workdir, *options), cwd=ROOT, stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 300
  while max(_figures(workdir, stage), default=0) < step:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()


def _figures(workdir: pathlib.Path, stage: str) -> dict[int, float]:
  """Logged loss by step."""
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  records = [json.loads(line) for line in lines if line.endswith("}")]
  return {r["step"]: r["loss"] for r in records if r["stage"] == stage}
