"""DiffRate on DeiT-B, ImageNet-1k.

Paper: Chen et al., DiffRate, ICCV 2023 (https://arxiv.org/abs/2305.17997).

  python -m vitcomp_jax.main --config configs/diffrate_vitb.py:11.5

The number behind the colon is the budget in GMACs, 11.5 if left out. `imagenet2012` must have been
prepared by TFDS in ArrayRecord form. The weights are fetched from the Hugging Face hub,
`timm/deit_base_patch16_224.fb_in1k`.

Published, without fine-tuning (of the authors' own schedule where DiffRate is concerned, which is
the plan `diffrate/deit_base@11.5`):

  dense     17.564 GMACs  81.8 % top-1  (DeiT README)
  DiffRate  11.517 GMACs  81.498 % top-1, 95.404 % top-5  (DiffRate README)

Nothing was measured here: neither these figures nor how long the search takes.
"""

import ml_collections

from vitcomp_jax.configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  return common.diffrate_imagenet(
    arg, "deit_base_patch16_224", "timm/deit_base_patch16_224.fb_in1k", 11.5
  )
