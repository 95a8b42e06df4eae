"""The command as a user runs it: mistakes, a full disk, a kill in the middle."""

import errno
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

import vitcomp_jax
from tests.stages.test_slim import TINY, tiny_variant  # noqa: F401
from vitcomp_jax import main
from vitcomp_jax.checkpoint import Checkpointer
from vitcomp_jax.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
BUNDLED = ROOT / "vitcomp_jax" / "bundled" / "vit_mini_patch3_30.safetensors"
OTHER = ROOT / "tests" / "golden" / "errors" / "deit_ok.safetensors"
QUICK = (f"--config.model.variant={TINY}", "--config.model.weights=none")
QUICK += ("--config.budget.fraction=0.75", "--config.search.choose_images=16")
QUICK += ("--config.search.steps=12", "--config.search.batch_size=8")
QUICK += ("--config.search.checkpoint_every=3", "--config.search.log_every=1")
QUICK += ("--config.data.eval_examples=40", "--config.evaluate.batch_size=20")
QUICK += ("--config.evaluate.baselines=()", "--config.evaluate.token_maps=0")


def _command(workdir: pathlib.Path, *options: str) -> list[str]:
  program = [
    sys.executable,
    "-m",
    "tests.tiny_main",
    "--config",
    str(ROOT / "configs/quickstart.py"),
  ]
  program += ["--workdir", str(workdir), "--config.compilation_cache=none"]
  program += ["--config.stages=('search','evaluate')"]
  return [*program, *options]


def _run(workdir: pathlib.Path, *options: str) -> subprocess.CompletedProcess:
  command = _command(workdir, *options)
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _plan_file(path: pathlib.Path, layers: int, variant: str, num_tokens: int) -> str:
  values = {"format": "vitcomp-plan", "version": 1, "variant": variant, "num_tokens": num_tokens}
  values["layers"] = [{"prune_keep": 50, "merge_keep": 40}] * layers
  path.write_text(json.dumps(values))
  return str(path)


def _mistakes(tmp: pathlib.Path) -> dict[str, tuple[list[str], str]]:
  """Options, and what the line must say."""
  truncated, empty, broken = tmp / "cut.safetensors", tmp / "empty", tmp / "nan.safetensors"
  weights = safetensors.numpy.load_file(BUNDLED)
  safetensors.numpy.save_file(weights | {"head.bias": weights["head.bias"] * np.nan}, broken)
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
    "no such config": (["--config=configs/nowhere.py"], "nowhere.py"),
    "a config's name misspelt": (["--config=quickstrt"], "the nearest name is quickstart"),
    "unknown variant": (["--config.model.variant=vit_enormous"], "not known"),
    "wrong plan length": ([evaluate, f"--config.model.plan={short}"], "expected 8 layers"),
    "plan of another depth": ([evaluate, f"--config.model.plan={deep}"], "expected 8 layers"),
    "other weights": ([f"--config.model.weights={OTHER}"], "do not fit"),
    "none bundled": (["--config.model.variant=deit_tiny_patch16_224"], "ship with the package"),
    "weights that are not finite": ([f"--config.model.weights={broken}"], "head.bias"),
    "truncated weights": ([f"--config.model.weights={truncated}"], "damaged"),
    "missing weights": (["--config.model.weights=/nowhere/w.safetensors"], "not there"),
    "missing data set": (["--config.data.name=no_such_set"], "TFDS"),
    "missing folder": (["--config.data.name=folder"], "config.data.dir"),
    "empty folder": (["--config.data.name=folder", f"--config.data.dir={empty}"], "split"),
    "budget of 0": (["--config.budget.fraction=0.0"], "config.budget"),
    "budget above dense": (["--config.budget.fraction=1.2"], "config.budget"),
    "budget below the smallest": (["--config.budget.fraction=0.01"], "smallest plan"),
    "image size": (["--config.model.image_size=31"], "multiple of the patch size"),
    "negative steps": (["--config.search.steps=-1"], "int of at least 1"),
    "not a number": (["--config.search.learning_rate=nan"], "config.search.learning_rate"),
    "a group": (["--config.search=3"], "group"),
    "no value": (["--config.search.steps"], "got no value"),
    "unknown flag": (["--speed=3"], "--speed"),
    "no stages": (["--config.stages=()"], "at least one stage"),
    "unknown baseline": (["--config.evaluate.baselines=('best',)"], "uniform_merge"),
    "nothing to evaluate": (
      [evaluate, "--config.evaluate.dense=False", "--config.evaluate.baselines=()"],
      "something to evaluate",
    ),
    "two budgets": (["--config.budget.gmacs=0.03"], "fraction 0.35 and gmacs 0.03"),
    "too few classes": (["--config.model.num_classes=5"], "expected 5 classes, one for each"),
    "labels without a classifier": (
      ["--config.model.num_classes=0", "--config.search.loss=labels"],
      "expected features",
    ),
    "padding": (["--config.data.pad=15"], "config.data.pad"),
  }


with tempfile.TemporaryDirectory() as folder:
  MISTAKES = sorted(_mistakes(pathlib.Path(folder)))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(name, tmp_path, capsys):
  options, said = _mistakes(tmp_path)[name]
  workdir = tmp_path / "run"
  assert main.main(_command(workdir, *options)[2:]) == 2
  error = capsys.readouterr().err
  lines = [line for line in error.splitlines() if line.startswith("vitcomp_jax: ")]
  assert len(lines) == 1 and said in lines[0] and "Traceback" not in error, error
  # Nothing was begun, so that the corrected command may use the same workdir.
  assert not workdir.exists()


def test_a_mistake_ends_the_process_with_status_2(tmp_path):
  result = _run(tmp_path / "run", "--config.search.steps=many")
  assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr


def test_help_names_the_command(capsys):
  with pytest.raises(SystemExit) as ended:
    main.main(["main", "--help"])
  assert ended.value.code == 0
  assert "--config.KEY=VALUE" in capsys.readouterr().out
  with pytest.raises(SystemExit) as ended:
    main.main(["main", "--version"])
  assert ended.value.code == 0
  assert capsys.readouterr().out == f"{vitcomp_jax.__version__}\n"


@pytest.mark.parametrize(
  "name", ["front_quickstart", "front_quickstart.py", "configs/front_quickstart.py"]
)
def test_a_config_that_ships_goes_by_its_name(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config, workdir = main._parse(["--config", name])
  assert config.budget.fractions == (0.9, 0.8, 0.65, 0.5)
  assert workdir == pathlib.Path("runs/front_quickstart")
  config, _ = main._parse(["--config", name.replace("front_quickstart", "diffrate_vits") + ":2.3"])
  assert config.budget.gmacs == 2.3


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("def get_config(:", "SyntaxError"),
    ("import no_such_module", "no_such_module"),
    ("def get_config(): return {}", "expected get_config to return a ConfigDict"),
    ("x = 1", "expected a function get_config"),
    ("import sys; sys.exit(0)", "SystemExit"),
  ],
)
def test_a_broken_config_file_is_named(text, said, tmp_path, capsys):
  path = tmp_path / "broken.py"
  path.write_text(text)
  assert main.main(["main", "--config", str(path)]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and str(path) in error and said in error, error


def test_values_on_the_command_line():
  options = ["--config.budget.fraction=none", "--config.budget.gmacs", "0.03"]
  options += ["--config.stages=('evaluate',)", "--config.evaluate.dense=False"]
  command = _command(pathlib.Path("somewhere"), *options)[3:]
  config, workdir = main._parse(command)
  assert (config.budget.fraction, config.budget.gmacs) == (None, 0.03)
  assert config.stages == ("evaluate",) and not config.evaluate.dense
  assert workdir == pathlib.Path("somewhere")


@pytest.mark.slow
def test_a_corrupt_image_is_named(tmp_path, capsys):
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
  options += ["--config.data.pad=0", *QUICK[:6], "--config.evaluate.batch_size=8", *QUICK[-2:]]
  options += ["--config.stages=('search',)", "--config.search.steps=4"]
  command = _command(tmp_path / "stop", *options)[2:]
  assert main.main(command) == 2
  error = capsys.readouterr().err
  assert str(broken) in error and "Traceback" not in error
  assert main.main([*command, "--config.data.on_error=skip"]) == 0


@pytest.mark.slow
def test_a_full_disk_is_status_1_and_loses_nothing(tmp_path, monkeypatch, capsys):
  """A save that fails leaves the checkpoint before, from which the same command goes on."""
  save = Checkpointer.save

  def failing(checkpoints, step, state):
    if step > 6:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save(checkpoints, step, state)

  command = _command(tmp_path / "run", *QUICK, "--config.stages=('search',)")[2:]
  with monkeypatch.context() as patch:
    patch.setattr(Checkpointer, "save", failing)
    assert main.main(command) == 1
  error = capsys.readouterr().err
  assert "the disk is full" in error and "Traceback" not in error
  assert main.main(command) == 0


@pytest.mark.slow
def test_another_config_in_the_same_workdir_is_refused(tmp_path, capsys):
  options = ("--config.stages=('evaluate',)", "--config.evaluate.baselines=()")
  options += ("--config.data.eval_examples=20", "--config.evaluate.batch_size=20")
  options += QUICK[:2]
  assert main.main(_command(tmp_path, *options)[2:]) == 0
  assert main.main(_command(tmp_path, *options, "--config.seed=1")[2:]) == 2
  assert "config.seed: 0 there, 1 here" in capsys.readouterr().err
  # But for further stages, and the old command after that.
  more = "--config.stages=('evaluate','visualize')"
  for changed in (more, more, options[0]):
    assert main.main(_command(tmp_path, *options, changed)[2:]) == 0
  assert json.loads((tmp_path / "config.json").read_text())["config"]["stages"] == [
    "evaluate",
    "visualize",
  ]
  (tmp_path / "report.html").unlink()
  assert main.main(_command(tmp_path, *options, "--config.stages=('visualize',)")[2:]) == 2
  assert "config.stages: ['evaluate', 'visualize'] there" in capsys.readouterr().err
  (tmp_path / "config.json").unlink()
  assert main.main(_command(tmp_path, *options)[2:]) == 2
  assert "config.json is gone" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "slim", "search", "finetune", "evaluate"])
def test_a_killed_run_ends_as_one_left_alone(stage, tmp_path):
  options = list(QUICK)
  if stage in ("pretrain", "slim", "finetune"):
    options += [f"--config.stages=('{stage}','search','evaluate')"]
    options += [f"--config.{stage}.epochs=1.0", f"--config.{stage}.batch_size=16"]
    options += [f"--config.{stage}.checkpoint_every=3", f"--config.{stage}.log_every=1"]
    options += ["--config.data.train_examples=160", "--config.slim.w_patch=0.0"]
    options += ["--config.slim.budgets=(0.9,0.9,1.0)", "--config.slim.min_units=1"]
    options += ["--config.slim.ema=0.9"]
  alone, killed = tmp_path / "alone", tmp_path / "killed"
  assert _run(alone, *options).returncode == 0
  _kill_in(killed, stage, *options)
  result = _run(killed, *options)
  assert result.returncode == 0, result.stderr
  for name in ("plan.json", "result.json"):
    assert (killed / name).read_text() == (alone / name).read_text()
  figures = [_figures(workdir, stage) for workdir in (alone, killed)]
  assert figures[0] == figures[1]


@pytest.mark.slow
def test_slimming_and_searching_come_near_the_dense_model(tmp_path):
  command = [sys.executable, "-m", "vitcomp_jax.main"]
  command += ["--config", str(ROOT / "configs/joint_quickstart.py")]
  # As a user runs it; the other tests compile without optimizing.
  environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
  subprocess.run([*command, "--workdir", str(tmp_path)], cwd=ROOT, env=environment, check=True)
  rows = json.loads((tmp_path / "result.json").read_text())["rows"]
  assert rows[0]["name"] == "dense" and rows[-1]["gmacs"] < 0.66 * rows[0]["gmacs"]
  assert rows[-1]["top1"] > rows[0]["top1"] - 2  # of 1,000 images; what was measured is 0.3 less


def _kill_in(workdir: pathlib.Path, stage: str, *options: str) -> None:
  """Kills a run in the middle of a stage."""
  process = subprocess.Popen(_command(workdir, *options), cwd=ROOT, stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 1800  # against a hang; a busy machine takes minutes
  while not _is_in_the_middle(workdir, stage):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()


def _is_in_the_middle(workdir: pathlib.Path, stage: str) -> bool:
  """Past the first row of an evaluation, or the seventh step of another stage."""
  if stage == "evaluate":
    return (workdir / "result.json").exists()
  return max(_figures(workdir, stage), default=0) >= 7


def _figures(workdir: pathlib.Path, stage: str) -> dict[int, float]:
  """Logged loss by step."""
  return {r["step"]: r["loss"] for r in read_metrics(workdir, stage)}
