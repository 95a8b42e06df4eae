"""DiffRate: learns by gradient how many tokens each layer keeps, under a compute budget.

Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, ICCV 2023. Plans hold
the static `reducer`; `search` learns its counts. Evaluation and export import `reducer` only.
"""

from vitcomp_jax.methods.base import Method
from vitcomp_jax.methods.diffrate.reducer import PruneMerge

METHOD = Method((PruneMerge,))

__all__ = ["METHOD", "PruneMerge"]
