"""Slims DeiT-B with ViT-Slim on ImageNet-1k.

Paper: Chavan et al., ViT-Slim, CVPR 2022 (https://arxiv.org/abs/2201.00814). Weights: timm's
`deit_base_patch16_224.fb_in1k`.

  python -m vitcomp_jax.main --config configs/vitslim_vitb.py:0.6 --config.data.dir=DIR

The number after the colon is the share of head dimensions and hidden units to keep, by default 0.6;
see `configs/vitslim_vits.py` for several shares from one search, and `configs/common.py` for the
sources of the recipe. This needs accelerators.

Published result (not measured here) on the 50,000 validation images after re-training: 82.4 % top-1
at 10.6 GMACs and 52.6 million parameters, with 0.6 of the head dimensions and hidden units.
"""

import ml_collections

from vitcomp_jax.configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = arg or "0.6"
  return common.vitslim_imagenet(arg, "deit_base_patch16_224", "timm/deit_base_patch16_224.fb_in1k")
