"""ViT-Slim: learns which head dimensions, hidden units and patches a ViT needs.

Chavan et al., `ViT-Slim <https://arxiv.org/abs/2201.00814>`_, CVPR 2022. Plans hold
the static `reducer`; `search` learns masks and cuts them. Evaluation and export import `reducer`
only.
"""

from vitcomp_jax.methods.base import Method
from vitcomp_jax.methods.vit_slim.reducer import KeepPositions

METHOD = Method((KeepPositions,))

__all__ = ["METHOD", "KeepPositions"]
