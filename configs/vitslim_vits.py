"""Slims DeiT-S with ViT-Slim on ImageNet-1k.

Paper: Chavan et al., ViT-Slim, CVPR 2022 (https://arxiv.org/abs/2201.00814). Weights: timm's
`deit_small_patch16_224.fb_in1k`.

  python -m vitcomp_jax.main --config configs/vitslim_vits.py:0.7 --config.data.dir=DIR

The number after the colon is the share of head dimensions and hidden units to keep, by default 0.7.
One search serves all shares: a second run takes `masks.safetensors` and `searched.safetensors` of
the first as `config.slim.masks` and `config.model.weights`. To cut patches too, set
`--config.slim.budgets="(0.7,0.7,0.8)"`. See `configs/common.py` for the sources of the recipe. This
needs accelerators: the authors' search took 43 hours on a V100.

Published results (their tables 2, 4 and 6; not measured here): top-1 in percent on the 50,000
validation images after re-training, GMACs, and parameters in millions:

  kept   attention and MLP      attention only         MLP only
  1.0    79.90   4.6   22.0
  0.8    80.60   3.7   17.7
  0.7    80.03   3.3   15.6     80.90   4.1   19.9     80.80   3.8   17.8
  0.6    79.20   2.8   13.5     80.63   3.9   19.2     80.39   3.5   16.4
  0.5    77.94   2.3   11.4     80.10   3.7   18.5     79.89   3.2   15.0
  0.4                           79.61   3.5   17.8     79.20   2.9   13.5

  patches kept, with 0.7 of attention and MLP: 1.0 80.03 at 3.3, 0.8 79.91 at 3.1, 0.7 79.72 at
  2.9, 0.6 79.51 at 2.8
"""

import ml_collections

from vitcomp_jax.configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  return common.vitslim_imagenet(
    arg, "deit_small_patch16_224", "timm/deit_small_patch16_224.fb_in1k"
  )
