"""Fine-tunes ViT-L (MAE) under DiffRate's published schedule, ImageNet-1k.

Paper: Chen et al., DiffRate, ICCV 2023 (https://arxiv.org/abs/2305.17997).

  python -m vitcomp_jax.main --config configs/finetune_diffrate_vitl_mae.py --config.data.dir=DIR

To use another plan, such as one from `configs/diffrate_vitl_mae.py`, set
`--config.model.plan=RUN/plan.json`. `imagenet2012` must have been prepared by TFDS in ArrayRecord
format; `--config.data.name=fake` tries the command without it. The weights are MAE's official
fine-tuned weights, from its authors: download them, and set the path with
`--config.model.weights=PATH`; reading a `.pth` file requires PyTorch. The state is sharded over the
devices (`config.parallel.mode="fsdp"`).

Published off-the-shelf results (DiffRate README; not measured here): 85.658 % top-1 at 42.29 GMACs;
dense 85.96 % (as re-evaluated by later work).
"""

import ml_collections

from vitcomp_jax.configs import common


def get_config() -> ml_collections.ConfigDict:
  return common.diffrate_finetuning(
    "vit_large_patch16_224.mae",
    "mae_finetuned_vit_large.pth",
    "diffrate/mae_large@42.3",
    drop_path=0.2,
    large=True,
  )
