"""What several experiments share."""

import ml_collections

from vitcomp_jax.config import default_config

IMAGENET_TRAIN_IMAGES = 1_281_167


def diffrate_imagenet(
  arg: str | None, variant: str, weights: str, gmacs: float
) -> ml_collections.ConfigDict:
  """DiffRate's search on ImageNet-1k, three epochs as its authors ran it, and an evaluation.

  From the authors: 3 epochs of batches of 1,024 images, learning rate 0.01 falling to 0.001 by
  their epoch-wise cosine, candidates 4 tokens apart, rates that start at zero, label smoothing of
  0.1. Ours, as the defaults of `SearchConfig`: no clamp of sizes, no stochastic depth, the budget
  term relative to the dense model. Of the authors' augmentation only random crops and flips are
  there; RandAugment, random erasing, mixup, cutmix and repeated augmentation are not.

  Args:
    arg: What stands behind the colon in `--config FILE:ARG`: the budget in GMACs; none: `gmacs`.
    variant: The model.
    weights: Its fine-tuned weights.
    gmacs: The budget where no argument is given.
  """
  config = default_config()
  config.stages = ("search", "evaluate")
  config.model.variant = variant
  config.model.weights = weights
  config.data.name = "imagenet2012"
  config.data.augment = "crop_flip"
  config.data.workers = 16
  config.budget.gmacs = budget(arg, gmacs)

  search = config.search
  search.batch_size = 1024
  search.epoch_steps = IMAGENET_TRAIN_IMAGES // search.batch_size
  search.steps = 3 * search.epoch_steps
  search.learning_rate = 0.01
  search.min_learning_rate = 0.001
  search.schedule = "authors"
  search.adam_b2 = 0.999
  search.granularity = 4
  search.init = "zeros"
  search.label_smoothing = 0.1
  search.checkpoint_every = 250
  return config


def budget(arg: str | None, default: float) -> float:
  """The budget that stands behind the colon of `--config FILE:ARG`."""
  if not arg:
    return default
  try:
    return float(arg)
  except ValueError:
    raise ValueError(f"budget behind the colon: expected a number, got {arg!r}") from None


def vitslim_imagenet(arg: str | None, variant: str, weights: str) -> ml_collections.ConfigDict:
  """ViT-Slim on ImageNet-1k: 50 epochs of search, and 300 of re-training what was cut out.

  From the authors: the epochs, the weights of the three norms, masks that take the weights'
  learning rate and no weight decay. Around that DeiT's recipe: AdamW, batches of 1,024 images,
  learning rate 1e-3 with 5 epochs of warm-up and a cosine, weight decay 0.05, label smoothing 0.1,
  stochastic depth 0.1. Of DeiT's augmentation only random crops and flips are there; RandAugment,
  random erasing, mixup, cutmix and repeated augmentation are not.

  Args:
    arg: What stands behind the colon in `--config FILE:ARG`: the share of head dimensions and of
      hidden units that is kept; none: 0.7.
    variant: The model.
    weights: Its weights.
  """
  config = default_config()
  config.stages = ("slim", "finetune", "evaluate")
  config.model.variant = variant
  config.model.weights = weights
  config.data.name = "imagenet2012"
  config.data.augment = "crop_flip"
  config.data.workers = 16
  share = budget(arg, 0.7)
  config.slim.budgets = (share, share, 1.0)
  config.slim.epochs = 50.0
  config.finetune.epochs = 300.0
  for training in (config.slim, config.finetune):
    training.batch_size = 1024
    training.learning_rate = 1e-3
    training.warmup_epochs = 5.0
    training.drop_path = 0.1
    training.clip_norm = None
    training.checkpoint_every = 1000
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
  """ViT-Slim on the small ViT whose weights ship with the package: search, re-training, evaluation.

  Args:
    data: The data set, `bundled` or `fashion_mnist`.
    epochs: Of the search.
    finetune_epochs: Of the re-training.
    warmup_epochs: Of both.
    mask_learning_rate: A few epochs are short for masks: they start at 1 and have to move.
    checkpoint_every: Steps between checkpoints of both.
  """
  config = default_config()
  config.stages = ("slim", "finetune", "evaluate")
  config.model.variant = "vit_mini_patch3_30"
  config.model.weights = "bundled"
  config.data.name = data
  config.data.pad = 1  # 28 pixels to 30, which patches of 3 divide
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
