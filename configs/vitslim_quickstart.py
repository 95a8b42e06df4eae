"""ViT-Slim's quick start: slims a small ViT to 65 % of its MACs, and trains it again, in minutes.

    python -m vitcomp_jax.main --config configs/vitslim_quickstart.py

Everything it needs is in the package, as for `configs/quickstart.py`. ViT-Slim (Chavan et al., CVPR
2022, arXiv 2201.00814) learns which head dimensions and hidden units the network can do without;
they are cut out, and what is left is an ordinary, smaller ViT, which is trained again.
"""

import ml_collections

from vitcomp_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
  config = default_config()
  config.stages = ("slim", "finetune", "evaluate")
  config.model.variant = "vit_mini_patch3_30"
  config.model.weights = "bundled"
  config.data.name = "bundled"
  config.data.pad = 1
  config.budget.fraction = 0.65

  slim = config.slim
  slim.epochs = 2.0
  slim.batch_size = 64
  slim.warmup_epochs = 0.2
  slim.learning_rate = 3e-4
  slim.mask_learning_rate = 0.02  # two epochs are short for masks: they start at 1 and have to move
  slim.label_smoothing = 0.0
  slim.w_patch = 0.0  # `configs/joint_quickstart.py` needs all patches
  slim.min_units = 1
  slim.log_every = 10
  slim.checkpoint_every = 50

  finetune = config.finetune
  finetune.epochs = 2.0
  finetune.batch_size = 64
  finetune.warmup_epochs = 0.2
  finetune.learning_rate = 5e-4
  finetune.label_smoothing = 0.0
  finetune.checkpoint_every = 50
  config.distill.kind = "soft"
  config.evaluate.before_finetune = True
  return config
