"""Collects what DiffRate's authors' code does otherwise than this library."""

import dataclasses

from vitcomp_jax.models.spec import ViTSpec


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Options that reproduce the authors' code to the last digit; the defaults are this library's.

  Attributes:
    signed_similarity: Whether a merged token adds its size times the similarity even where that is
      negative; otherwise times max(similarity, 0), so that no size can shrink below its own.
    whole_sizes: Whether a merged token adds its whole size, whatever the similarity.
    first_receives: Whether the most important token may receive others.
    clamp_size: Whether sizes are clamped to 1 wherever a merge happens while searching, which a
      deployed plan does not do.
    mask_follows: Whether a token takes its mask along when tokens are sorted. If not, no value
      differs, as dropped tokens stay behind the kept ones, but a rate gets the gradient of
      whichever dropped token stands there later.
    mask_eps: Smoothing of the masked softmax.
    relative_budget: Whether the budget term counts in units of the dense model's cost / 4.6 (its
      coefficient is for DeiT-S, which has 4.6 GMACs), so that one coefficient serves every model;
      otherwise in 1e9 multiply-accumulates.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, and its authors' code.
  """

  signed_similarity: bool = False
  whole_sizes: bool = False
  first_receives: bool = True
  clamp_size: bool = False
  mask_follows: bool = True
  mask_eps: float = 0.0
  relative_budget: bool = True


OURS = Recipe()
_PAPER = Recipe(signed_similarity=True, clamp_size=True, mask_eps=1e-6, relative_budget=False)
_PAPER_CAFORMER = Recipe(
  signed_similarity=True,
  whole_sizes=True,
  first_receives=False,
  mask_follows=False,
  mask_eps=1e-6,
  relative_budget=False,
)


def recipe(name: str, spec: ViTSpec) -> Recipe:
  """Returns a recipe by the name that configs use.

  Args:
    name: `ours` or `paper`.
    spec: The model: the authors' code for CAFormer, whose convolutions need every token back on
      the grid, is another than that for ViTs.
  """
  if name == "ours":
    return OURS
  return _PAPER_CAFORMER if len(spec.starts) > 1 else _PAPER
