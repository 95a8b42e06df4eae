"""Plans: what a compressed model keeps in each layer, as JSON and as layer specs."""

import dataclasses
import difflib
import functools
import importlib.resources
import json
import pathlib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from vitcomp_jax import paths, strict_json
from vitcomp_jax.atomic import write_json
from vitcomp_jax.cost import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.methods.registry import reducer_types
from vitcomp_jax.models.gates import HardMask
from vitcomp_jax.models.reducers import LARGEST, KeepAll, StaticReducer
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.variants import VARIANTS, get_spec
from vitcomp_jax.weights.slicing import LayerIndex

FORMAT, VERSION = "vitcomp-plan", 1
_TOP_KEYS = ("format", "version", "variant", "num_tokens", "gmacs", "made_by", "layers")
_WIDTHS = ("num_heads", "head_dim", "mlp_dim")
_INDICES = ("attn_index", "mlp_index")
_KEYS = (*_WIDTHS, *_INDICES, "select", "reduce", "size_bias", "prune_keep", "merge_keep")
# How far a file's GMACs may be from what its layers cost: a head for other classes is less.
_GMACS_TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Plan:
  """A compression plan for one variant and token count.

  Attributes:
    variant: timm's name.
    num_tokens: Tokens before any reduction, prefix included.
    layers: Of each layer, the widths (None: the variant's) and the two reducers.
    gmacs: 1e9 multiply-accumulates per image.
    made_by: How it came about.
    history: Plans that the search passed through; empty where it was not kept, as in a file.
  """

  variant: str
  num_tokens: int
  layers: tuple["PlanLayer", ...]
  gmacs: float
  made_by: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
  history: tuple["PassedPlan", ...] = dataclasses.field(default=(), compare=False, repr=False)

  def layers_for(self, spec: ViTSpec) -> tuple[LayerSpec, ...]:
    """The layer specs of a model under this plan.

    Raises:
      UserError: If the plan is for another depth, width or token count.
    """
    mine = get_spec(self.variant)
    for what, expected, got in (
      ("layers", spec.depth, len(self.layers)),
      ("tokens", spec.num_tokens, self.num_tokens),
      ("channels", spec.width, mine.width),
      ("prefix tokens", spec.num_prefix, mine.num_prefix),
    ):
      if expected != got:
        raise UserError(
          f"plan: expected {expected} {what} for {spec.name} at {spec.image_size[0]} pixels, got "
          f"{got}; the plan is for {self.variant}."
        )
    _check_counts(self.layers, spec, "plan")
    for i, layer in enumerate(self.layers):
      if layer.select != KeepAll():
        spec.check_plain(f"plan: layer {i}: select")
      if hasattr(layer.reduce, "importance"):
        spec.importance(layer.reduce.importance, f"plan: layer {i}: importance")
    pairs = zip(spec.dense_layers, self.layers, strict=True)
    return tuple(layer.apply_to(base) for base, layer in pairs)

  def masked_layers_for(self, spec: ViTSpec) -> tuple[LayerSpec, ...]:
    """Layers of the dense model in which what the plan cuts is masked instead.

    A masked patch still is a key and a value made of the biases, as in ViT-Slim's own code.
    """
    pairs = zip(spec.dense_layers, self.layers, strict=True)
    return tuple(layer.mask(spec, base) for base, layer in pairs)

  @property
  def indices(self) -> tuple[LayerIndex, ...] | None:
    """Returns the kept units of the dense layers; None if all are kept."""
    kept = [layer.index for layer in self.layers if layer.index]
    return tuple(kept) or None

  def to_json(self) -> dict[str, Any]:
    known = VARIANTS.get(self.variant)
    bases = known.dense_layers if known else (None,) * len(self.layers)
    return {
      "format": FORMAT,
      "version": VERSION,
      "variant": self.variant,
      "num_tokens": self.num_tokens,
      "gmacs": round(self.gmacs, 6),
      "made_by": dict(self.made_by),
      "layers": [layer.to_json(base) for layer, base in zip(self.layers, bases, strict=True)],
    }


@dataclasses.dataclass(frozen=True)
class PassedPlan:
  """A plan that a search passed through.

  Attributes:
    step: Steps that were done by then.
    loss: On images that were not trained on.
    plan: Adjusted to the budget.
  """

  step: int
  loss: float
  plan: Plan


@dataclasses.dataclass(frozen=True)
class PlanLayer:
  """One layer of a plan.

  Attributes:
    index: Which units of the dense layer are kept; None: all.
    select: Removes tokens before attention.
    reduce: Removes tokens between attention and MLP.
    size_bias: Whether merged tokens weigh as much as their patches in attention.
  """

  index: LayerIndex | None = None
  select: StaticReducer = KeepAll()
  reduce: StaticReducer = KeepAll()
  size_bias: bool = True

  def apply_to(self, base: LayerSpec) -> LayerSpec:
    changes: dict[str, Any] = self.index.widths if self.index else {}
    changes |= {name: getattr(self, name) for name in ("select", "reduce", "size_bias")}
    return dataclasses.replace(base, **changes)

  def mask(self, spec: ViTSpec, base: LayerSpec) -> LayerSpec:
    """The dense layer with hard masks on what is not kept."""
    gates: dict[str, Any] = {}
    if self.index:
      heads = (1, 1, base.num_heads, 1, base.head_dim)
      kept = tuple(unit for head in self.index.attn for unit in head if unit >= 0)
      gates["head_gate"] = HardMask(heads, kept)
      kept = tuple(unit for unit in self.index.mlp if unit >= 0)
      gates["hidden_gate"] = HardMask((1, 1, base.mlp_dim), kept)
    gates["token_gate"] = self.select.token_gate(spec.num_tokens)
    return dataclasses.replace(base, **gates)

  def to_json(self, base: LayerSpec | None) -> dict[str, Any]:
    """Returns the layer's JSON, with its widths if the dense layer is known."""
    widths = {name: getattr(self.apply_to(base), name) for name in _WIDTHS} if base else {}
    indices = {"attn_index": self.index.attn, "mlp_index": self.index.mlp} if self.index else {}
    reductions = {"select": self.select.to_json(), "reduce": self.reduce.to_json()}
    plain = {} if self.size_bias else {"size_bias": False}
    return {**widths, **indices, **reductions, **plain}


def make_plan(
  spec: ViTSpec,
  layers: tuple[LayerSpec, ...],
  made_by: Mapping[str, Any],
  indices: Sequence[LayerIndex] | None = None,
) -> Plan:
  """The plan of a model whose layers are static.

  Args:
    spec: The model.
    layers: Its layers.
    made_by: How they came about.
    indices: Which units of the dense layers slimmed ones keep; None: all.
  """
  plan_layers = []
  for index, layer in zip(indices or (None,) * len(layers), layers, strict=True):
    select, reduce = layer.select, layer.reduce
    assert isinstance(select, StaticReducer) and isinstance(reduce, StaticReducer)
    plan_layers.append(PlanLayer(index, select, reduce, layer.size_bias))
  gmacs = macs.static_macs(spec, layers) / 1e9
  return Plan(spec.name, spec.num_tokens, tuple(plan_layers), gmacs, made_by)


def list_plans() -> list[str]:
  """Names of the published plans."""
  return sorted(_published())


def load_plan(name: str) -> Plan:
  """A published plan by name, such as `diffrate/deit_small@2.9`, or one from a plan.json.

  The plan's `made_by` holds the paper and, where there is one, the published accuracy.

  Raises:
    UserError: If there is no such plan, or it is not valid.
  """
  if name in _published():
    return _from_published(name)
  path = pathlib.Path(paths.expand(name))
  if not path.is_file():
    near = ", ".join(difflib.get_close_matches(name, _published(), n=3))
    hint = f"published ones near it: {near}" if near else "list_plans() names the published ones"
    raise UserError(f"plan: expected a file or a published plan, got {name!r}; {hint}.")
  try:
    values = strict_json.loads(path.read_text())
  except (ValueError, RecursionError) as error:
    raise UserError(
      f"plan {name}: expected JSON with finite numbers and every key once, got something else: "
      f"{error}."
    ) from error
  return parse_plan(values, name)


def save_plan(plan: Plan, path: pathlib.Path) -> None:
  """Writes a plan.json."""
  write_json(path, plan.to_json())


def parse_plan(values: Any, where: str = "plan") -> Plan:
  """A plan from the content of a plan.json.

  Args:
    values: The content.
    where: The file's name, for errors.

  Raises:
    UserError: Names the key that is missing, wrong or not known.
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
  try:
    spec = get_spec(values["variant"])
  except UserError as error:
    raise UserError(f"{where}: {error}") from error
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
  _check_counts(layers, spec.with_tokens(num_tokens), where)
  if 0 < sum(layer.index is not None for layer in layers) < len(layers):
    raise UserError(f"{where}: expected {' and '.join(_INDICES)} in every layer or in none.")
  gmacs = _gmacs(spec, num_tokens, layers)
  if _is_near(values.get("gmacs"), gmacs):
    gmacs = float(values["gmacs"])
  return Plan(spec.name, num_tokens, tuple(layers), gmacs, dict(made_by))


def _gmacs(spec: ViTSpec, num_tokens: int, plan_layers: Sequence[PlanLayer]) -> float:
  """Counts for the plan's own image size, which may not be the variant's."""
  bases = zip(spec.dense_layers, plan_layers, strict=True)
  layers = tuple(layer.apply_to(base) for base, layer in bases)
  return macs.static_macs(spec.with_tokens(num_tokens), layers) / 1e9


def _is_near(value: Any, counted: float) -> bool:
  """Whether a file's own GMACs, for its number of classes, are what its layers cost."""
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
  layer = PlanLayer(_parse_index(values, base, where), select, reduce, size_bias)
  for name in _WIDTHS:
    expected = getattr(layer.apply_to(base), name)
    if name in values and _count(values, name, where) != expected:
      raise UserError(
        f"{where}: expected {name} {expected}, got {values[name]}; slimmed layers need "
        f"{' and '.join(_INDICES)}."
      )
  return layer


def _parse_index(values: Mapping[str, Any], base: LayerSpec, where: str) -> LayerIndex | None:
  """The units that a slimmed layer keeps; None for a dense one."""
  if not set(_INDICES) & set(values):
    return None
  heads, hidden = (values.get(name) for name in _INDICES)
  if not (isinstance(heads, list) and heads and len({len(h) for h in map(_listed, heads)}) == 1):
    raise UserError(
      f"{where}: expected attn_index to be a list of equally long lists, got "
      f"{_shown(values, 'attn_index')}."
    )
  units = {"attn_index": [i for head in heads for i in head], "mlp_index": _listed(hidden)}
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
  """A whole number above 0; true and false are no numbers."""
  value = values.get(key)
  if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST:
    raise UserError(
      f"{where}: expected a whole number from 1 to {LARGEST} for {key}, got {_shown(values, key)}."
    )
  return value


def _shown(values: Mapping[str, Any], key: str) -> str:
  """Shortens a key's value to fit a line."""
  return reprlib.repr(values[key]) if key in values else "nothing"


def _check_counts(layers: Sequence[PlanLayer], spec: ViTSpec, where: str) -> None:
  """Refuses counts that no model can have.

  Counts may rise between layers, as some published plans' do; above what is left they do nothing.
  """
  n = 0
  for index, layer in enumerate(layers):
    n = spec.starts.get(index, n)
    at = f"{where}: layer {index}"
    layer.select.check(n, spec.num_prefix, spec.num_tokens, at)
    n = layer.select.count(n)
    layer.reduce.check(n, spec.num_prefix, spec.num_tokens, at)
    n = layer.reduce.count(n)


@functools.cache
def _published() -> dict[str, dict[str, Any]]:
  file = importlib.resources.files("vitcomp_jax") / "bundled" / "published_plans.json"
  return dict(json.loads(file.read_text()))


def _from_published(name: str) -> Plan:
  entry = _published()[name]
  about = {k: v for k, v in entry.items() if k in ("source", "published")}
  made_by = {"method": "diffrate", **about}
  # CAFormer's authors only merge, by whole sizes.
  spec, merges = get_spec(entry["variant"]), entry["prune_keep"] is None
  prune_keep = [spec.tokens_at(i) for i in range(spec.depth)] if merges else entry["prune_keep"]
  reduce = functools.partial(PruneMerge, importance=spec.importance(), whole_sizes=merges)
  keeps = zip(prune_keep, entry["merge_keep"], strict=True)
  layers = tuple(PlanLayer(reduce=reduce(p, m)) for p, m in keeps)
  return Plan(entry["variant"], entry["num_tokens"], layers, entry["gmacs"], made_by)
