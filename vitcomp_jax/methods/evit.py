"""EViT: keeps the tokens that CLS attends to, and fuses the others into one.

Liang et al., `EViT <https://arxiv.org/abs/2202.07800>`_, ICLR 2022. It learns weights only.
"""

import dataclasses
import math
from collections.abc import Sequence

from vitcomp_jax.methods.base import Layers, Method, Schedule, quarters
from vitcomp_jax.models.importance import IMPORTANCES
from vitcomp_jax.models.reducers import StaticReducer
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.tokens import AttentionStats, TokenReducer, Tokens
from vitcomp_jax.ops import select

_WARMUP_PHASES = 7


@dataclasses.dataclass(frozen=True)
class AttentiveSelect(StaticReducer):
  """EViT's reduction: keeps the tokens that CLS attends to most, and fuses the others into one.

  The fused token is the sum of the others, weighted by importance: the attention that CLS pays to
  them. It is appended at the end, and is an ordinary token from then on.

  Attributes:
    keep: Tokens to keep, including the prefix but not the fused token.
    fuse: Whether the other tokens are fused instead of dropped.
    importance: Importance metric, see `PruneMerge`; models without CLS use one other than `cls`.

  References:
    Liang et al., `EViT <https://arxiv.org/abs/2202.07800>`_, 2022, Sec. 3.2 and Eq. 4.
  """

  type_name = "attentive_select"

  keep: int
  fuse: bool = True
  importance: str = "cls"

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    assert stats is not None, "AttentiveSelect needs the attention's statistics"
    if self.keep >= tokens.x.shape[1]:
      return tokens
    importance = IMPORTANCES[self.importance](stats, tokens)
    order = select.importance_order(importance, tokens.num_prefix, self.keep)
    return tokens.fuse(order, importance) if self.fuse else tokens.take(order)

  def count(self, n: int) -> int:
    return n if self.keep >= n else self.keep + self.fuse


def layers(
  spec: ViTSpec,
  keep_rate: Sequence[int | float],
  fuse: bool = True,
  tokens: Sequence[int | None] | None = None,
) -> Layers:
  """Makes EViT's layers.

  Args:
    spec: The model.
    keep_rate: Share of the tokens after the prefix that each layer keeps, rounded up; fused
      tokens of earlier layers count.
    fuse: Whether the other tokens are fused into one.
    tokens: Number of tokens after the prefix that each layer keeps, instead of a rate; None: use
      the rate.

  References:
    Liang et al., `EViT <https://arxiv.org/abs/2202.07800>`_, 2022, Sec. 3.
  """
  made, n = [], 0
  for i, (layer, rate, count) in enumerate(
    zip(spec.dense_layers, keep_rate, tokens or [None] * spec.depth, strict=True)
  ):
    n = spec.starts.get(i, n)
    left = math.ceil(rate * (n - spec.num_prefix)) if count is None else count
    reduce: TokenReducer = layer.reduce
    if left < n - spec.num_prefix:
      reduce = AttentiveSelect(left + spec.num_prefix, fuse, spec.importance())
    n = reduce.count(n)
    made.append(dataclasses.replace(layer, reduce=reduce))
  return tuple(made)


def warmup(spec: ViTSpec, planned: Layers, steps: int) -> list[tuple[int, Layers]]:
  """Returns phases in which EViT's keep rates fall from 1 to a plan's along a cosine.

  The authors change the rates at every step. Each set of rates must be compiled, so there are only
  eight phases here, including the plan's.

  Args:
    spec: The model.
    planned: The plan's layers.
    steps: Steps of the warm-up.

  Returns:
    The first step and the layers of each phase.
  """
  rates, n = [], 0
  for i, layer in enumerate(planned):
    n = spec.starts.get(i, n)
    kept = layer.reduce.keep if isinstance(layer.reduce, AttentiveSelect) else n
    rates.append(min(1.0, (kept - spec.num_prefix) / (n - spec.num_prefix)))
    n = layer.reduce.count(n)
  fuse = any(isinstance(layer.reduce, AttentiveSelect) and layer.reduce.fuse for layer in planned)
  phases = []
  for phase in range(_WARMUP_PHASES):
    share = (1 - math.cos(math.pi * phase / _WARMUP_PHASES)) / 2
    softened = layers(spec, [1 - share * (1 - rate) for rate in rates], fuse)
    mixed = (
      dataclasses.replace(layer, reduce=soft.reduce)
      for layer, soft in zip(planned, softened, strict=True)
    )
    phases.append((steps * phase // _WARMUP_PHASES, tuple(mixed)))
  return [*phases, (steps, planned)]


def _after_quarters(fuse: bool) -> Schedule:
  """Returns EViT with one keep rate at each quarter of the depth, as its authors do at depth 12."""

  def at(spec: ViTSpec, strength: float) -> Layers:
    places = quarters(spec)
    return layers(spec, [1 - strength if i in places else 1 for i in range(spec.depth)], fuse)

  return at


METHOD = Method(
  (AttentiveSelect,),
  {"evit": _after_quarters(fuse=True), "evit_nofuse": _after_quarters(fuse=False)},
)
