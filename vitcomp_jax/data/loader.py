"""Opens the splits of a config's data."""

import dataclasses
from collections.abc import Sequence

from vitcomp_jax.config import DataConfig
from vitcomp_jax.data import halves, sources, transforms
from vitcomp_jax.data.dataset import Dataset
from vitcomp_jax.data.sampling import subset
from vitcomp_jax.errors import UserError


def load(
  config: DataConfig,
  split: str,
  pre: transforms.Preprocess,
  seed: int,
  fake_classes: int = 1000,
  source: sources.Source | None = None,
  label_names: Sequence[str] = (),
) -> Dataset:
  """Opens the training or evaluation images of a config.

  Args:
    config: The data part of the config; its `pad` and `crop_pct`, if set, override those of `pre`.
    split: `train` or `eval`.
    pre: Preprocessing of the images.
    seed: Seed of the order, the augmentation and the subset.
    fake_classes: Number of classes of the data set `fake`.
    source: The split, if it is already open.
    label_names: Names of the model's outputs, in order, which the data's classes are matched with;
      empty for the data's own names.

  Returns:
    The data set.

  Raises:
    UserError: If the data set, the split or a value in the config is not usable.
  """
  if split not in ("train", "eval"):
    raise ValueError(f"split: expected train or eval, got {split!r}.")
  for key in ("pad", "crop_pct"):
    if getattr(config, key) is not None:
      pre = dataclasses.replace(pre, **{key: getattr(config, key)})
  _check(config, pre)
  train = split == "train"
  height, width = pre.image_size
  fake_size = height - 2 * pre.pad, width - 2 * pre.pad
  source = source or open_source(config, split, fake_size, fake_classes)
  count = config.train_examples if train else config.eval_examples
  return Dataset(
    source,
    subset(len(source), count, seed, f"config.data.{split}_examples"),
    pre,
    seed,
    augmentation=config if train else DataConfig(),
    skip_corrupt=config.on_error == "skip",
    workers=config.workers,
    label_names=label_names,
  )


def open_source(
  config: DataConfig, split: str, fake_size: tuple[int, int] = (1, 1), fake_classes: int = 1
) -> sources.Source:
  """Opens the files of the training or evaluation split of a config.

  Args:
    config: The data part of the config.
    split: `train` or `eval`.
    fake_size: Height and width of the images of the data set `fake`, in pixels.
    fake_classes: Number of classes of the data set `fake`.

  Raises:
    UserError: If the data set or the split is not usable.
  """
  named = (config.train_split, config.eval_split) != ("train", None)
  if config.name == "folder" and config.divide and not (named or halves.has_splits(config.dir)):
    return halves.half(config.dir, split, config.class_order or "sorted")
  name = config.train_split if split == "train" else config.eval_split
  return sources.make_source(
    config.name, config.dir, name, fake_size, fake_classes, class_order=config.class_order
  )


def _check(config: DataConfig, pre: transforms.Preprocess) -> None:
  for key, known in (("augment", transforms.AUGMENTS), ("on_error", ("stop", "skip"))):
    if getattr(config, key) not in known:
      raise UserError(f"config.data.{key}: expected one of {known}, got {getattr(config, key)!r}.")
  if config.workers < 1:
    raise UserError(f"config.data.workers: expected at least 1, got {config.workers}.")
  side = min(pre.image_size)
  if 2 * pre.pad >= side:
    raise UserError(
      f"config.data.pad: expected less than half of the model's {side} pixels, got {pre.pad}."
    )
