"""Slims a small ViT trained on Fashion-MNIST with ViT-Slim, with the full data set.

Paper: Chavan et al., ViT-Slim, CVPR 2022 (https://arxiv.org/abs/2201.00814), whose authors did not
use this data set. The weights are bundled with the package.

  python tools/prepare_fashion_mnist.py
  python -m vitcomp_jax.main --config configs/vitslim_fashion_mnist.py
  python -m vitcomp_jax.main --config configs/vitslim_fashion_mnist.py:both@0.7

The argument after the colon is the dimension to search, `attn`, `mlp`, `both` or `all` (which
includes patches), and the share of it to keep. Without a share, attention and MLP are cut to half
of the model's MACs. Search and re-training use the 60,000 training images, and evaluation uses the
10,000 test images. There is no published accuracy to compare with; results are in
`docs/results.md`.
"""

import ml_collections

from vitcomp_jax.configs import common
from vitcomp_jax.errors import UserError

_SEARCHED = {"attn": (1, 0, 0), "mlp": (0, 1, 0), "both": (1, 1, 0), "all": (1, 1, 1)}


def get_config(arg: str = "both") -> ml_collections.ConfigDict:
  kind, _, share = arg.partition("@")
  if kind not in _SEARCHED:
    raise UserError(f"config: expected one of {', '.join(_SEARCHED)} behind the colon, got {arg}.")
  searched = _SEARCHED[kind]

  config = common.vitslim_mini(
    "fashion_mnist",
    epochs=1.0,
    finetune_epochs=3.0,
    warmup_epochs=0.1,
    mask_learning_rate=0.01,
    checkpoint_every=100,
  )
  if share:
    config.slim.budgets = tuple(float(share) if on else 1.0 for on in searched)
  else:
    config.budget.fraction = 0.5

  attn, mlp, patch = searched
  config.slim.w_attn *= attn
  config.slim.w_mlp *= mlp
  config.slim.w_patch *= patch
  return config
