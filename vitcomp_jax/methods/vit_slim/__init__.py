"""ViT-Slim: which head dimensions, hidden units and patches a ViT can do without.

Chavan et al., `ViT-Slim <https://arxiv.org/abs/2201.00814>`_, CVPR 2022. `reducer` is what a plan
holds, `search` what learns masks and cuts; evaluation and export know the first alone.
"""

from vitcomp_jax.methods.base import Method
from vitcomp_jax.methods.vit_slim.reducer import KeepPositions

METHOD = Method((KeepPositions,))

__all__ = ["METHOD", "KeepPositions"]
