"""The loop around the step: what ends it early, and profiles."""

import json
import signal

import numpy as np
import pytest

import vitcomp_jax as vc
from tests.stages.test_slim import tiny_config, tiny_variant  # noqa: F401
from vitcomp_jax.runs.inputs import Inputs
from vitcomp_jax.training.preemption import Preemption
from vitcomp_jax.weights import files


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_tells_what_led_to_it(tmp_path, monkeypatch):
  config = tiny_config()
  config.model.weights = str(tmp_path / "start.safetensors")
  files.write(vc.load(config.model.variant, num_classes=10)[1], config.model.weights)
  config.finetune.learning_rate, config.finetune.epochs = 1e30, 4.0
  config.finetune.clip_norm, config.finetune.checkpoint_every = None, 1
  config.finetune.warmup_epochs, config.finetune.log_every = 0.4, 100
  with pytest.raises(vc.UserError, match="expected a finite loss, got nan at step"):
    vc.run_stage("finetune", config, tmp_path / "run")
  failure = json.loads((tmp_path / "run/failure.json").read_text())
  assert failure["stage"] == "finetune" and failure["loss"] == "nan"
  assert failure["checkpoint"] == failure["step"] - 1
  assert len(failure["indices"]) == 16 and len(np.unique(failure["indices"])) == 16
  folders = [p.name for p in (tmp_path / "run/checkpoints/finetune").iterdir()]
  assert max(int(name) for name in folders if name.isdigit()) == failure["checkpoint"]


@pytest.fixture
def foreground():
  """Ctrl-C means something; in the background it may be ignored, these tests being there or not."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("why", ["Ctrl-C", pytest.param("a corrupt image", marks=pytest.mark.slow)])
def test_what_ends_it_early_loses_no_step(why, tmp_path, monkeypatch, foreground):
  """Though a checkpoint is far away: the same command goes on where it was."""
  config = tiny_config()
  config.budget.fraction, config.search.choose_images = 0.8, 0
  alone = vc.run_stage("search", config, tmp_path / "alone")
  batches = Inputs.train_batches

  def ending(inputs, size, start):
    for step, batch in enumerate(batches(inputs, size, start), start + 1):
      if start == 0 and step == 3:
        if why == "a corrupt image":
          raise vc.UserError("Corrupt image")
        signal.raise_signal(signal.SIGINT)
      yield batch

  monkeypatch.setattr(Inputs, "train_batches", ending)
  expected = {"Ctrl-C": KeyboardInterrupt, "a corrupt image": vc.UserError}[why]
  with pytest.raises(expected, match="ended at step 3 of" if why == "Ctrl-C" else "Corrupt"):
    vc.run_stage("search", config, tmp_path / "cut")
  done = 3 if why == "Ctrl-C" else 2
  assert (tmp_path / f"cut/checkpoints/search/{done}").is_dir()
  assert vc.run_stage("search", config, tmp_path / "cut") == alone


def test_the_second_interrupt_ends_it_at_once(foreground):
  with Preemption() as preemption, pytest.raises(KeyboardInterrupt):
    signal.raise_signal(signal.SIGINT)
    assert preemption.reached(1)
    signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_ignored_stays_ignored(foreground):
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with Preemption() as preemption:
    signal.raise_signal(signal.SIGINT)
    assert not preemption.reached(1)


@pytest.mark.slow
def test_a_profile_is_written(tmp_path):
  config = tiny_config()
  config.profile.steps, config.budget.fraction = (2, 3), 0.8
  vc.run_stage("search", config, tmp_path)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
  keys = "learning_rate", "images_per_second", "step_s", "input_wait_s", "peak_memory_gb", "gmacs"
  assert set(keys) <= record.keys()
