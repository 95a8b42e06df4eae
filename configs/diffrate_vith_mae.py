"""Searches with DiffRate on ViT-H (MAE), ImageNet-1k.

Paper: Chen et al., DiffRate, ICCV 2023 (https://arxiv.org/abs/2305.17997).

  python -m vitcomp_jax.main --config configs/diffrate_vith_mae.py:103.4

The number after the colon is the budget in GMACs, by default 103.4. `imagenet2012` must have been
prepared by TFDS in ArrayRecord format. The weights are MAE's official fine-tuned weights,
`mae_finetuned_vit_huge.pth`, from MAE's authors: download them, and set the path with
`--config.model.weights=PATH`. Reading a `.pth` file requires PyTorch.

Published results without fine-tuning (DiffRate with the authors' own schedule, which is the plan
`diffrate/mae_huge@103.4`):

  dense    167.296 GMACs  86.88 % top-1  (as re-evaluated by later work)
  DiffRate 103.337 GMACs  86.664 % top-1, 97.894 % top-5  (DiffRate README)

Neither these accuracies nor the duration of the search were measured here.
"""

import ml_collections

from vitcomp_jax.configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  return common.diffrate_imagenet(
    arg, "vit_huge_patch14_224.mae", "mae_finetuned_vit_huge.pth", 103.4
  )
