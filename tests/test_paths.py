"""`~` and `$HOME` mean what they mean in a shell, wherever a path is asked for."""

import dataclasses
import json
import pathlib
import runpy
import shutil

import jax
import numpy as np
import PIL.Image
import pytest

import vitcomp_jax as vc
from tests.stages.test_slim import TINY, tiny_config, tiny_variant  # noqa: F401
from tests.test_api import MINI, mini_plan
from vitcomp_jax import exported, main, predict
from vitcomp_jax.comparison import methods
from vitcomp_jax.config import from_config_dict
from vitcomp_jax.data import sources
from vitcomp_jax.paths import expand
from vitcomp_jax.plans import save_plan
from vitcomp_jax.results import Row
from vitcomp_jax.runs import table
from vitcomp_jax.runs.run import open_run
from vitcomp_jax.stages import compare, visualize
from vitcomp_jax.weights import files

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  """A home of one's own, which is not where the test runs."""
  (tmp_path / "home").mkdir()
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.setenv("ASKED", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path / "elsewhere")
  yield tmp_path / "home"
  assert not list((tmp_path / "elsewhere").iterdir())  # such as a folder named `~`


@pytest.mark.parametrize(
  ("path", "expected"),
  [
    ("~", "{home}"),
    ("~/runs/a", "{home}/runs/a"),
    (pathlib.Path("~/runs"), "{home}/runs"),
    ("~root/runs", "/root/runs"),
    ("$HOME/runs", "{home}/runs"),
    ("${HOME}runs", "{home}runs"),
    ("runs/$ASKED", "runs/{home}"),
    ("a/~/b", "a/~/b"),
    ("cost$5.jpg", "cost$5.jpg"),
    ("100$", "100$"),
    ("timm/deit_small_patch16_224", "timm/deit_small_patch16_224"),
  ],
)
def test_a_path_is_expanded(path, expected, home):
  assert expand(path) == expected.format(home=home)


def test_a_file_of_that_very_name_comes_first(home):
  (home / "cost$ASKED.jpg").touch()
  assert expand("~/cost$ASKED.jpg") == f"{home}/cost$ASKED.jpg"
  assert expand("~/costs$ASKED.jpg") == f"{home}/costs{home}.jpg"


@pytest.mark.parametrize("path", ["$NOT_SET/runs", "~/${NOT_SET}"])
def test_a_variable_that_is_not_set_is_named(path):
  with pytest.raises(vc.UserError, match="expected the environment variable NOT_SET to be set"):
    expand(path)


def test_the_command(home, monkeypatch):
  set_up = {}
  monkeypatch.setattr(jax.config, "update", set_up.__setitem__)
  (home / "mine.py").write_text(
    "from vitcomp_jax.config import default_config\n"
    "def get_config():\n"
    "  config = default_config()\n"
    f"  config.model.variant, config.data.pad = {TINY!r}, 1\n"
    "  config.data.eval_examples, config.evaluate.token_maps = 20, 0\n"
    "  config.stages = ('evaluate',)\n"
    "  return config\n"
  )
  files.write(vc.load(TINY, num_classes=10)[1], str(home / "w.safetensors"))
  typed = {"model.weights": "~/w.safetensors", "compilation_cache": "$ASKED/cache/xla"}
  options = [f"--config.{key}={value}" for key, value in typed.items()]
  assert main.main(["main", "--config", "~/mine.py", "--workdir=~/run", *options]) == 0
  assert set_up["jax_compilation_cache_dir"] == f"{home}/cache/xla"
  config = json.loads((home / "run/config.json").read_text())["config"]
  assert config["model"]["weights"] == typed["model.weights"]  # as it was typed
  assert config["compilation_cache"] == typed["compilation_cache"]
  assert (home / "run/result.json").exists()


def test_a_variable_that_is_not_set_is_status_2(capsys):
  assert main.main(["main", "--config", "quickstart", "--workdir", "$NOT_SET/run"]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and "variable NOT_SET" in error


@pytest.mark.parametrize("path", ["runs[1]/a", "runs/*", "what?/run"])
def test_a_workdir_that_is_a_pattern_is_refused(path, tmp_path):
  """Orbax would save checkpoints there that nothing can read."""
  with pytest.raises(vc.UserError, match=r"expected a path without \*, \? and \[, got /"):
    vc.run_stage("search", tiny_config(), tmp_path / path)
  assert not (tmp_path / path).exists()


def test_python(home):
  files.write(vc.load(TINY, num_classes=10)[1], str(home / "w.safetensors"))
  save_plan(mini_plan(), home / "plan.json")
  plan = vc.load_plan(home / "plan.json")
  assert vc.load_plan("~/plan.json") == vc.load_plan("$ASKED/plan.json") == plan
  model, _ = vc.load(MINI, "bundled", pathlib.Path("~/plan.json"))
  assert model.layers == plan.layers_for(vc.get_spec(MINI))
  vc.load(TINY, "~/w.safetensors", num_classes=10)
  vc.load(TINY, pathlib.Path("${ASKED}/w.safetensors"), num_classes=10)
  config = tiny_config()
  config.evaluate.token_maps = 0
  assert vc.run_stage("evaluate", config, "~/run") == json.loads(
    (home / "run/result.json").read_text()
  )
  for load in (vc.load_exported, exported.load_exported):
    with pytest.raises(vc.UserError, match=f"{home}/run/manifest.json: expected an export's"):
      load("~/run")


def test_data(home):
  (home / "data/val/cat").mkdir(parents=True)
  PIL.Image.new("RGB", (8, 8)).save(home / "data/val/cat/1.png")
  for folder in ("~/data", "$ASKED/data"):
    assert len(sources.make_source("folder", folder, "val", (1, 1), 0)) == 1
  with pytest.raises(vc.UserError, match=str(home)):
    sources.make_source("fashion_mnist", "~/no_tfds", "test", (1, 1), 0)


def test_masks_and_plans_of_a_config(home):
  folder = ROOT / "configs/plans/fashion_mnist"
  shutil.copytree(folder, home / "plans")
  config = vc.default_config()
  config.model.variant, config.model.weights = MINI, "bundled"
  config.data.pad, config.model.plan = 1, "~/plans/diffrate@0.5-seed0.json"
  config.compare.plans = config.visualize.plans = ("~/plans/diffrate@0.8-seed1.json",)
  config.compare.methods, config.compare.budgets = ("diffrate",), (0.5, 0.8)
  config.compare.searched, config.compare.random_schedules = "$ASKED/plans", 0
  config.slim.masks = "~/masks.safetensors"
  run = open_run(from_config_dict(config), home / "run")
  assert run.artefacts.plan == vc.load_plan(folder / "diffrate@0.5-seed0.json")
  compare.check(run)
  found = methods.searched_before(run.config, "diffrate", 0.8)
  assert found == [home / f"plans/diffrate@0.8-seed{seed}.json" for seed in range(3)]
  visualize.check(run)
  (home / "run/finished").mkdir(parents=True)
  row = Row(method="diffrate", budget=0.8)
  result = dataclasses.replace(table.empty_result(run), rows=(row,))
  result.write(home / "run/finished/compare.json")
  assert list(visualize._compared(run)) == ["diffrate@0.8"]
  config.model.plan = None
  with pytest.raises(vc.UserError, match=f"{home}/masks.safetensors"):
    vc.run_stage("slim", config, home / "slimmed")


def test_predictions(home, capsys):
  image = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
  PIL.Image.fromarray(image).save(home / "cost$5.png")
  shutil.copy(ROOT / f"vitcomp_jax/bundled/{MINI}.safetensors", home / "w.safetensors")
  save_plan(mini_plan(), home / "plan.json")
  options = ["--plan", "$ASKED/plan.json", "--weights", "~/w.safetensors", "--maps", "~/maps"]
  assert predict.main(["predict", *options, "~/cost$5.png"]) == 0
  assert capsys.readouterr().out.startswith("~/cost$5.png\n")
  assert (home / "maps/1_cost$5.png").exists()
  for option, said in (
    ("--workdir", "none: expected the workdir of a run"),
    ("--exported", "none: expected an export's folder or a file"),
  ):
    assert predict.main(["predict", option, "~/none", "$ASKED/cost$5.png"]) == 2
    assert f"{home}/{said}" in capsys.readouterr().err
  assert predict.main(["predict", "--maps", "~/$NOT_SET", *options[:4], "~/cost$5.png"]) == 2
  assert "variable NOT_SET" in capsys.readouterr().err


def _tool(name):
  return runpy.run_path(str(ROOT / f"{name}.py"))["main"]


def test_tools(home, monkeypatch, capsys):
  prepare = _tool("tools/prepare_fashion_mnist")
  assert prepare(["--source", "~/idx"]) == 2
  assert f"{home}/idx: expected Fashion-MNIST" in capsys.readouterr().err
  assert prepare(["--source", "$NOT_SET"]) == 2
  assert "variable NOT_SET" in capsys.readouterr().err
  side_by_side = _tool("benchmarks/side_by_side")
  for options, said in (
    (["--json", "~/none/found.json"], f"got {home}/none/found.json"),
    (["--torch-python", "~/python"], f"{home}/python"),
  ):
    assert side_by_side(["--only", "plan", *options]) == 2
    assert said in capsys.readouterr().err
  unset = ["--json", "$NOT_SET/found.json"]
  monkeypatch.setattr("sys.argv", ["input_pipeline", *unset])
  for name, arguments in (("latency_model", [unset]), ("input_pipeline", [])):
    with pytest.raises(SystemExit):
      _tool(f"benchmarks/{name}")(*arguments)
    assert "variable NOT_SET" in capsys.readouterr().err
