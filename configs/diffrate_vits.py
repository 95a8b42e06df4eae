"""Searches with DiffRate on DeiT-S, ImageNet-1k.

Paper: Chen et al., DiffRate, ICCV 2023 (https://arxiv.org/abs/2305.17997).

  python -m vitcomp_jax.main --config configs/diffrate_vits.py:2.9

The number after the colon is the budget in GMACs, by default 2.9. `imagenet2012` must have been
prepared by TFDS in ArrayRecord format. The weights are downloaded from the Hugging Face hub,
`timm/deit_small_patch16_224.fb_in1k`.

Published results without fine-tuning (DiffRate with the authors' own schedule, which is the plan
`diffrate/deit_small@2.9`):

  dense      4.599 GMACs  79.9 % top-1  (DeiT README)
  DiffRate   2.905 GMACs  79.538 % top-1, 94.828 % top-5  (DiffRate README)

Neither these accuracies nor the duration of the search were measured here.
"""

import ml_collections

from vitcomp_jax.configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  return common.diffrate_imagenet(
    arg, "deit_small_patch16_224", "timm/deit_small_patch16_224.fb_in1k", 2.9
  )
