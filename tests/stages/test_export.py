"""Exported models give the model's outputs, where nothing of this library is imported."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

import vitcomp_jax as vc
from tests.stages.test_slim import TINY, tiny_config, tiny_variant  # noqa: F401
from vitcomp_jax import exporting, predict
from vitcomp_jax.config import from_config_dict
from vitcomp_jax.methods import diffrate, evit, tome, vit_slim
from vitcomp_jax.methods.dynamicvit import PredictorSelect
from vitcomp_jax.models import reducers
from vitcomp_jax.models.slicing import LayerIndex
from vitcomp_jax.plans import PlanLayer, make_plan, save_plan
from vitcomp_jax.stages import run_stages
from vitcomp_jax.weights import files

# What a user has who has JAX and nothing else of what this library needs.
PLAIN = """
import sys
import jax, numpy as np
from jax import export
images, artefact, to = sys.argv[1:]
call = export.deserialize(bytearray(open(artefact, "rb").read())).call
images = np.load(images)
assert not any(name.startswith(("vitcomp", "flax")) for name in sys.modules)
np.save(to, np.concatenate([jax.jit(call)(images[:1]), jax.jit(call)(images[1:])]))
"""


def _config(tmp_path, *reductions, select=reducers.keep_all, **options):
  """A tiny model with random weights and a plan of the given reducers."""
  config = tiny_config()
  spec = vc.get_spec(TINY, 10)
  layers = [PlanLayer(select=select if i == 1 else reducers.keep_all) for i in range(spec.depth)]
  for i, reduction in enumerate(reductions):
    layers[i] = PlanLayer(select=layers[i].select, reduce=reduction)
  specs = tuple(p.apply_to(d) for p, d in zip(layers, spec.dense_layers, strict=True))
  save_plan(make_plan(spec, specs, {}), tmp_path / "plan.json")
  model, params = vc.load(TINY, None, tmp_path / "plan.json", 10)
  files.write(params, str(tmp_path / "weights.safetensors"))
  config.model.plan = str(tmp_path / "plan.json")
  config.model.weights = str(tmp_path / "weights.safetensors")
  for key, value in options.items():
    config.export[key] = value
  return config, model, params


def _images(model, count=8):
  pixels = np.random.default_rng(0).integers(0, 256, (count, *model.spec.image_size, 3), np.uint8)
  half = np.float32(0.5)
  return pixels, (pixels.astype(np.float32) / np.float32(255) - half) / half


def _close(got, expected):
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


PRUNE_MERGE = (diffrate.PruneMerge(20, 18), diffrate.PruneMerge(15, 12))


@pytest.mark.slow
def test_plain_jax_runs_it_at_any_batch_size(tmp_path):
  config, model, params = _config(tmp_path, *PRUNE_MERGE)
  manifest = vc.run_stage("export", config, tmp_path / "run")
  pixels, normal = _images(model)
  expected = np.asarray(vc.apply(model, params, normal))

  folder = tmp_path / "run" / "export"
  np.save(tmp_path / "images.npy", pixels)
  command = [sys.executable, "-c", PLAIN, tmp_path / "images.npy", folder / "model.stablehlo"]
  subprocess.run([*command, tmp_path / "logits.npy"], cwd=tmp_path, check=True)
  _close(np.load(tmp_path / "logits.npy"), expected)

  loaded = vc.load_exported(folder)
  _close(loaded(pixels), expected)
  with pytest.raises(ValueError, match="expected uint8"):
    loaded(normal)
  assert loaded.manifest == manifest == json.loads((folder / "manifest.json").read_text())
  (entry,) = manifest["artefacts"]
  assert entry["platforms"] == ["cpu", "cuda", "tpu"]
  assert entry["compared"] == {"images": 64, **entry["compared"]}
  assert entry["compared"]["largest_difference"] < 1e-4
  assert manifest["plan"] == vc.load_plan(tmp_path / "plan.json").to_json()
  assert manifest["gmacs"] == pytest.approx(vc.count_cost(model).gmacs, abs=1e-6)
  assert manifest["input"]["shape"] == ["b", 30, 30, 3] and manifest["input"]["dtype"] == "uint8"
  assert manifest["class_names"][9] == "Ankle boot"

  artefact = folder / "model.stablehlo"
  artefact.write_bytes(artefact.read_bytes()[:-1] + b"x")
  with pytest.raises(vc.UserError, match="not the file that manifest.json"):
    vc.load_exported(artefact)


@pytest.mark.slow
def test_a_prediction_by_an_exported_model_is_the_run_s(tmp_path, capsys):
  config, model, _ = _config(tmp_path, *PRUNE_MERGE, normalize=False)
  config.stages = ("export",)
  run_stages(from_config_dict(config), tmp_path / "run", config.stages)
  _, normal = _images(model)
  assert vc.load_exported(tmp_path / "run" / "export")(normal).shape == (8, 10)
  image = str(tmp_path / "image.png")
  PIL.Image.fromarray(_images(model)[0][0]).save(image)
  assert predict.main(["predict", "--workdir", str(tmp_path / "run"), image]) == 0
  assert predict.main(["predict", "--exported", str(tmp_path / "run" / "export"), image]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[:6] == lines[6:] and "%" in lines[1]
  command = ["predict", "--exported", str(tmp_path / "run" / "export"), "--maps", "m", image]
  assert predict.main(command) == 2
  assert "--maps needs the model itself" in capsys.readouterr().err


@pytest.mark.parametrize("name", [pytest.param("stablehlo", marks=pytest.mark.slow), "timm"])
def test_an_artefact_of_other_weights_is_removed(name, tmp_path, monkeypatch):
  config, *_ = _config(tmp_path, formats=(name,))
  write = exporting.WRITERS[name]

  def of_others(program, path):
    head = program.params["head"]
    changed = {"head": {**head, "bias": head["bias"] + 1e-2}}
    return write(dataclasses.replace(program, params=program.params | changed), path)

  monkeypatch.setitem(exporting.WRITERS, name, of_others)
  with pytest.raises(RuntimeError, match="64 of 64 outputs differ"):
    vc.run_stage("export", config, tmp_path / "run")
  assert not list((tmp_path / "run" / "export").iterdir())
  assert not (tmp_path / "run" / "finished" / "export.json").exists()


def test_even_widths_are_exported_for_timm(tmp_path):
  config, *_ = _config(tmp_path, formats=("timm",))
  index = LayerIndex(((0, 1, 2), (8, 9, 15)), tuple(range(0, 32, 3)))
  spec = vc.get_spec(TINY, 10)
  plan = [PlanLayer(index).apply_to(layer) for layer in spec.dense_layers]
  save_plan(make_plan(spec, tuple(plan), {}, (index,) * spec.depth), tmp_path / "plan.json")
  (entry,) = vc.run_stage("export", config, tmp_path / "run")["artefacts"]
  assert "num_heads=2" in entry["model"] and entry["compared"]["largest_difference"] < 1e-4
  written = files.read(str(tmp_path / "run" / "export" / "timm.safetensors"))
  assert written["blocks.0.attn.qkv.weight"].shape == (18, 16)


def test_what_a_format_cannot_hold_is_refused(tmp_path, monkeypatch):
  config, *_ = _config(tmp_path, *PRUNE_MERGE, formats=("timm",))
  with pytest.raises(vc.UserError, match="does not remove tokens"):
    vc.run_stage("export", config, tmp_path / "run")
  config.stages, config.model.plan = ("search", "export"), None
  with pytest.raises(vc.UserError, match="which the search's plan does"):
    vc.run_stage("export", config, tmp_path / "run")
  config.stages, config.export.formats = ("export",), ("onnx",)
  config.model.dtype = "bfloat16"
  with pytest.raises(
    vc.UserError, match="formats: onnx: expected a model that computes in float32"
  ):
    vc.run_stage("export", config, tmp_path / "run")
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(vc.UserError, match="onnx needs jax2onnx and onnxruntime"):
    vc.run_stage("export", config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of what jax2onnx imports
@pytest.mark.parametrize(
  ("reductions", "select"),
  [
    (PRUNE_MERGE, reducers.keep_all),
    ((tome.BipartiteMerge(4), tome.BipartiteMerge(3)), reducers.keep_all),
    (
      (evit.AttentiveSelect(18), diffrate.PruneMerge(12, 12, importance="value_norm")),
      PredictorSelect(16),
    ),
    (
      (reducers.keep_all, diffrate.PruneMerge(10, 9, importance="mean_attention")),
      vit_slim.KeepPositions(tuple(range(0, 26, 2))),
    ),
  ],
)
def test_onnx_runtime_runs_it_at_any_batch_size(reductions, select, tmp_path):
  config, model, params = _config(tmp_path, *reductions, select=select, formats=("onnx",))
  vc.run_stage("export", config, tmp_path / "run")
  pixels, normal = _images(model)
  expected = np.asarray(vc.apply(model, params, normal))
  loaded = vc.load_exported(tmp_path / "run" / "export" / "model.onnx")
  _close(np.concatenate([loaded(pixels[:1]), loaded(pixels[1:])]), expected)
