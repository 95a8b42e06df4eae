"""Stage `pretrain`: trains the dense model, and writes its weights under timm's names."""

from typing import Any

import jax.numpy as jnp

from vitcomp_jax.convert import files
from vitcomp_jax.data.transforms import normalize
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.spec import with_drop_path
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.ops import losses
from vitcomp_jax.stages.run import Run
from vitcomp_jax.training import loop, optimizer
from vitcomp_jax.training.step import init_state, make_step


def check(run: Run) -> None:
  """Refuses what cannot be trained."""
  run.check_classes(run.train_data)
  if not run.train_data.has_labels or not run.spec.num_classes:
    raise UserError(
      f"stage pretrain: expected labels and a classifier, got {run.spec.name} with "
      f"{run.spec.num_classes} classes on {run.train_data.name}."
    )


def pretrain(run: Run) -> dict[str, Any]:
  """Trains from the config's weights, or from scratch.

  Returns:
    The steps, images and minutes it took. The weights are in `weights.safetensors`.
  """
  config, spec, data = run.config.pretrain, run.spec, run.train_data
  model = ViT(spec, with_drop_path(spec.dense_layers, config.drop_path))

  def loss_fn(params, arch, batch, key, step):
    del arch, step
    images = normalize(batch["image"], run.preprocess)
    logits = model.apply({"params": params}, images, rngs={"drop_path": key})
    loss = losses.cross_entropy(logits, batch["label"], config.label_smoothing)
    correct = jnp.argmax(logits, axis=1) == batch["label"]
    return loss, {"top1": 100 * jnp.mean(correct)}

  tx = optimizer.train_optimizer(config, data.num_examples)
  steps = optimizer.train_steps(config, data.num_examples)
  keeps_ema = config.ema is not None
  state, seconds = loop.train(
    stage="pretrain",
    workdir=run.workdir,
    state=init_state(run.params, {}, tx, ("params",), run.config.seed, keeps_ema),
    step_fn=make_step(loss_fn, tx, ("params",), config.ema),
    batches=lambda done: data.train_batches(config.batch_size, done),
    steps=steps,
    log_every=config.log_every,
    checkpoint_every=config.checkpoint_every,
  )
  params = state.ema if keeps_ema else state.params
  files.write(params, made(run), {"variant": spec.name})
  vars(run).pop("params", None)  # later stages read what was written
  return {"steps": steps, "images": steps * config.batch_size, "minutes": round(seconds / 60, 2)}


def made(run: Run) -> str:
  """The path of the weights."""
  return str(run.workdir / "weights.safetensors")
