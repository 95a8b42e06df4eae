"""CAFormer under the names of its authors, which DiffRate's authors use too.

Yu et al., `MetaFormer Baselines for Vision <https://arxiv.org/abs/2210.13452>`_, 2022.
"""

import re

from vitcomp_jax.weights.dialects.family import Family
from vitcomp_jax.weights.dialects.renaming import Array, reshaped

# On their grid the first two stages have, in timm, projections as convolutions of single places.
_ON_GRID = r"stages\.[01]\.blocks\..*\.weight"


def _as_convolutions(state: dict[str, Array]) -> dict[str, Array]:
  for name, tensor in state.items():
    if tensor.ndim == 2 and re.fullmatch(_ON_GRID, name):
      state[name] = reshaped(tensor, *tensor.shape, 1, 1)
  return state


CAFORMER = Family(
  "CAFormer",
  lambda names: "downsample_layers.0.conv.weight" in names,
  patterns=(
    (r"^downsample_layers\.0\.(post_)?", "stem."),
    (r"^downsample_layers\.(\d+)\.(pre_)?", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^head\.", "head.fc."),
    (r"^norm\.", "head.norm."),
  ),
  finish=_as_convolutions,
)
