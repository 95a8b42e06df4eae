"""Compares methods after training, on a DeiT-Ti for ten classes of ImageNet, on a CPU.

  python -m vitcomp_jax.main --config configs/compare_imagenette.py:dense --config.data.dir=DIR \\
    --workdir runs/imagenette_dense
  python -m vitcomp_jax.main --config configs/compare_imagenette.py --config.data.dir=DIR

`DIR` holds the photos as a TFDS data set, `imagenette224`: Imagenette's ten classes of ImageNet, at
224 pixels, with 5,000 images for training and 3,925 for evaluation. The part after the colon is one
of

- `dense`: gives the model a new head with ten classes, and trains all weights for one epoch;
- `finetuned`, the default: starts from these weights, and trains DiffRate, ToMe, EViT, DynamicViT,
  ViT-Slim, and DiffRate's search of tokens and widths for one epoch each, at 65 and 50 % of the
  MACs; rows without training are included.

Most of these images are also in ImageNet's training set, on which the weights were trained.
"""

import ml_collections

from vitcomp_jax.config import default_config
from vitcomp_jax.configs import common

PARTS = ("dense", "finetuned")


def get_config(part: str = "finetuned") -> ml_collections.ConfigDict:
  common.check_part(part, PARTS)
  config = default_config()
  config.model.variant = "deit_tiny_patch16_224"
  config.data.name = "imagenette224"
  config.data.crop_pct = 1.0
  config.data.augment = "flip_shift"
  config.evaluate.batch_size = 25
  if part == "dense":
    config.stages = ("pretrain", "evaluate")
    config.model.weights = "timm/deit_tiny_patch16_224.fb_in1k"
  else:
    config.stages = ("compare",)
    config.model.weights = "runs/imagenette_dense/weights.safetensors"

  compare = config.compare
  compare.budgets = compare.finetune_budgets = (0.65, 0.5)
  compare.methods = ("diffrate", "diffrate[what=widths]", "diffrate[what=both]", "tome", "evit")
  compare.finetuned = ("diffrate", "diffrate[what=both]", "tome", "evit", "dynamicvit", "vit_slim")

  for training in (config.pretrain, config.slim, config.finetune):
    training.epochs = 1.0
    training.batch_size = 64
    training.learning_rate = 1e-4
    training.warmup_epochs = 0.1
    training.checkpoint_every = 20
    training.log_every = 10
  config.slim.mask_learning_rate = 0.02
  config.slim.w_patch = 0.0
  config.finetune.keep_rate_epochs = 0.3
  config.distill.kind = "soft"
  config.distill.tokens = 0.5
  return config
