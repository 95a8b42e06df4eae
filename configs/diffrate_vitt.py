"""Searches with DiffRate on DeiT-Ti, ImageNet-1k.

Paper: Chen et al., DiffRate, ICCV 2023 (https://arxiv.org/abs/2305.17997).

  python -m vitcomp_jax.main --config configs/diffrate_vitt.py:0.9

The number after the colon is the budget in GMACs, by default 0.9. `imagenet2012` must have been
prepared by TFDS in ArrayRecord format. The weights are downloaded from the Hugging Face hub,
`timm/deit_tiny_patch16_224.fb_in1k`.

Published results without fine-tuning (DiffRate with the authors' own schedule, which is the plan
`diffrate/deit_tiny@0.9`):

  dense      1.254 GMACs  72.2 % top-1  (DeiT README)
  DiffRate   0.902 GMACs  71.78 % top-1  (re-measured by others, READMEs of ToaSt and MaMe)

Neither these accuracies nor the duration of the search were measured here.
"""

import ml_collections

from vitcomp_jax.configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  return common.diffrate_imagenet(
    arg, "deit_tiny_patch16_224", "timm/deit_tiny_patch16_224.fb_in1k", 0.9
  )
