"""Compares all methods at 80 %, 65 % and 50 % of the MACs, on Fashion-MNIST with bundled weights.

  python tools/prepare_fashion_mnist.py
  python -m vitcomp_jax.main --config configs/compare_fashion_mnist.py:off_the_shelf

The part after the colon is one of

- `off_the_shelf`, the default: the methods without training, and DiffRate's rates with three seeds;
- `again`: the same with the plans already searched in `configs/plans`, in minutes;
- `random`: DiffRate's plans among 300 random schedules for each budget, on 2,000 images;
- `finetuned`: DiffRate, ToMe, EViT, DynamicViT and ViT-Slim at 65 %, each trained for the same
  number of epochs from the same weights with the same distillation;
- `ablation`: the effect of DiffRate's importance, actions, images and steps, at 50 %;
- `tuning`: `off_the_shelf` on the 5,000 training images that are held out for choosing settings.

Searching and training use the first 55,000 training images, and evaluation all 10,000 test images.
One line in `methods` or `finetuned` adds a method. An interrupted comparison is resumed. The
results are in `docs/results.md`.
"""

import pathlib

import ml_collections

from vitcomp_jax.config import default_config
from vitcomp_jax.configs import common

PARTS = ("off_the_shelf", "again", "random", "finetuned", "ablation", "tuning")


def get_config(part: str = "off_the_shelf") -> ml_collections.ConfigDict:
  common.check_part(part, PARTS)
  config = default_config()
  config.stages = ("compare",)
  config.model.variant = "vit_mini_patch3_30"
  config.model.weights = "bundled"
  config.data.name = "fashion_mnist"
  config.data.train_split = "train[:55000]"
  config.data.pad = 1  # from 28 pixels to 30, a multiple of the patch size 3
  if part == "tuning":
    config.data.eval_split = "train[55000:]"
  if part in ("again", "random"):
    plans = pathlib.Path(__file__).parent / "plans" / "fashion_mnist"
    config.compare.searched = str(plans)

  # CLS attention is a poor importance metric for this small model; see docs/results.md.
  config.search.importance = "mean_attention"
  config.search.steps = 160
  config.search.batch_size = 32
  config.evaluate.batch_size = 50

  compare = config.compare
  compare.budgets = (0.8, 0.65, 0.5)
  compare.seeds = 3
  if part in ("off_the_shelf", "again", "tuning"):
    compare.methods = (
      "diffrate",
      "tome",
      "tome_late",
      "evit",
      "evit_nofuse",
      "uniform",
      "uniform[importance=cls]",
      "uniform_merge",
      "uniform_merge[importance=cls]",
      "linear",
      "linear_merge",
      "random",
    )
  elif part == "random":
    compare.methods = ("diffrate",)
    compare.random_schedules = 300
  elif part == "finetuned":
    compare.budgets = ()
    compare.finetuned = ("diffrate", "tome", "evit", "dynamicvit", "vit_slim")
  else:
    compare.budgets = (0.5,)
    compare.methods = (
      "diffrate",
      *(f"diffrate[importance={name}]" for name in ("cls", "value_norm", "random")),
      *(f"diffrate[actions={name}]" for name in ("prune", "merge")),
      *(f"diffrate[data.train_examples={count}]" for count in (100, 300, 1000, 3000, 10000)),
      *(f"diffrate[steps={count}]" for count in (20, 40, 80, 320)),
    )

  for training in (config.slim, config.finetune):
    training.epochs = 0.5
    training.batch_size = 64
    training.warmup_epochs = 0.1
    training.label_smoothing = 0.0
    training.checkpoint_every = 100
  config.slim.learning_rate = 3e-4
  config.slim.mask_learning_rate = 0.02
  config.slim.w_patch = 0.0
  config.slim.min_units = 1
  config.finetune.learning_rate = 5e-4
  config.finetune.keep_rate_epochs = 0.15
  config.distill.kind = "soft"
  config.distill.tokens = 0.5
  return config
