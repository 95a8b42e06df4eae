"""Quick start: compresses a small ViT to 35 % of its MACs in two to three minutes on two CPU cores.

    python -m vitcomp_jax.main --config configs/quickstart.py

The package bundles everything it needs: 6,000 images of Fashion-MNIST, and the weights from
`configs/pretrain_fashion_mnist.py`. DiffRate (Chen et al., ICCV 2023, arXiv 2305.17997) learns how
many tokens each layer keeps, without fine-tuning. The report compares the dense model, the searched
plan, ToMe, and two hand-made schedules with the same MACs. At such a low budget the test images can
tell the methods apart; down to half of the MACs, merging to the same count in all layers is about
as good on this model.
"""

import ml_collections

from vitcomp_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
  config = default_config()
  config.stages = ("search", "evaluate", "visualize")
  config.model.variant = "vit_mini_patch3_30"
  config.model.weights = "bundled"
  config.data.name = "bundled"
  config.data.pad = 1
  config.budget.fraction = 0.35
  config.evaluate.baselines = ("tome", "uniform", "uniform_merge")
  return config
