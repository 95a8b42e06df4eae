"""Stage `pretrain`: trains the dense model, and writes its weights under timm's names."""

from typing import Any

from vitcomp_jax.stages.finetune import fit
from vitcomp_jax.stages.run import Run


def check(run: Run) -> None:
  """Refuses what cannot be trained."""
  run.check_trainable("pretrain")
  run.check_batches("pretrain")


def pretrain(run: Run) -> dict[str, Any]:
  """Trains from the config's weights, or from scratch.

  Returns:
    The steps, images and minutes it took. The weights are in `weights.safetensors`.
  """
  layers = run.spec.dense_layers
  return fit(run, "pretrain", run.config.pretrain, layers, run.dense_params, made(run))


def made(run: Run) -> str:
  """The path of the weights."""
  return str(run.workdir / "weights.safetensors")
