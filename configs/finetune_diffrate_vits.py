"""Fine-tunes DeiT-S under DiffRate's published schedule, ImageNet-1k.

Paper: Chen et al., DiffRate, ICCV 2023 (https://arxiv.org/abs/2305.17997).

  python -m vitcomp_jax.main --config configs/finetune_diffrate_vits.py --config.data.dir=DIR

To use another plan, such as one from `configs/diffrate_vits.py`, set
`--config.model.plan=RUN/plan.json`. `imagenet2012` must have been prepared by TFDS in ArrayRecord
format; `--config.data.name=fake` tries the command without it.

Published results (DiffRate's paper; not measured here): 79.8 % top-1 after fine-tuning at 2.9
GMACs; dense 79.9 %. Off the shelf, the same schedule reaches 79.538 % (DiffRate README).
"""

import ml_collections

from vitcomp_jax.configs import common


def get_config() -> ml_collections.ConfigDict:
  return common.diffrate_finetuning(
    "deit_small_patch16_224",
    "timm/deit_small_patch16_224.fb_in1k",
    "diffrate/deit_small@2.9",
    drop_path=0.1,
  )
