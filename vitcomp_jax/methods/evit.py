"""EViT: keeps the tokens that CLS attends to, and fuses the others into one.

Liang et al., `EViT <https://arxiv.org/abs/2202.07800>`_, ICLR 2022. It learns
weights alone.
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

  The fused token is the sum of the others, each times its importance, the attention that CLS pays
  it; it stands last and is a token like any other from then on.

  Attributes:
    keep: Tokens that are kept, prefix included, the fused token not.
    fuse: Whether the others are fused; otherwise they are gone.
    importance: What stands in for the attention of CLS where there is none, see `PruneMerge`.

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
  """EViT's layers.

  Args:
    spec: The model.
    keep_rate: Of each layer, the share of the tokens behind the prefix that is kept, rounded up; a
      fused token of an earlier layer is one of them.
    fuse: Whether the others are fused into one token.
    tokens: Of each layer, how many are kept, whatever the rate; None: as the rate says.

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
  """Layers for the steps in which EViT's keep rates fall from 1 to those of a plan, by a cosine.

  The authors change the rates at every step; each set of rates is compiled, so here there are
  eight, the plan's included.

  Args:
    spec: The model.
    planned: The plan's.
    steps: Of the warm-up.

  Returns:
    The first step of each phase, and its layers.
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
  """EViT with one keep rate after each quarter of the layers, as its authors for depth 12."""

  def at(spec: ViTSpec, strength: float) -> Layers:
    places = quarters(spec)
    return layers(spec, [1 - strength if i in places else 1 for i in range(spec.depth)], fuse)

  return at


METHOD = Method(
  (AttentiveSelect,),
  {"evit": _after_quarters(fuse=True), "evit_nofuse": _after_quarters(fuse=False)},
)
