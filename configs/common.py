"""Settings shared by several experiments."""

from collections.abc import Collection

import ml_collections

from vitcomp_jax.config import default_config
from vitcomp_jax.errors import UserError

IMAGENET_TRAIN_IMAGES = 1_281_167


def imagenet(variant: str, weights: str | None) -> ml_collections.ConfigDict:
  """Returns a config for ImageNet-1k with DeiT's augmentation (Touvron et al., 2021, Table 9).

  This includes random crops and flips, RandAugment, random erasing, Mixup, CutMix and three
  repetitions.

  Args:
    variant: Name of the model.
    weights: Weights of the model; None for random weights.
  """
  config = default_config()
  config.model.variant = variant
  config.model.weights = weights
  data = config.data
  data.name = "imagenet2012"
  data.augment = "rand_augment"
  data.erase = 0.25
  data.mixup = 0.8
  data.cutmix = 1.0
  data.repeats = 3
  data.workers = 16
  return config


def deit_training(training: ml_collections.ConfigDict, epochs: float) -> None:
  """Sets DeiT's optimization in a config.

  That is: AdamW, learning rate 5e-4 per 512 images, 5 epochs of warm-up, cosine decay to 1e-5,
  weight decay 0.05, label smoothing 0.1 and stochastic depth 0.1.

  Args:
    training: The part of a config to change.
    epochs: Number of epochs.
  """
  training.epochs = epochs
  training.batch_size = 1024
  training.learning_rate = 5e-4
  training.learning_rate_for = 512
  training.min_learning_rate = 5e-6
  training.warmup_epochs = 5.0
  training.drop_path = 0.1
  training.clip_norm = None
  training.checkpoint_every = 1000


def diffrate_finetuning(
  variant: str, weights: str, plan: str, drop_path: float, large: bool = False
) -> ml_collections.ConfigDict:
  """Returns a config that fine-tunes and evaluates DiffRate's published plan on ImageNet-1k.

  As in the authors' code, it trains for 30 epochs with a learning rate from 2e-5 to 1e-6 and DeiT's
  augmentation. The rest is DeiT's recipe.

  Args:
    variant: Name of the model.
    weights: Fine-tuned weights of the model.
    plan: Name of the published plan.
    drop_path: Stochastic depth at the last layer.
    large: Whether to shard the state over the devices and compute in half precision.
  """
  config = imagenet(variant, weights)
  config.stages = ("finetune", "evaluate", "visualize")
  if large:
    config.parallel.mode = "fsdp"
    config.model.dtype = "bfloat16"
  config.model.plan = plan
  training = config.finetune
  deit_training(training, 30.0)
  training.learning_rate = 2e-5
  training.min_learning_rate = 1e-6
  training.learning_rate_for = None
  training.warmup_epochs = 0.0
  training.drop_path = drop_path
  config.evaluate.before_finetune = True
  return config


def diffrate_imagenet(
  arg: str | None, variant: str, weights: str, gmacs: float
) -> ml_collections.ConfigDict:
  """Returns a config that searches with DiffRate on ImageNet-1k as its authors did, and evaluates.

  The authors' settings are their recipe, 3 epochs of batches of 1,024 images, a learning rate from
  0.01 to 0.001 with their epoch-wise cosine, candidates 4 tokens apart, logits that start at zero,
  a budget term with weight 5, label smoothing of 0.1, and DeiT's augmentation. Only their
  stochastic depth of 0.1 is left out.

  Args:
    arg: Budget in GMACs, the ARG of `--config FILE:ARG`; None for `gmacs`.
    variant: Name of the model.
    weights: Fine-tuned weights of the model.
    gmacs: Default budget in GMACs.
  """
  config = imagenet(variant, weights)
  config.stages = ("search", "evaluate", "visualize")
  config.budget.gmacs = budget(arg, gmacs)

  search = config.search
  search.recipe = "paper"
  search.batch_size = 1024
  search.epoch_steps = IMAGENET_TRAIN_IMAGES // search.batch_size
  search.steps = 3 * search.epoch_steps
  search.learning_rate = 0.01
  search.min_learning_rate = 0.001
  search.schedule = "authors"
  search.adam_b2 = 0.999
  search.granularity = 4
  search.budget_weight = 5.0
  search.label_smoothing = 0.1
  search.checkpoint_every = 250
  return config


def check_part(part: str, known: Collection[str]) -> None:
  """Rejects an ARG of `--config FILE:ARG` that is not a part of the file.

  Raises:
    UserError: If it is not one of the known parts.
  """
  if part not in known:
    raise UserError(f"config: expected one of {', '.join(known)} behind the colon, got {part}.")


def budget(arg: str | None, default: float) -> float:
  """Parses the ARG of `--config FILE:ARG`, which is a budget or a share.

  Raises:
    ValueError: If it is not a number.
  """
  if not arg:
    return default
  try:
    return float(arg)
  except ValueError:
    raise ValueError(f"budget behind the colon: expected a number, got {arg!r}") from None


def vitslim_imagenet(arg: str | None, variant: str, weights: str) -> ml_collections.ConfigDict:
  """Returns a config for ViT-Slim on ImageNet-1k: 50 epochs of search, 300 of re-training.

  The authors' settings are the epochs, the weights of the three norms, and masks with the weights'
  learning rate and no weight decay. The rest is DeiT's recipe, see `imagenet` and `deit_training`.

  Args:
    arg: Share of head dimensions and hidden units to keep, the ARG of `--config FILE:ARG`; None for
      0.7.
    variant: Name of the model.
    weights: Weights of the model.
  """
  config = imagenet(variant, weights)
  config.stages = ("slim", "finetune", "evaluate", "visualize")
  share = budget(arg, 0.7)
  config.slim.budgets = (share, share, 1.0)
  deit_training(config.slim, 50.0)
  deit_training(config.finetune, 300.0)
  config.evaluate.before_finetune = True
  return config


def vitslim_mini(
  data: str,
  epochs: float,
  finetune_epochs: float,
  warmup_epochs: float,
  mask_learning_rate: float,
  checkpoint_every: int,
) -> ml_collections.ConfigDict:
  """Returns a config that slims, re-trains and evaluates the small ViT with bundled weights.

  Args:
    data: Name of the data set, `bundled` or `fashion_mnist`.
    epochs: Epochs of the search.
    finetune_epochs: Epochs of the re-training.
    warmup_epochs: Epochs of warm-up, for both.
    mask_learning_rate: Learning rate of the masks, which must move far from 1 in a few epochs.
    checkpoint_every: Steps between checkpoints, for both.
  """
  config = default_config()
  config.stages = ("slim", "finetune", "evaluate", "visualize")
  config.model.variant = "vit_mini_patch3_30"
  config.model.weights = "bundled"
  config.data.name = data
  config.data.pad = 1  # from 28 pixels to 30, a multiple of the patch size 3
  for training, length, rate in (
    (config.slim, epochs, 3e-4),
    (config.finetune, finetune_epochs, 5e-4),
  ):
    training.epochs = length
    training.batch_size = 64
    training.warmup_epochs = warmup_epochs
    training.learning_rate = rate
    training.label_smoothing = 0.0
    training.checkpoint_every = checkpoint_every
  config.slim.mask_learning_rate = mask_learning_rate
  config.slim.min_units = 1
  config.distill.kind = "soft"
  config.evaluate.before_finetune = True
  return config
