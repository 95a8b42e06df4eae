"""Searches with DiffRate on DeiT-B, ImageNet-1k.

Paper: Chen et al., DiffRate, ICCV 2023 (https://arxiv.org/abs/2305.17997).

  python -m vitcomp_jax.main --config configs/diffrate_vitb.py:11.5

The number after the colon is the budget in GMACs, by default 11.5. `imagenet2012` must have been
prepared by TFDS in ArrayRecord format. The weights are downloaded from the Hugging Face hub,
`timm/deit_base_patch16_224.fb_in1k`.

Published results without fine-tuning (DiffRate with the authors' own schedule, which is the plan
`diffrate/deit_base@11.5`):

  dense     17.564 GMACs  81.8 % top-1  (DeiT README)
  DiffRate  11.517 GMACs  81.498 % top-1, 95.404 % top-5  (DiffRate README)

Neither these accuracies nor the duration of the search were measured here.
"""

import ml_collections

from vitcomp_jax.configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  return common.diffrate_imagenet(
    arg, "deit_base_patch16_224", "timm/deit_base_patch16_224.fb_in1k", 11.5
  )
