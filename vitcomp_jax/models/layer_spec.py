"""One encoder layer as data."""

import dataclasses
import itertools
from typing import Any, NamedTuple

from vitcomp_jax.models.gates import Gate, open_gate
from vitcomp_jax.models.reducers import keep_all
from vitcomp_jax.models.slicing import LayerIndex
from vitcomp_jax.models.tokens import TokenReducer


class Widths(NamedTuple):
  """The widths of a layer over all heads: integers, or the scalars that a search learns.

  Attributes:
    qk: Channels of the queries; the keys have as many.
    value: Channels of the values.
    hidden: Hidden units of the MLP.
  """

  qk: Any
  value: Any
  hidden: Any


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """One encoder layer. Equal specs have equal hashes, so equal models are compiled once.

  Attributes:
    num_heads: Attention heads.
    head_dim: Channels of each head's queries and keys.
    mlp_dim: Hidden units of the MLP.
    qk_scale: Scale of the attention's logits; a slimmed head keeps the scale of the original.
    value_dim: Channels of each head's values; None: as many as `head_dim`. A value equal to
      `head_dim` becomes None.
    select: Reducer before attention.
    reduce: Reducer between attention and MLP.
    token_gate: Gate on the normalised tokens, before attention and before the MLP.
    head_gate: Gate on queries, keys and values.
    hidden_gate: Gate on the MLP's hidden units.
    size_bias: Whether attention is proportional, that is, weighted by the tokens' sizes.
    mask_eps: Smoothing of the masked softmax; the authors use 1e-6.
    layer_scale: Whether both residual branches have learnt per-channel factors.
    pairing: Which channels of a head are rotated together: `adjacent` ones, or those at the same
      place of both `halves`; None: no rotation.
    rotated: For each pair of each head, the pair of the dense layer whose rotation it gets,
      `head * pairs + pair`; None: as in the dense layer.
    is_gated: Whether each hidden unit is the product of a value and a gate (SwiGLU).
    queries: Number of leading tokens that serve as queries and are passed on, such as those that
      the head reads; the other tokens are only keys and values. None: all.
    drop_path: Probability of dropping a residual branch of an image (stochastic depth).
    index: Units of the dense layer that a slimmed one keeps; None: all. Not compared, as layers
      that differ only here compute the same.
  """

  num_heads: int
  head_dim: int
  mlp_dim: int
  qk_scale: float
  value_dim: int | None = None
  select: TokenReducer = keep_all
  reduce: TokenReducer = keep_all
  token_gate: Gate = open_gate
  head_gate: Gate = open_gate
  hidden_gate: Gate = open_gate
  size_bias: bool = True
  mask_eps: float = 0.0
  layer_scale: bool = False
  pairing: str | None = None
  rotated: tuple[tuple[int, ...], ...] | None = None
  is_gated: bool = False
  queries: int | None = None
  drop_path: float = 0.0
  index: LayerIndex | None = dataclasses.field(default=None, compare=False)

  def __post_init__(self) -> None:
    if self.value_dim == self.head_dim:  # otherwise equal layers would differ
      object.__setattr__(self, "value_dim", None)

  @property
  def value_width(self) -> int:
    """Returns the channels of each head's values."""
    return self.head_dim if self.value_dim is None else self.value_dim

  @property
  def widths(self) -> Widths:
    """Returns the widths over all heads."""
    value = self.num_heads * self.value_width
    return Widths(self.num_heads * self.head_dim, value, self.mlp_dim)

  @property
  def is_reordered(self) -> bool:
    """Returns whether pairs of channels are in a different order than in the dense layer."""
    pairs = list(itertools.chain(*self.rotated or ()))
    return pairs != sorted(pairs)

  def sliced(self, index: LayerIndex) -> dict[str, Any]:
    """Returns the fields of this dense layer that change when it keeps only some units."""
    rotated = None if self.pairing is None else index.rotated(self.head_dim, self.pairing)
    return {**index.widths, "rotated": rotated}
