"""Searches with DiffRate on ViT-L (MAE), ImageNet-1k.

Paper: Chen et al., DiffRate, ICCV 2023 (https://arxiv.org/abs/2305.17997).

  python -m vitcomp_jax.main --config configs/diffrate_vitl_mae.py:42.3

The number after the colon is the budget in GMACs, by default 42.3. `imagenet2012` must have been
prepared by TFDS in ArrayRecord format. The weights are MAE's official fine-tuned weights,
`mae_finetuned_vit_large.pth`, from MAE's authors: download them, and set the path with
`--config.model.weights=PATH`. Reading a `.pth` file requires PyTorch.

Published results without fine-tuning (DiffRate with the authors' own schedule, which is the plan
`diffrate/mae_large@42.3`):

  dense     61.555 GMACs  85.96 % top-1  (as re-evaluated by later work)
  DiffRate  42.290 GMACs  85.658 % top-1, 97.442 % top-5  (DiffRate README)

Neither these accuracies nor the duration of the search were measured here.
"""

import ml_collections

from vitcomp_jax.configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  return common.diffrate_imagenet(
    arg, "vit_large_patch16_224.mae", "mae_finetuned_vit_large.pth", 42.3
  )
