"""The tool that judges embeddings by a linear classifier."""

import json

import numpy as np
import pytest

import vitcomp_jax as vc
from tests import tiny_config
from tests.tiny_main import TINY, tiny_spec
from tools import linear_probe
from vitcomp_jax.config import from_config_dict
from vitcomp_jax.models.variants import VARIANTS


def test_the_fit_is_at_its_minimum(optax_promotion):
  rng = np.random.default_rng(0)
  features, labels = rng.normal(size=(60, 4)).astype(np.float32), rng.integers(0, 3, 60)
  weights, bias = linear_probe.fit(features, labels, 3)
  logits = features @ weights + bias
  chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  wrong = (chance - np.eye(3)[labels]) / 60
  gradient = features.T @ wrong + 2 * linear_probe._DECAY * weights
  np.testing.assert_allclose(gradient, 0, atol=1e-5)
  np.testing.assert_allclose(wrong.sum(axis=0), 0, atol=1e-5)


@pytest.mark.slow
def test_a_run_is_judged(tmp_path, capsys, optax_promotion):
  config, workdir, file = tiny_config.get_config(), tmp_path / "run", tmp_path / "found.json"
  config.model.variant, config.model.weights = "vit_mini_patch3_30", "bundled"
  config.model.projection, config.data.pad = True, 1
  config.stages, config.evaluate.baselines = ("evaluate",), ("tome",)
  vc.run(from_config_dict(config), workdir)
  assert linear_probe.main([str(workdir), "--json", str(file)]) == 0
  dense, tome = json.loads(file.read_text())["rows"]
  assert (dense["name"], tome["name"]) == ("dense", "tome")
  assert dense["cosine"] == 1.0 and dense["top1"] > 60
  result = json.loads((workdir / "result.json").read_text())
  assert tome["cosine"] == pytest.approx(result["rows"][1]["cosine"], abs=1e-5)
  assert "cosine" in capsys.readouterr().out


def test_a_classifier_is_refused(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(VARIANTS, TINY, tiny_spec())
  config = tiny_config.get_config()
  config.stages = ("evaluate",)
  vc.run(from_config_dict(config), tmp_path)
  assert linear_probe.main([str(tmp_path)]) == 2
  assert "expected a model that gives embeddings" in capsys.readouterr().err
