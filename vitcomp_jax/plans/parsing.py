"""Parses plan.json, and rejects invalid plans."""

import itertools
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from vitcomp_jax.cost import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.registry import reducer_types
from vitcomp_jax.models.layer_spec import Widths
from vitcomp_jax.models.reducers import LARGEST, StaticReducer
from vitcomp_jax.models.slicing import LayerIndex
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.variants import get_spec, spec_of
from vitcomp_jax.plans.layer import WIDTHS, PlanLayer, check_counts
from vitcomp_jax.plans.plan import FORMAT, VERSION, Plan

_TOP_KEYS = (
  "format",
  "version",
  "variant",
  "architecture",
  "num_tokens",
  "gmacs",
  "made_by",
  "layers",
)
_INDICES = ("attn_index", "mlp_index")
_OPTIONS = ("select", "reduce", "size_bias", "prune_keep", "merge_keep")
_KEYS = (*WIDTHS, "rotated", *_INDICES, *_OPTIONS)
# Allowed relative difference of a file's GMACs from the counted ones, due to another head.
_GMACS_TOLERANCE = 0.01


def parse_plan(values: Any, where: str = "plan") -> Plan:
  """Reads a plan from the content of a plan.json.

  Args:
    values: Content of the file.
    where: File name, for errors.

  Raises:
    UserError: If a key is missing, wrong or unknown.
  """
  if not isinstance(values, Mapping) or values.get("format") != FORMAT:
    raise UserError(
      f'{where}: expected a JSON object with "format": "{FORMAT}", got {reprlib.repr(values)}.'
    )
  if values.get("version") != VERSION:
    raise UserError(f"{where}: expected version {VERSION}, got {_shown(values, 'version')}.")
  unknown = [key for key in values if key not in _TOP_KEYS]
  if unknown:
    raise UserError(
      f"{where}: expected keys among {', '.join(_TOP_KEYS)}, got "
      f"{', '.join(map(reprlib.repr, unknown))}."
    )
  made_by = values.get("made_by", {})
  for key, is_right, kind in (
    ("variant", isinstance(values.get("variant"), str), "a string"),
    ("layers", isinstance(values.get("layers"), list), "a list"),
    ("made_by", isinstance(made_by, Mapping), "an object"),
  ):
    if not is_right:
      raise UserError(f"{where}: expected {key} to be {kind}, got {_shown(values, key)}.")
  spec = _dense_spec(values, where)
  num_tokens = _count(values, "num_tokens", where)
  if num_tokens <= spec.num_prefix:
    raise UserError(
      f"{where}: expected num_tokens above the {spec.num_prefix} prefix tokens of {spec.name}, got "
      f"{num_tokens}."
    )
  if len(values["layers"]) != spec.depth:
    raise UserError(
      f"{where}: expected {spec.depth} layers for {spec.name}, got {len(values['layers'])}."
    )
  layers = []
  for i, layer in enumerate(values["layers"]):
    layers.append(_parse_layer(layer, spec.dense_layers[i], f"{where}: layer {i}"))
  check_counts(layers, spec.with_tokens(num_tokens), where)
  if 0 < sum(layer.index is not None for layer in layers) < len(layers):
    raise UserError(f"{where}: expected {' and '.join(_INDICES)} in every layer or in none.")
  gmacs = _gmacs(spec, num_tokens, layers)
  if _is_near(values.get("gmacs"), gmacs):
    gmacs = float(values["gmacs"])
  architecture = spec if "architecture" in values else None
  return Plan(spec.name, num_tokens, tuple(layers), gmacs, dict(made_by), architecture=architecture)


def _dense_spec(values: Mapping[str, Any], where: str) -> ViTSpec:
  """Returns the spec of the dense model, by its variant's name or its architecture."""
  try:
    if "architecture" in values:
      return spec_of({**values["architecture"], "name": values["variant"]})
    return get_spec(values["variant"])
  except UserError as error:
    raise UserError(f"{where}: {error}") from error
  except (TypeError, ValueError, AttributeError) as error:
    raise UserError(
      f"{where}: expected architecture to hold fields of ViTSpec, got "
      f"{_shown(values, 'architecture')} ({error})."
    ) from error


def _gmacs(spec: ViTSpec, num_tokens: int, plan_layers: Sequence[PlanLayer]) -> float:
  """Counts GMACs at the plan's image size, which may differ from the variant's."""
  bases = zip(spec.dense_layers, plan_layers, strict=True)
  layers = tuple(layer.apply_to(base) for base, layer in bases)
  return macs.static_macs(spec.with_tokens(num_tokens), layers) / 1e9


def _is_near(value: Any, counted: float) -> bool:
  """Returns whether a file's GMACs match its layers, apart from the number of classes."""
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  low, high = ((1 + sign * _GMACS_TOLERANCE) * counted for sign in (-1, 1))
  return is_number and low <= value <= high


def _parse_layer(values: Any, base: LayerSpec, where: str) -> PlanLayer:
  if not isinstance(values, Mapping):
    raise UserError(f"{where}: expected an object, got {reprlib.repr(values)}.")
  counts = {k: values[k] for k in ("prune_keep", "merge_keep") if k in values}
  unknown = set(values) - set(_KEYS)
  if unknown:
    known = ", ".join(_KEYS)
    raise UserError(f"{where}: expected keys among {known}, got {sorted(unknown)[0]!r}.")
  size_bias = values.get("size_bias", True)
  if not isinstance(size_bias, bool):
    raise UserError(f"{where}: expected true or false for size_bias, got {size_bias!r}.")
  if counts and "reduce" in values:
    raise UserError(f"{where}: expected `reduce` or kept counts, got both.")
  nothing = {"type": "keep_all"}
  select = _parse_reducer(values.get("select", nothing), f"{where}: select")
  if not select.before_attention:
    known = ", ".join(name for name, kind in reducer_types().items() if kind.before_attention)
    raise UserError(
      f"{where}: select: expected a type among {known}, got {values['select']['type']!r}."
    )
  reduce = {"type": "prune_merge", **counts} if counts else values.get("reduce", nothing)
  reduce = _parse_reducer(reduce, where if counts else f"{where}: reduce")
  index, rotated = _parse_index(values, base, where), _parse_rotated(values, where)
  asked = {name: _count(values, name, where) for name in WIDTHS if name in values}
  heads, dims = base.num_heads, asked.get("head_dim", base.head_dim)
  hidden = asked.get("mlp_dim", base.mlp_dim)
  widths = Widths(heads * dims, heads * asked.get("value_dim", dims), hidden)
  own = None if index or widths == base.widths else widths
  layer = PlanLayer(index, select, reduce, size_bias, own, rotated)
  layer.check_widths(base, where)
  made = layer.apply_to(base)
  for name, value in asked.items():
    expected = getattr(made, name) or made.head_dim  # values are as wide as keys by default
    if value != expected:
      raise UserError(
        f"{where}: expected {name} {expected}, got {value}; {' and '.join(_INDICES)} say which "
        "heads and units are kept."
      )
  return layer


def _parse_rotated(values: Mapping[str, Any], where: str) -> tuple[tuple[int, ...], ...] | None:
  """Returns the rotated pairs of each head, see `PlanLayer`; None if they are the dense layer's."""
  if "rotated" not in values:
    return None
  heads = values["rotated"]
  if not (isinstance(heads, list) and heads and all(map(_are_whole, heads))):
    raise UserError(
      f"{where}: expected rotated to be a list of lists of whole numbers, got "
      f"{_shown(values, 'rotated')}."
    )
  return tuple(map(tuple, heads))


def _are_whole(values: Any) -> bool:
  return isinstance(values, list) and all(type(value) is int for value in values)


def _parse_index(values: Mapping[str, Any], base: LayerSpec, where: str) -> LayerIndex | None:
  """Returns the units that a slimmed layer keeps; None for a dense one."""
  if not set(_INDICES) & set(values):
    return None
  heads, hidden = (values.get(name) for name in _INDICES)
  if not (isinstance(heads, list) and heads and len({len(h) for h in map(_listed, heads)}) == 1):
    raise UserError(
      f"{where}: expected attn_index to be a list of equally long lists, got "
      f"{_shown(values, 'attn_index')}."
    )
  units = {"attn_index": list(itertools.chain(*map(_listed, heads))), "mlp_index": _listed(hidden)}
  limits = {"attn_index": base.num_heads * base.head_dim, "mlp_index": base.mlp_dim}
  for name, index in units.items():
    is_right = all(type(i) is int and -1 <= i < limits[name] for i in index)
    kept = [i for i in index if i != -1]
    if not (is_right and kept and len(set(kept)) == len(kept)):
      raise UserError(
        f"{where}: expected {name} to hold places below {limits[name]}, each once, or -1, got "
        f"{_shown(values, name)}."
      )
  return LayerIndex(tuple(tuple(head) for head in heads), tuple(units["mlp_index"]))


def _listed(value: Any) -> list[Any]:
  return value if isinstance(value, list) else []


def _parse_reducer(values: Any, where: str) -> StaticReducer:
  if not isinstance(values, Mapping):
    raise UserError(
      f'{where}: expected an object such as {{"type": "keep_all"}}, got {reprlib.repr(values)}.'
    )
  kinds, kind = reducer_types(), values.get("type")
  if not isinstance(kind, str) or kind not in kinds:
    raise UserError(
      f"{where}: expected a type among {', '.join(kinds)}, got {_shown(values, 'type')}."
    )
  return kinds[kind].from_json(values, where)


def _count(values: Mapping[str, Any], key: str, where: str) -> int:
  """Returns a positive integer; rejects any other value, including booleans."""
  value = values.get(key)
  if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST:
    raise UserError(
      f"{where}: expected a whole number from 1 to {LARGEST} for {key}, got {_shown(values, key)}."
    )
  return value


def _shown(values: Mapping[str, Any], key: str) -> str:
  """Shortens a key's value to fit a line."""
  return reprlib.repr(values[key]) if key in values else "nothing"
