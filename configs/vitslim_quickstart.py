"""ViT-Slim's quick start: slims a small ViT to 65 % of its MACs and trains it again, in minutes.

    python -m vitcomp_jax.main --config configs/vitslim_quickstart.py

The package bundles everything it needs, as for `configs/quickstart.py`. ViT-Slim (Chavan et al.,
CVPR 2022, arXiv 2201.00814) learns which head dimensions and hidden units are superfluous; they are
removed, and the smaller ViT is trained again.
"""

import ml_collections

from vitcomp_jax.configs import common


def get_config() -> ml_collections.ConfigDict:
  config = common.vitslim_mini(
    "bundled",
    epochs=2.0,
    finetune_epochs=2.0,
    warmup_epochs=0.2,
    mask_learning_rate=0.02,
    checkpoint_every=50,
  )
  config.budget.fraction = 0.65
  config.slim.w_patch = 0.0  # `configs/joint_quickstart.py` needs all patches
  config.slim.log_every = 10
  return config
