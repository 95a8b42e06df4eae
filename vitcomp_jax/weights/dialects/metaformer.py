"""CAFormer under its authors' names, which DiffRate's authors also use.

Yu et al., `MetaFormer Baselines for Vision <https://arxiv.org/abs/2210.13452>`_, 2022.
"""

import re

from vitcomp_jax.weights.dialects.family import Family
from vitcomp_jax.weights.dialects.renaming import Array, reshaped

# In timm, the projections of the first two stages are 1 x 1 convolutions on the grid.
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
