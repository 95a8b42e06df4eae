"""Optimizers and schedules of training and search."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from vitcomp_jax.config import SearchConfig, SlimConfig, TrainConfig


def train_steps(config: TrainConfig, num_examples: int) -> int:
  """Returns the number of steps of a training."""
  return max(1, math.ceil(config.epochs * num_examples / config.batch_size))


def train_schedule(config: TrainConfig, num_examples: int) -> optax.Schedule:
  """Returns a schedule of linear warm-up and cosine decay to the minimum learning rate."""
  steps = train_steps(config, num_examples)
  warmup = min(steps - 1, round(config.warmup_epochs * num_examples / config.batch_size))
  scale = config.batch_size / (config.learning_rate_for or config.batch_size)
  return optax.warmup_cosine_decay_schedule(
    0.0, scale * config.learning_rate, warmup, steps, scale * config.min_learning_rate
  )


FROZEN = "frozen"


def per_group(
  group_of: Callable[[tuple[str, ...]], str], groups: Mapping[str, optax.GradientTransformation]
) -> optax.GradientTransformation:
  """Returns an optimizer for each group of variables; the group `FROZEN` is not updated.

  Args:
    group_of: Maps a variable's path to its group.
    groups: The optimizers by group.
  """

  def labels(variables: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, _: group_of(tuple(str(key.key) for key in path)), variables
    )

  return optax.partition({**groups, FROZEN: optax.set_to_zero()}, labels)


def is_of_norm(path: tuple[str, ...]) -> bool:
  """Returns whether a variable is a norm's weight or bias."""
  return any("norm" in name for name in path)


def train_optimizer(config: TrainConfig, num_examples: int) -> optax.GradientTransformation:
  """Returns AdamW, which decays only kernels, not biases, norms, tokens or positions."""
  return _clipped(config, num_examples, _is_kernel)


def mask_optimizer(config: SlimConfig, num_examples: int) -> optax.GradientTransformation:
  """Returns AdamW for ViT-Slim's masks, with their own learning rate and weight decay."""
  rate = config.mask_learning_rate or config.learning_rate
  config = dataclasses.replace(config, learning_rate=rate, weight_decay=config.mask_weight_decay)
  return _clipped(config, num_examples, None)


def _clipped(
  config: TrainConfig, num_examples: int, decays: Callable[[Any], Any] | None
) -> optax.GradientTransformation:
  adamw = optax.adamw(
    train_schedule(config, num_examples), weight_decay=config.weight_decay, mask=decays
  )
  if config.clip_norm is None:
    return adamw
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def _is_kernel(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def search_schedule(config: SearchConfig, epoch_steps: int) -> optax.Schedule:
  """Returns the learning rate schedule of a search.

  Args:
    config: Its `schedule` is `cosine`, which changes every step, or `authors`, which changes every
      epoch and lags by one epoch: three epochs from 0.01 to 0.001 use 0.01, 0.01 and 0.00775.
    epoch_steps: Steps per epoch, for `authors`.
  """
  if config.schedule == "cosine":
    alpha = config.min_learning_rate / config.learning_rate
    return optax.cosine_decay_schedule(config.learning_rate, config.steps, alpha)
  epochs = math.ceil(config.steps / epoch_steps)
  span = config.learning_rate - config.min_learning_rate

  def late_cosine(epoch: int) -> float:
    progress = max(epoch - 1, 0) / epochs
    return config.min_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2

  rates = [optax.constant_schedule(late_cosine(epoch)) for epoch in range(epochs)]
  return optax.join_schedules(rates, [epoch_steps * epoch for epoch in range(1, epochs)])


def search_optimizer(config: SearchConfig, epoch_steps: int) -> optax.GradientTransformation:
  """Returns Adam without weight decay for the search variables."""
  return optax.adam(search_schedule(config, epoch_steps), b2=config.adam_b2)
