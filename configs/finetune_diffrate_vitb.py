"""Fine-tunes DeiT-B under DiffRate's published schedule, ImageNet-1k.

Paper: Chen et al., DiffRate, ICCV 2023 (https://arxiv.org/abs/2305.17997).

  python -m vitcomp_jax.main --config configs/finetune_diffrate_vitb.py --config.data.dir=DIR

To use another plan, such as one from `configs/diffrate_vitb.py`, set
`--config.model.plan=RUN/plan.json`. `imagenet2012` must have been prepared by TFDS in ArrayRecord
format; `--config.data.name=fake` tries the command without it.

Published off-the-shelf results (DiffRate README; not measured here): 81.498 % top-1 at 11.517
GMACs; dense 81.8 % (DeiT README).
"""

import ml_collections

from vitcomp_jax.configs import common


def get_config() -> ml_collections.ConfigDict:
  return common.diffrate_finetuning(
    "deit_base_patch16_224",
    "timm/deit_base_patch16_224.fb_in1k",
    "diffrate/deit_base@11.5",
    drop_path=0.1,
  )
