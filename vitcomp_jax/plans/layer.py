"""One layer of a plan: its widths and reducers."""

import dataclasses
import itertools
import reprlib
from collections.abc import Sequence
from typing import Any

from vitcomp_jax.errors import UserError
from vitcomp_jax.models.gates import HardMask
from vitcomp_jax.models.layer_spec import Widths
from vitcomp_jax.models.reducers import KeepAll, StaticReducer
from vitcomp_jax.models.slicing import LayerIndex
from vitcomp_jax.models.spec import LayerSpec, ViTSpec

# Fields of a `LayerSpec` that are a layer's widths.
WIDTHS = ("num_heads", "head_dim", "value_dim", "mlp_dim")


@dataclasses.dataclass(frozen=True)
class PlanLayer:
  """One layer of a plan.

  Attributes:
    index: Kept units of the dense layer; None: all, or as many as `widths` says.
    select: Reducer before attention.
    reduce: Reducer between attention and MLP.
    size_bias: Whether attention weights tokens by size.
    widths: Widths of a layer whose weights are not slices of the dense layer's, but which has as
      many heads; None: those of `index`.
    rotated: Rotated pairs of such a layer, see `LayerSpec`; None: as in the dense layer.
  """

  index: LayerIndex | None = None
  select: StaticReducer = KeepAll()
  reduce: StaticReducer = KeepAll()
  size_bias: bool = True
  widths: Widths | None = None
  rotated: tuple[tuple[int, ...], ...] | None = None

  def apply_to(self, base: LayerSpec) -> LayerSpec:
    """Returns a dense layer's spec with this layer's widths and reducers."""
    changes: dict[str, Any] = base.sliced(self.index) if self.index else {"rotated": self.rotated}
    if self.widths:
      changes["head_dim"] = self.widths.qk // base.num_heads
      changes["value_dim"] = self.widths.value // base.num_heads
      changes["mlp_dim"] = self.widths.hidden
    changes |= {name: getattr(self, name) for name in ("index", "select", "reduce", "size_bias")}
    return dataclasses.replace(base, **changes)

  def check_widths(self, base: LayerSpec, where: str) -> None:
    """Rejects widths that a dense layer cannot be cut to.

    Args:
      base: The dense layer.
      where: Location of the layer, for the error.
    """
    if self.index:
      if self.widths or self.rotated:
        raise UserError(f"{where}: expected indices, or widths of their own, got both.")
      return
    heads, widths = base.num_heads, self.widths or base.widths
    for name, parts, width, limit in zip(
      WIDTHS[1:], (heads, heads, 1), widths, base.widths, strict=True
    ):
      if width % parts or not 0 < width <= limit:
        raise UserError(
          f"{where}: expected {name} from 1 to {limit // parts}, got {width / parts:g}."
        )
    if self.rotated is None and (base.pairing is None or widths.qk == base.widths.qk):
      return
    if base.pairing is None or not self._keeps_pairs(base):
      expected = "half of its head_dim pairs of each head, each once" if base.pairing else "nothing"
      raise UserError(
        f"{where}: expected rotated to hold {expected}, got {reprlib.repr(self.rotated)}."
      )

  def _keeps_pairs(self, base: LayerSpec) -> bool:
    """Returns whether `rotated` holds distinct pairs of each head, as many as the head keeps."""
    pairs, kept = base.head_dim // 2, self.apply_to(base).head_dim / 2
    rotated = self.rotated or ()
    if len(rotated) != base.num_heads:
      return False
    for i, head in enumerate(rotated):
      own = set(head) & set(range(i * pairs, (i + 1) * pairs))
      if not len(head) == len(own) == kept:
        return False
    return True

  def mask(self, spec: ViTSpec, base: LayerSpec) -> LayerSpec:
    """Returns the dense layer with hard masks on units that are not kept."""
    gates: dict[str, Any] = {}
    if self.index:
      heads = (1, 1, base.num_heads, 1, base.head_dim)
      kept = tuple(unit for unit in itertools.chain(*self.index.attn) if unit >= 0)
      gates["head_gate"] = HardMask(heads, kept)
      kept = tuple(unit for unit in self.index.mlp if unit >= 0)
      gates["hidden_gate"] = HardMask((1, 1, base.mlp_dim), kept)
    gates["token_gate"] = self.select.token_gate(spec.num_tokens)
    return dataclasses.replace(base, **gates)

  def to_json(self, base: LayerSpec | None) -> dict[str, Any]:
    """Returns the layer's JSON, with its widths if the dense layer is known."""
    widths = {name: getattr(self.apply_to(base), name) for name in WIDTHS} if base else {}
    if widths.get("value_dim") is None:
      widths.pop("value_dim", None)
    if self.rotated:
      widths["rotated"] = self.rotated
    indices = {"attn_index": self.index.attn, "mlp_index": self.index.mlp} if self.index else {}
    reductions = {"select": self.select.to_json(), "reduce": self.reduce.to_json()}
    plain = {} if self.size_bias else {"size_bias": False}
    return {**widths, **indices, **reductions, **plain}


def check_counts(layers: Sequence[PlanLayer], spec: ViTSpec, where: str) -> None:
  """Rejects invalid token counts.

  Counts may rise between layers, as in some published plans; a count above the number of remaining
  tokens has no effect.
  """
  n = 0
  for index, layer in enumerate(layers):
    n = spec.starts.get(index, n)
    at = f"{where}: layer {index}"
    layer.select.check(n, spec.num_prefix, spec.num_tokens, at)
    n = layer.select.count(n)
    layer.reduce.check(n, spec.num_prefix, spec.num_tokens, at)
    n = layer.reduce.count(n)
