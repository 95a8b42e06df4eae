"""Searches with DiffRate on ViT-B (MAE), ImageNet-1k.

Paper: Chen et al., DiffRate, ICCV 2023 (https://arxiv.org/abs/2305.17997).

  python -m vitcomp_jax.main --config configs/diffrate_vitb_mae.py:11.5

The number after the colon is the budget in GMACs, by default 11.5. `imagenet2012` must have been
prepared by TFDS in ArrayRecord format. The weights are MAE's official fine-tuned weights,
`mae_finetuned_vit_base.pth`, from MAE's authors: download them, and set the path with
`--config.model.weights=PATH`. Reading a `.pth` file requires PyTorch.

Published results without fine-tuning (DiffRate with the authors' own schedule, which is the plan
`diffrate/mae_base@11.5`):

  dense     17.564 GMACs  83.7 % top-1  (as re-evaluated by later work)
  DiffRate  11.517 GMACs  82.864 % top-1, 96.148 % top-5  (DiffRate README)

Neither these accuracies nor the duration of the search were measured here.
"""

import ml_collections

from vitcomp_jax.configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  return common.diffrate_imagenet(
    arg, "vit_base_patch16_224.mae", "mae_finetuned_vit_base.pth", 11.5
  )
