"""Trains DeiT-S from scratch on ImageNet-1k with DeiT's recipe.

Paper: Touvron et al., DeiT, ICML 2021 (https://arxiv.org/abs/2012.12877).

  python -m vitcomp_jax.main --config configs/pretrain_vits.py --config.data.dir=DIR

`imagenet2012` must have been prepared by TFDS in ArrayRecord format; `--config.data.name=fake`
tries the command without it. Training needs accelerators.

Published result (DeiT README; not measured here): 79.9 % top-1.
"""

import ml_collections

from vitcomp_jax.configs import common


def get_config() -> ml_collections.ConfigDict:
  config = common.imagenet("deit_small_patch16_224", None)
  config.stages = ("pretrain", "evaluate")
  common.deit_training(config.pretrain, 300.0)
  config.pretrain.ema = 0.99996
  return config
