"""Searches with DiffRate on a small ViT trained on Fashion-MNIST, with the full data set.

Paper: Chen et al., DiffRate, ICCV 2023 (https://arxiv.org/abs/2305.17997), whose authors did not
use this data set. The weights are bundled with the package.

  python tools/prepare_fashion_mnist.py
  python -m vitcomp_jax.main --config configs/diffrate_fashion_mnist.py:0.65

The number after the colon is the budget as a share of the dense model's MACs, by default 0.65. The
search uses the 60,000 training images, and the evaluation the 10,000 test images. Hand-made
schedules with the same MACs are also evaluated. There is no published accuracy to compare with; the
results of a run are in its `report.md`.
"""

import ml_collections

from vitcomp_jax.config import default_config
from vitcomp_jax.configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  config = default_config()
  config.stages = ("search", "evaluate")
  config.model.variant = "vit_mini_patch3_30"
  config.model.weights = "bundled"
  config.data.name = "fashion_mnist"
  config.data.pad = 1  # from 28 pixels to 30, a multiple of the patch size 3
  config.budget.fraction = common.budget(arg, 0.65)
  config.evaluate.baselines = ("uniform", "uniform_merge")
  return config
