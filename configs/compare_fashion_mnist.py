"""All methods at 80 %, 65 % and 50 % of the MACs, on Fashion-MNIST and the weights that ship.

  python tools/prepare_fashion_mnist.py
  python -m vitcomp_jax.main --config configs/compare_fashion_mnist.py

One line in `methods` or `finetuned` adds a method. Off the shelf nothing but DiffRate's rates is
learnt, three seeds each. Fine-tuned, every method has the same epochs, weights and distillation;
DiffRate's search and ViT-Slim's come on top. Searches and trainings see the 60,000 training images,
the table is over all 10,000 test images, the random schedules are over 2,000 of them. On two CPU
cores it takes hours; it goes on where it was cut off. `docs/results.md` has what was measured.
"""

import ml_collections

from vitcomp_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
  config = default_config()
  config.stages = ("compare",)
  config.model.variant = "vit_mini_patch3_30"
  config.model.weights = "bundled"
  config.data.name = "fashion_mnist"
  config.data.pad = 1  # 28 pixels to 30, which patches of 3 divide

  config.compare.methods = (
    "diffrate",
    "tome",
    "tome_late",
    "evit",
    "evit_nofuse",
    "uniform",
    "uniform_merge",
    "linear",
    "linear_merge",
    "random",
  )
  config.compare.budgets = (0.8, 0.65, 0.5)
  config.compare.seeds = 3
  config.compare.random_schedules = 300
  config.compare.finetuned = ("diffrate", "tome", "evit", "dynamicvit", "vit_slim")

  config.search.steps = 300
  for training in (config.slim, config.finetune):
    training.epochs = 1.0
    training.batch_size = 64
    training.warmup_epochs = 0.1
    training.label_smoothing = 0.0
    training.checkpoint_every = 100
  config.slim.learning_rate = 3e-4
  config.slim.mask_learning_rate = 0.01
  config.slim.w_patch = 0.0
  config.slim.min_units = 1
  config.finetune.learning_rate = 5e-4
  config.finetune.keep_rate_epochs = 0.3
  config.distill.kind = "soft"
  config.distill.tokens = 0.5
  return config
