"""Outputs that are not finite are never right, never written, and end a run in one line."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

import vitcomp_jax as vc
from tests.models import random_params
from tests.stages.test_slim import TINY, tiny_config, tiny_variant  # noqa: F401
from vitcomp_jax import exported, main, predict, scoring, strict_json
from vitcomp_jax.comparison import random_schedules
from vitcomp_jax.config import from_config_dict
from vitcomp_jax.methods.vit_slim import authors
from vitcomp_jax.methods.vit_slim import search as vit_slim
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.parallel import Layout
from vitcomp_jax.runs.run import open_run
from vitcomp_jax.stages import search
from vitcomp_jax.training import step
from vitcomp_jax.training.search import SearchTrainer
from vitcomp_jax.weights import files


@pytest.fixture
def overflowing(tmp_path):
  """Weights that are finite, of a model whose outputs are not."""
  params = random_params(get_spec(TINY, num_classes=10))
  for name in ("fc1", "fc2"):
    params["blocks_1"]["mlp"][name]["kernel"] *= 1e25
  path = tmp_path / "overflowing.safetensors"
  files.write(params, str(path))
  return str(path)


def _config(weights, **slim):
  config = tiny_config(**slim)
  config.model.weights = weights
  return config


@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_example_that_is_not_finite_is_wrong_whatever_its_label(value, classes):
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((classes, classes)).astype(np.float32)
  whole = scoring.scores(jnp.array(logits), jnp.arange(classes))
  logits[0, 0] = logits[1] = logits[2, 1] = value
  found = scoring.scores(jnp.array(logits), jnp.arange(classes))
  for key in ("top1", "top5"):
    np.testing.assert_array_equal(found[key][:3], 0)
  assert not np.isfinite(found["loss"][:3]).any()
  for key, values in found.items():
    np.testing.assert_array_equal(values[3:], whole[key][3:])
  targets = np.eye(classes, dtype=np.float32)
  rest = np.mean(np.argmax(logits[3:], axis=1) == np.arange(3, classes)) if classes > 3 else 0
  expected = 100 * rest * (classes - 3) / classes
  assert float(step.top1(jnp.array(logits), jnp.array(targets))) == pytest.approx(expected)


def test_it_is_one_line_and_status_2(overflowing, tmp_path, capsys):
  options = [f"--config.model.weights={overflowing}", f"--config.model.variant={TINY}"]
  options += ["--config.stages=('evaluate',)", "--config.evaluate.baselines=()"]
  options += ["--config.data.eval_examples=40", "--config.compilation_cache=none"]
  command = ["main", "--config", "quickstart", "--workdir", str(tmp_path / "run"), *options]
  assert main.main(command) == 2
  error = capsys.readouterr().err
  said = "vitcomp_jax: row dense: expected finite outputs, got 40 of 40 that are NaN or infinite;"
  assert [line for line in error.splitlines() if said in line] and "Traceback" not in error
  assert not (tmp_path / "run/result.json").exists()


def test_no_table_holds_it(overflowing, tmp_path):
  for stage in ("evaluate", "compare"):
    with pytest.raises(vc.UserError, match="row dense: expected finite outputs, got 40 of 40"):
      vc.run_stage(stage, _config(overflowing), tmp_path / stage)
    assert not (tmp_path / stage / "result.json").exists()
  assert not list((tmp_path / "compare").rglob("*.npz"))


def test_features_must_be_finite_too(tmp_path):
  params = random_params(get_spec(TINY, num_classes=0))
  for name in ("fc1", "fc2"):
    params["blocks_1"]["mlp"][name]["kernel"] *= 1e25
  files.write(params, str(tmp_path / "w.safetensors"))
  config = _config(str(tmp_path / "w.safetensors"))
  config.model.num_classes = 0
  with pytest.raises(vc.UserError, match="row dense: expected finite outputs, got 40 of 40"):
    vc.run_stage("evaluate", config, tmp_path / "run")


def test_no_random_schedule_holds_it(overflowing, tmp_path):
  config = _config(overflowing)
  config.compare.random_schedules, config.compare.random_examples = 2, 30
  run = open_run(from_config_dict(config), tmp_path / "run")
  said = "random schedule 1 of .* GMACs: expected finite outputs, got 30 of 30"
  path = tmp_path / "run/compare/random@0.8.jsonl"
  with pytest.raises(vc.UserError, match=said):
    random_schedules.points(run, 0.8)
  assert path.read_text() == ""


@pytest.mark.slow
def test_a_search_never_chooses_it(tmp_path, monkeypatch):
  config = tiny_config()
  config.search.log_every, config.budget.fraction = 1, 0.8
  vc.run_stage("search", config, tmp_path)
  run = open_run(from_config_dict(config), tmp_path)
  trainer, trained = search.trainer(run), search.task(run)

  def best(losses):
    monkeypatch.setattr(SearchTrainer, "_losses", lambda *_: losses)
    return trainer.choose(trained.state, run.artefacts.params, None, [])

  found = best([math.inf, math.nan, 1.0, 2.0])
  assert found.step == 2
  assert [(each.step, each.loss) for each in found.passed] == [(2, 1.0), (4, 2.0)]
  with pytest.raises(vc.UserError, match="expected plans with a finite loss, got 4 of 4"):
    best([math.nan] * 4)


@pytest.mark.parametrize(
  ("losses", "best"),
  [([math.nan, 2.0, 1.0, math.inf, 3.0, 4.0, math.nan], 2), ([math.nan] * 7, 0)],
)
def test_a_search_does_not_start_from_it(losses, best, tmp_path, monkeypatch):
  config = tiny_config()
  config.budget.fraction = 0.8
  run = open_run(from_config_dict(config), tmp_path)
  trainer = search.trainer(run)
  starts = list(trainer.method.starts().values())
  monkeypatch.setattr(SearchTrainer, "_losses", lambda self, tables, *_: losses[: len(tables)])
  _, arch = trainer.start(run.artefacts.params, None, [{}])
  expected = trainer.method.rates.arch(starts[best])
  jax.tree.map(np.testing.assert_array_equal, arch, expected)


def test_a_plan_with_one_bad_batch_has_no_loss(tmp_path, monkeypatch):
  config = tiny_config()
  config.budget.fraction = 0.8
  run = open_run(from_config_dict(config), tmp_path)
  trainer, given = search.trainer(run), iter([1.0, math.nan, 2.0, 4.0])
  monkeypatch.setattr(Layout, "get", lambda self, tree: next(given))
  counts = np.full((run.inputs.spec.depth, 2), 9.0)
  batches = itertools.islice(run.inputs.train_batches(8, 0), 2)
  bad, good = trainer._losses([counts, counts], run.artefacts.params, None, batches)
  assert math.isnan(bad) and good == 3.0


def test_no_slimmed_network_gives_it(overflowing, tmp_path):
  config = _config(overflowing, w_patch=0.0, budgets=(0.8, 0.8, 1.0))
  config.slim.masks = str(tmp_path / "masks.safetensors")
  run = open_run(from_config_dict(config), tmp_path / "none")
  arch = vit_slim.ViTSlim(run.inputs.spec).init()
  files.write(authors.to_authors(arch), config.slim.masks)
  said = "stage slim: the slimmed network: expected finite outputs, got 160 of 160"
  with pytest.raises(vc.UserError, match=said):
    vc.run_stage("slim", config, tmp_path / "run")
  assert not (tmp_path / "run/slimmed.safetensors").exists()
  assert not (tmp_path / "run/plan.json").exists()

  masks = files.read(config.slim.masks)
  name = next(iter(masks))
  masks[name].flat[:2] = np.nan, np.inf
  safetensors.numpy.save_file(masks, config.slim.masks)
  with pytest.raises(vc.UserError, match="config.slim.masks: expected finite masks, got 2 of "):
    vc.run_stage("slim", config, tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_no_artefact_gives_it(overflowing, tmp_path):
  config = _config(overflowing)
  config.export.formats = ("stablehlo",)
  with pytest.raises(vc.UserError, match="export: the model: expected finite outputs, got 640"):
    vc.run_stage("export", config, tmp_path)
  assert not list((tmp_path / "export").iterdir())


def test_no_picture_shows_it(overflowing, tmp_path):
  with pytest.raises(vc.UserError, match="stage visualize: row dense: expected finite outputs"):
    vc.run_stage("visualize", _config(overflowing), tmp_path)


@pytest.mark.parametrize("how", ["weights", "exported"])
def test_no_prediction_comes_of_it(how, overflowing, tmp_path, monkeypatch, capsys):
  images = [str(tmp_path / name) for name in ("one.png", "two.png")]
  for image in images:
    PIL.Image.new("RGB", (30, 30), (9, 9, 9)).save(image)
  if how == "weights":
    options = ["--weights", overflowing, "--variant", TINY]
  else:
    spec = get_spec(TINY, num_classes=10)
    about = {"mean": spec.mean, "std": spec.std, "image_size": (30, 30), "crop_pct": 1.0}
    about["interpolation"] = "bicubic"
    manifest = {
      "input": {"shape": ["b", 30, 30, 3], "dtype": "uint8", "preprocess": about, "normalized": 0},
      "output": {"name": "logits", "shape": ["b", 10]},
      "class_names": None,
    }
    logits = np.zeros((2, 10), np.float32)
    logits[1, 3:] = np.nan
    found = exported.Exported(lambda _: logits, manifest)
    monkeypatch.setattr(predict, "load_exported", lambda _: found)
    options = ["--exported", "somewhere"]
  assert predict.main(["predict", *options, *images]) == 2
  said, error = capsys.readouterr()
  image, count = (images[0], 10) if how == "weights" else (images[1], 7)
  assert said == "" and error.count("\n") == 1
  assert f"vitcomp_jax: {image}: expected finite outputs, got {count} of 10 that" in error


@pytest.mark.slow
def test_a_comparison_on_one_example_has_no_errors(tmp_path):
  config = tiny_config()
  config.model.weights = str(tmp_path / "w.safetensors")
  files.write(random_params(get_spec(TINY, num_classes=10)), config.model.weights)
  config.data.eval_examples = 1
  config.compare.methods, config.compare.budgets = ("diffrate", "tome"), (0.8,)
  config.compare.seeds, config.compare.random_schedules, config.compare.random_examples = 1, 2, 1
  rows = vc.run_stage("compare", config, tmp_path / "run")["rows"]
  assert {"top1_over_reference", "loss_over_reference"} <= rows[2].keys()
  assert not [key for row in rows for key in row if key.endswith("_se")]
  for path in [*(tmp_path / "run").rglob("*.json"), *(tmp_path / "run").rglob("*.jsonl")]:
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    assert [strict_json.loads(line) for line in lines]
  report = (tmp_path / "run/report.md").read_text()
  assert "tome@0.8" in report and "±" not in report.partition("## Figures")[0]
