"""Differences between the code of DiffRate's authors and this library."""

import dataclasses

from vitcomp_jax.models.spec import ViTSpec


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Options that reproduce the authors' code to the last digit; defaults are this library's.

  Attributes:
    signed_similarity: Whether a merged token adds its size times the similarity even if that is
      negative; otherwise times max(similarity, 0), so that a receiver's size never shrinks.
    whole_sizes: Whether a merged token adds its whole size, regardless of similarity.
    first_receives: Whether the most important token may receive others.
    clamp_size: Whether the search clamps sizes to at least 1 at every merge, which a deployed plan
      does not do.
    mask_follows: Whether sorting moves a token's mask with it. If not, values are the same, as
      dropped tokens stay behind the kept ones, but a rate gets the gradient of the dropped token
      that is later at its rank.
    learns_shares: Whether counts are learnt directly (`LearntCounts`), with the gradient of a
      merged token's share in its receiver. Otherwise they are learnt by logits of candidates
      (`LogitCounts`), and merging a token has the same gradient as pruning it.
    mask_eps: Smoothing of the masked softmax.
    relative_budget: Whether the budget term is in units of the dense model's cost / 4.6 (its
      coefficient is for DeiT-S with 4.6 GMACs), so that one coefficient suits every model;
      otherwise in 1e9 multiply-accumulates.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, and its authors' code.
  """

  signed_similarity: bool = False
  whole_sizes: bool = False
  first_receives: bool = True
  clamp_size: bool = False
  mask_follows: bool = True
  learns_shares: bool = True
  mask_eps: float = 0.0
  relative_budget: bool = True


OURS = Recipe()
_PAPER = Recipe(
  signed_similarity=True,
  clamp_size=True,
  learns_shares=False,
  mask_eps=1e-6,
  relative_budget=False,
)
_PAPER_CAFORMER = Recipe(
  signed_similarity=True,
  whole_sizes=True,
  first_receives=False,
  mask_follows=False,
  learns_shares=False,
  mask_eps=1e-6,
  relative_budget=False,
)


def recipe(name: str, spec: ViTSpec) -> Recipe:
  """Returns a recipe by its name in configs.

  Args:
    name: `ours` or `paper`.
    spec: The model; the authors' code for CAFormer differs from that for ViTs.
  """
  if name == "ours":
    return OURS
  return _PAPER_CAFORMER if len(spec.starts) > 1 else _PAPER
