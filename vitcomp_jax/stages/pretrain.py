"""Stage `pretrain`: trains the dense model and writes its weights under timm's names."""

from vitcomp_jax.results import TrainResult
from vitcomp_jax.runs.run import Run
from vitcomp_jax.stages.finetune import fit, weights_task
from vitcomp_jax.training.loop import Task


def check(run: Run) -> None:
  """Rejects data, a model or a batch size that cannot be used for training."""
  run.inputs.check_trainable("pretrain")
  run.inputs.check_batches("pretrain")


def run(run: Run) -> TrainResult:
  """Trains from the config's weights, or from scratch.

  Returns:
    Steps, images and minutes taken. The weights are written to `weights.safetensors`.
  """
  return fit(run, task(run), run.config.pretrain, made(run))[0]


def task(run: Run) -> Task:
  """Returns the training task."""
  layers, params = run.inputs.spec.dense_layers, run.artefacts.dense_params
  return weights_task(run, "pretrain", run.config.pretrain, layers, params)


def made(run: Run) -> str:
  """Returns the path of the weights."""
  return str(run.workdir.path / "weights.safetensors")
