"""The loop around the step: a loss that is not finite, and profiles."""

import json

import numpy as np
import pytest

import vitcomp_jax as vc
from tests.stages.test_slim import tiny_config, tiny_variant  # noqa: F401
from vitcomp_jax.convert import files


def test_a_loss_that_is_not_finite_stops_and_tells_what_led_to_it(tmp_path, monkeypatch):
  config = tiny_config()
  config.model.weights = str(tmp_path / "start.safetensors")
  files.write(vc.load(config.model.variant, num_classes=10)[1], config.model.weights)
  config.finetune.learning_rate, config.finetune.epochs = 1e30, 4.0
  config.finetune.clip_norm, config.finetune.checkpoint_every = None, 1
  config.finetune.warmup_epochs, config.finetune.log_every = 0.4, 100
  with pytest.raises(vc.UserError, match="expected a finite loss, got nan at step"):
    vc.finetune(config, tmp_path / "run")
  failure = json.loads((tmp_path / "run/failure.json").read_text())
  assert failure["stage"] == "finetune" and failure["loss"] == "nan"
  assert failure["checkpoint"] == failure["step"] - 1
  assert len(failure["indices"]) == 16 and len(np.unique(failure["indices"])) == 16
  folders = [p.name for p in (tmp_path / "run/checkpoints/finetune").iterdir()]
  assert max(int(name) for name in folders if name.isdigit()) == failure["checkpoint"]


def test_a_profile_is_written(tmp_path):
  config = tiny_config()
  config.profile.steps, config.budget.fraction = (2, 3), 0.8
  vc.search(config, tmp_path)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
  keys = "learning_rate", "images_per_second", "step_s", "input_wait_s", "peak_memory_gb", "gmacs"
  assert set(keys) <= record.keys()
