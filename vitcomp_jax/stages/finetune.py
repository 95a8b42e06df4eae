"""Stages `pretrain` and `finetune`: train the weights of the dense or of the compressed model."""

from typing import Any

import jax
import jax.numpy as jnp

from vitcomp_jax.api import Params
from vitcomp_jax.config import TrainConfig
from vitcomp_jax.convert import files
from vitcomp_jax.data.transforms import normalize
from vitcomp_jax.models.spec import LayerSpec, with_drop_path
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.ops import losses
from vitcomp_jax.stages.run import Run, write_for_timm
from vitcomp_jax.training import loop, optimizer
from vitcomp_jax.training.step import LossFn, init_state, make_step


def check(run: Run) -> None:
  """Refuses what cannot be trained."""
  run.check_trainable("finetune")


def finetune(run: Run) -> dict[str, Any]:
  """Trains the model under the plan in force, from the weights in force.

  Returns:
    The steps, images and minutes it took. The weights are in `finetuned.safetensors`.
  """
  teacher = run.dense_params if run.config.distill.kind != "none" else None
  params = run.params_before_finetune
  summary = fit(run, "finetune", run.config.finetune, run.layers, params, made(run), teacher)
  if run.plan and run.plan.indices:
    summary["timm"] = write_for_timm(run, run.layers, run.params)
  return summary


def made(run: Run) -> str:
  """The path of the weights."""
  return str(run.workdir / "finetuned.safetensors")


def fit(
  run: Run,
  stage: str,
  config: TrainConfig,
  layers: tuple[LayerSpec, ...],
  params: Params,
  path: str,
  teacher: Params | None = None,
) -> dict[str, Any]:
  """Trains weights on the labels, and from a teacher where there is one.

  Args:
    run: With the data.
    stage: Names checkpoints and figures.
    config: How to train.
    layers: Of the model.
    params: To start from.
    path: Where the weights go, under timm's names.
    teacher: Weights of the dense model.

  Returns:
    The steps, images and minutes it took.
  """
  spec, data = run.spec, run.train_data
  tx = optimizer.train_optimizer(config, data.num_examples)
  steps = optimizer.train_steps(config, data.num_examples)
  keeps_ema = config.ema is not None
  loss_fn = _loss(run, config, ViT(spec, with_drop_path(layers, config.drop_path)), teacher)
  state, seconds = loop.train(
    stage=stage,
    workdir=run.workdir,
    state=init_state(params, {}, tx, ("params",), run.config.seed, keeps_ema),
    step_fn=make_step(loss_fn, tx, ("params",), config.ema),
    batches=lambda done: data.train_batches(config.batch_size, done),
    steps=steps,
    log_every=config.log_every,
    checkpoint_every=config.checkpoint_every,
  )
  files.write(state.ema if keeps_ema else state.params, path, {"variant": spec.name})
  run.forget()
  return {"steps": steps, "images": steps * config.batch_size, "minutes": round(seconds / 60, 2)}


def _loss(run: Run, config: TrainConfig, model: ViT, teacher: Params | None) -> LossFn:
  distill, dense = run.config.distill, ViT(run.spec, run.spec.dense_layers)

  def loss_fn(params, arch, batch, key, step):
    del arch, step
    images, labels = normalize(batch["image"], run.preprocess), batch["label"]
    logits = model.apply({"params": params}, images, rngs={"drop_path": key})
    loss = losses.cross_entropy(logits, labels, config.label_smoothing)
    if teacher is not None:
      target = jax.lax.stop_gradient(dense.apply({"params": teacher}, images))
      learnt = losses.distillation(logits, target, distill.kind, distill.temperature)
      loss = (1 - distill.weight) * loss + distill.weight * learnt
    return loss, {"top1": 100 * jnp.mean(jnp.argmax(logits, axis=1) == labels)}

  return loss_fn
