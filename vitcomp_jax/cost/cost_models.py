"""Costs that a budget can limit: multiply-accumulates, or latency on one device.

A cost is a function of the tokens at attention and at the MLP of each layer. The counts are ints
for a plan, and traced, with straight-through gradients, for the budget term of a search.
"""

import abc
import dataclasses
import itertools
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax.cost import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.spec import LayerSpec, ViTSpec


class CostModel(abc.ABC):
  """A cost.

  Attributes:
    key: Its name among `config.budget`'s keys and among the figures of a run.
    unit: Of its budgets.
    scale: What `count` gives for one unit.
  """

  key: ClassVar[str]
  unit: ClassVar[str]
  scale: ClassVar[float] = 1.0

  @abc.abstractmethod
  def count(
    self, spec: ViTSpec, layers: Sequence[LayerSpec], counts: Sequence[tuple[Any, Any]]
  ) -> Any:
    """The cost of a forward pass.

    Args:
      spec: The model.
      layers: Its layers.
      counts: Tokens at attention and at the MLP of each layer, ints or traced scalars.
    """

  def static(self, spec: ViTSpec, layers: Sequence[LayerSpec]) -> float:
    """The cost of a model whose reducers are static, in `unit`."""
    return float(self.count(spec, layers, macs.static_counts(spec, layers))) / self.scale


class Macs(CostModel):
  """Multiply-accumulates per image."""

  key, unit, scale = "gmacs", "GMACs", 1e9

  def count(
    self, spec: ViTSpec, layers: Sequence[LayerSpec], counts: Sequence[tuple[Any, Any]]
  ) -> Any:
    return macs.macs(spec, layers, counts)


MACS = Macs()

_FORMAT, _VERSION = "vitcomp-latency", 1
_COLUMNS = ("attention_ms", "reduction_ms", "mlp_ms")


@dataclasses.dataclass(frozen=True)
class Latency(CostModel):
  """The time that a batch takes, from a table of one layer's parts over token counts.

  Between the counts of the table the parts are linear.

  Attributes:
    counts: Token counts, ascending.
    attention_ms: Of one layer's attention at each count.
    reduction_ms: Of pruning and merging, where a layer that is entered by so many tokens does it.
    mlp_ms: Of one layer's MLP.
    fixed_ms: Of all that is no layer.
    about: What was measured: the device, the batch size, the model.
  """

  key, unit = "latency_ms", "ms"

  counts: tuple[int, ...]
  attention_ms: tuple[float, ...]
  reduction_ms: tuple[float, ...]
  mlp_ms: tuple[float, ...]
  fixed_ms: float
  about: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

  def count(
    self, spec: ViTSpec, layers: Sequence[LayerSpec], counts: Sequence[tuple[Any, Any]]
  ) -> Any:
    del spec, layers
    total: Any = self.fixed_ms
    for at_attention, at_mlp in counts:
      xp = jnp if isinstance(at_mlp, jax.Array) else np
      known = xp.asarray(self.counts, np.float32)
      attention, reduction, mlp = (
        xp.interp(n, known, xp.asarray(column, np.float32))
        for n, column in (
          (at_attention, self.attention_ms),
          (at_attention, self.reduction_ms),
          (at_mlp, self.mlp_ms),
        )
      )
      total += attention + xp.where(at_mlp < at_attention, reduction, 0.0) + mlp
    return total

  def to_json(self) -> dict[str, Any]:
    values = {"format": _FORMAT, "version": _VERSION, "about": dict(self.about)}
    columns = {name: list(getattr(self, name)) for name in ("counts", *_COLUMNS)}
    return {**values, **columns, "fixed_ms": self.fixed_ms}


def parse_latency(values: Any, where: str) -> Latency:
  """A table from the content of its file.

  Args:
    values: The content.
    where: The file's name, for errors.

  Raises:
    UserError: Names the key that is missing or wrong.
  """
  if not isinstance(values, Mapping) or values.get("format") != _FORMAT:
    raise UserError(
      f'{where}: expected a JSON object with "format": "{_FORMAT}", got {reprlib.repr(values)}; '
      "remove it to measure anew."
    )
  counts = values.get("counts")
  rows = len(counts) if isinstance(counts, list) else 0
  checks = {
    "version": ("version 1", values.get("version") == _VERSION),
    "about": ("an object", isinstance(values.get("about"), Mapping)),
    "counts": ("rising counts from 1 up, two at least", rows > 1 and _is_rising(counts)),
    "fixed_ms": ("a time", _is_time(values.get("fixed_ms"))),
  }
  for name in _COLUMNS:
    checks[name] = (f"{rows} times that never fall", _are_times(values.get(name), rows))
  for name, (expected, is_right) in checks.items():
    if not is_right:
      got = reprlib.repr(values[name]) if name in values else "nothing"
      raise UserError(
        f"{where}: expected {name} to be {expected}, got {got}; remove it to measure anew."
      )
  columns = {name: tuple(values[name]) for name in ("counts", *_COLUMNS)}
  return Latency(**columns, fixed_ms=values["fixed_ms"], about=values["about"])


def _is_rising(counts: Any) -> bool:
  whole = all(type(n) is int and n >= 1 for n in counts)
  return whole and all(a < b for a, b in itertools.pairwise(counts))


def _is_time(value: Any) -> bool:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return is_number and 0 <= value < math.inf


def _are_times(values: Any, count: int) -> bool:
  if not (isinstance(values, list) and len(values) == count and all(map(_is_time, values))):
    return False
  return all(a <= b for a, b in itertools.pairwise(values))


def never_falling(values: np.ndarray) -> np.ndarray:
  """Values that never fall nor lie below 0: what rises already stays, noise is evened out."""
  highest, lowest = np.maximum.accumulate(values), np.minimum.accumulate(values[::-1])[::-1]
  return np.asarray(np.maximum((highest + lowest) / 2, 0))
