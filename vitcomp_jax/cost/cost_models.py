"""Costs that a budget limits: multiply-accumulates, or latency on one device.

A cost is a function of the token counts at attention and at the MLP of each layer, and of the
layers' widths. These are ints for a plan; in the budget term of a search, they are traced and have
straight-through gradients.
"""

import abc
import dataclasses
import itertools
import math
import reprlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax.cost import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.layer_spec import Widths
from vitcomp_jax.models.spec import LayerSpec, ViTSpec


class CostModel(abc.ABC):
  """Computes the cost of a forward pass.

  Attributes:
    key: Name of the cost in `config.budget` and in the metrics of a run.
    unit: Unit of budgets.
    scale: Value of `count` that corresponds to one unit.
  """

  key: ClassVar[str]
  unit: ClassVar[str]
  scale: ClassVar[float] = 1.0

  @abc.abstractmethod
  def count(
    self,
    spec: ViTSpec,
    layers: Sequence[LayerSpec],
    counts: Sequence[tuple[Any, Any]],
    widths: Sequence[Widths] | None = None,
  ) -> Any:
    """Computes the cost of a forward pass.

    Args:
      spec: Spec of the model.
      layers: Layers of the model.
      counts: Tokens at attention and at the MLP of each layer, ints or traced scalars.
      widths: Widths of each layer, numbers or traced scalars; None: those of their specs.

    Returns:
      The cost in `unit`, times `scale`; a number or a traced scalar.

    Raises:
      UserError: If widths are given, but the cost does not depend on them.
    """

  def static(self, spec: ViTSpec, layers: Sequence[LayerSpec]) -> float:
    """Computes the cost of a model whose reducers are static, in `unit`."""
    return float(self.count(spec, layers, macs.static_counts(spec, layers))) / self.scale


class Macs(CostModel):
  """Counts multiply-accumulates per image."""

  key, unit, scale = "gmacs", "GMACs", 1e9

  def count(
    self,
    spec: ViTSpec,
    layers: Sequence[LayerSpec],
    counts: Sequence[tuple[Any, Any]],
    widths: Sequence[Widths] | None = None,
  ) -> Any:
    return macs.macs(spec, layers, counts, widths)


MACS = Macs()

_FORMAT, _VERSION = "vitcomp-latency", 1
_COLUMNS = ("attention_ms", "reduction_ms", "mlp_ms")


@dataclasses.dataclass(frozen=True)
class Latency(CostModel):
  """Predicts the latency of a batch from a table of one layer's parts by token count.

  Latencies are interpolated linearly between the counts of the table.

  Attributes:
    counts: Token counts, ascending.
    attention_ms: Latency of one layer's attention at each count.
    reduction_ms: Latency of pruning and merging in one layer, by the count of tokens that enter.
    mlp_ms: Latency of one layer's MLP at each count.
    fixed_ms: Latency of everything outside of the layers.
    about: Describes the measurement: the runtime, the device, the batch size, the model.
  """

  key, unit = "latency_ms", "ms"

  counts: tuple[int, ...]
  attention_ms: tuple[float, ...]
  reduction_ms: tuple[float, ...]
  mlp_ms: tuple[float, ...]
  fixed_ms: float
  about: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

  @property
  def runtime(self) -> str:
    """Returns the runtime that was measured."""
    return str(self.about.get("runtime", "jax"))

  def count(
    self,
    spec: ViTSpec,
    layers: Sequence[LayerSpec],
    counts: Sequence[tuple[Any, Any]],
    widths: Sequence[Widths] | None = None,
  ) -> Any:
    del spec, layers
    if widths is not None:
      raise UserError(
        "latency: expected a search of tokens, got one of widths, of which a table says nothing; "
        "give a budget in MACs."
      )
    total: Any = self.fixed_ms
    for at_attention, at_mlp in counts:
      xp = jnp if isinstance(at_mlp, jax.Array) else np
      attention = self._interpolated(xp, at_attention, self.attention_ms)
      reduction = self._interpolated(xp, at_attention, self.reduction_ms)
      mlp = self._interpolated(xp, at_mlp, self.mlp_ms)
      total += attention + xp.where(at_mlp < at_attention, reduction, 0.0) + mlp
    return total

  def _interpolated(self, xp: types.ModuleType, count: Any, column: Sequence[float]) -> Any:
    counts, values = xp.asarray(self.counts, np.float32), xp.asarray(column, np.float32)
    return xp.interp(count, counts, values)

  def to_json(self) -> dict[str, Any]:
    """Returns the content of the table's file."""
    values = {"format": _FORMAT, "version": _VERSION, "about": dict(self.about)}
    columns = {name: list(getattr(self, name)) for name in ("counts", *_COLUMNS)}
    return {**values, **columns, "fixed_ms": self.fixed_ms}


def parse_latency(values: Any, where: str) -> Latency:
  """Parses the content of a latency table's file.

  Args:
    values: The content, parsed from JSON.
    where: Name of the file, for error messages.

  Raises:
    UserError: If a key is missing or has an invalid value.
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
  """Smooths values to a non-negative, non-decreasing sequence; keeps one that already is."""
  highest, lowest = np.maximum.accumulate(values), np.minimum.accumulate(values[::-1])[::-1]
  return np.asarray(np.maximum((highest + lowest) / 2, 0))
