"""DiffRate: how many tokens each layer keeps, learnt by gradient under a compute budget.

Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, ICCV 2023. `reducer` is what a plan
holds, `search` what learns it; evaluation and export know the first alone.
"""

from vitcomp_jax.methods.base import Method
from vitcomp_jax.methods.diffrate.reducer import PruneMerge

METHOD = Method((PruneMerge,))

__all__ = ["METHOD", "PruneMerge"]
