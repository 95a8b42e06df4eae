"""Stage `pretrain`: trains the dense model, and writes its weights under timm's names."""

from typing import Any

from vitcomp_jax.runs.run import Run
from vitcomp_jax.stages.finetune import fit, weights_task
from vitcomp_jax.training.loop import Task


def check(run: Run) -> None:
  """Refuses what cannot be trained."""
  run.check_trainable("pretrain")
  run.check_batches("pretrain")


def pretrain(run: Run) -> dict[str, Any]:
  """Trains from the config's weights, or from scratch.

  Returns:
    The steps, images and minutes it took. The weights are in `weights.safetensors`.
  """
  return fit(run, task(run), run.config.pretrain, made(run))


def task(run: Run) -> Task:
  """Returns the training task."""
  return weights_task(run, "pretrain", run.config.pretrain, run.spec.dense_layers, run.dense_params)


def made(run: Run) -> str:
  """The path of the weights."""
  return str(run.workdir / "weights.safetensors")
