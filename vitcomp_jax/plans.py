"""Plans: what a compressed model keeps in each layer, as JSON and as layer specs."""

import dataclasses
import difflib
import functools
import importlib.resources
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from vitcomp_jax import macs
from vitcomp_jax.atomic import write_json
from vitcomp_jax.errors import UserError
from vitcomp_jax.models import reducers
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import TokenReducer
from vitcomp_jax.models.variants import get_spec

FORMAT, VERSION = "vitcomp-plan", 1
REDUCERS: dict[str, type] = {"keep_all": reducers.KeepAll, "prune_merge": reducers.PruneMerge}
_WIDTHS = ("num_heads", "head_dim", "mlp_dim")


@dataclasses.dataclass(frozen=True)
class Plan:
  """A compression plan for one variant and token count.

  Attributes:
    variant: timm's name.
    num_tokens: Tokens before any reduction, prefix included.
    layers: Of each layer, the widths (none: the variant's) and the two reducers.
    gmacs: 1e9 multiply-accumulates per image.
    made_by: How it came about.
  """

  variant: str
  num_tokens: int
  layers: tuple["PlanLayer", ...]
  gmacs: float
  made_by: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

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
    for index, layer in enumerate(self.layers):
      _check_counts(layer, index, spec)
    pairs = zip(spec.dense_layers, self.layers, strict=True)
    return tuple(layer.apply_to(base) for base, layer in pairs)

  def to_json(self) -> dict[str, Any]:
    return {
      "format": FORMAT,
      "version": VERSION,
      "variant": self.variant,
      "num_tokens": self.num_tokens,
      "gmacs": round(self.gmacs, 6),
      "made_by": dict(self.made_by),
      "layers": [layer.to_json() for layer in self.layers],
    }


@dataclasses.dataclass(frozen=True)
class PlanLayer:
  """One layer of a plan: widths (none: the variant's) and reducers."""

  num_heads: int | None = None
  head_dim: int | None = None
  mlp_dim: int | None = None
  select: TokenReducer = reducers.keep_all
  reduce: TokenReducer = reducers.keep_all

  def apply_to(self, base: LayerSpec) -> LayerSpec:
    widths = {name: getattr(self, name) for name in _WIDTHS if getattr(self, name) is not None}
    return dataclasses.replace(base, select=self.select, reduce=self.reduce, **widths)

  def to_json(self) -> dict[str, Any]:
    widths = {name: getattr(self, name) for name in _WIDTHS if getattr(self, name) is not None}
    return {**widths, "select": _reducer_json(self.select), "reduce": _reducer_json(self.reduce)}


def make_plan(spec: ViTSpec, layers: tuple[LayerSpec, ...], made_by: Mapping[str, Any]) -> Plan:
  """The plan of a model whose layers are static."""
  plan_layers = tuple(
    PlanLayer(s.num_heads, s.head_dim, s.mlp_dim, s.select, s.reduce) for s in layers
  )
  gmacs = macs.static_macs(spec, layers) / 1e9
  return Plan(spec.name, spec.num_tokens, plan_layers, gmacs, made_by)


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
  path = pathlib.Path(name)
  if not path.is_file():
    near = ", ".join(difflib.get_close_matches(name, _published(), n=3, cutoff=0.0))
    raise UserError(
      f"plan: expected a file or a published plan, got {name!r}; published ones near it: {near}."
    )
  try:
    values = json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f"plan {name}: expected JSON, got something else: {error}.") from error
  return parse_plan(values, name)


def save_plan(plan: Plan, path: pathlib.Path) -> None:
  """Writes a plan.json."""
  write_json(path, plan.to_json())


def parse_plan(values: Any, where: str = "plan") -> Plan:
  """A plan from the content of a plan.json.

  Raises:
    UserError: Names the key that is missing or wrong.
  """
  if not isinstance(values, Mapping) or values.get("format") != FORMAT:
    raise UserError(f'{where}: expected a JSON object with "format": "{FORMAT}".')
  if values.get("version") != VERSION:
    raise UserError(f"{where}: expected version {VERSION}, got {values.get('version')!r}.")
  for key, kind in (("variant", str), ("num_tokens", int), ("layers", list)):
    if not isinstance(values.get(key), kind):
      raise UserError(f"{where}: expected {key} ({kind.__name__}), got {values.get(key)!r}.")
  spec = get_spec(values["variant"])
  layers = tuple(
    _parse_layer(layer, f"{where}: layer {i}") for i, layer in enumerate(values["layers"])
  )
  if len(layers) != spec.depth:
    raise UserError(f"{where}: expected {spec.depth} layers for {spec.name}, got {len(layers)}.")
  bases = zip(spec.dense_layers, layers, strict=True)
  gmacs = _gmacs(spec, values["num_tokens"], tuple(layer.apply_to(base) for base, layer in bases))
  return Plan(spec.name, values["num_tokens"], layers, gmacs, dict(values.get("made_by", {})))


def _gmacs(spec: ViTSpec, num_tokens: int, layers: tuple[LayerSpec, ...]) -> float:
  """Counts for the plan's own image size, which may not be the variant's."""
  counts = macs.static_counts(spec, layers, num_tokens)
  resize = (num_tokens - spec.num_tokens) * spec.width * 3 * spec.patch_size**2
  return (float(macs.macs(spec, layers, counts)) + resize) / 1e9


def _parse_layer(values: Any, where: str) -> PlanLayer:
  if not isinstance(values, Mapping):
    raise UserError(f"{where}: expected an object, got {values!r}.")
  counts = {k: values[k] for k in ("prune_keep", "merge_keep") if k in values}
  unknown = set(values) - {*_WIDTHS, "select", "reduce", *counts}
  if unknown:
    raise UserError(f"{where}: {sorted(unknown)[0]!r} is not a key of a layer.")
  if counts and "reduce" in values:
    raise UserError(f"{where}: expected `reduce` or kept counts, got both.")
  for key in (*_WIDTHS, *counts):
    if key in values and not _is_count(values[key]):
      raise UserError(f"{where}: expected a whole number above 0 for {key}, got {values[key]!r}.")
  reduce = values.get("reduce", {"type": "keep_all"})
  return PlanLayer(
    **{name: values.get(name) for name in _WIDTHS},
    select=_parse_reducer(values.get("select", {"type": "keep_all"}), where),
    reduce=_parse_reducer({"type": "prune_merge", **counts} if counts else reduce, where),
  )


def _parse_reducer(values: Any, where: str) -> TokenReducer:
  kind = values.get("type") if isinstance(values, Mapping) else values
  if kind not in REDUCERS:
    raise UserError(f"{where}: expected a reducer among {', '.join(REDUCERS)}, got {kind!r}.")
  fields = {f.name: f for f in dataclasses.fields(REDUCERS[kind])}
  options = {k: v for k, v in values.items() if k != "type"}
  for key, value in options.items():
    if key not in fields:
      raise UserError(f"{where}: {key!r} is not an option of {kind}.")
    if fields[key].type is int and not _is_count(value):
      raise UserError(f"{where}: expected a whole number above 0 for {key}, got {value!r}.")
  missing = [k for k, f in fields.items() if f.default is dataclasses.MISSING and k not in options]
  if missing:
    raise UserError(f"{where}: {kind} needs {', '.join(missing)}.")
  return REDUCERS[kind](**options)


def _reducer_json(reducer: TokenReducer) -> dict[str, Any]:
  kind = next(name for name, cls in REDUCERS.items() if type(reducer) is cls)
  fields = dataclasses.fields(REDUCERS[kind])
  values = {f.name: getattr(reducer, f.name) for f in fields}
  shown = {f.name: values[f.name] for f in fields if values[f.name] != f.default}
  return {"type": kind, **shown}


def _check_counts(layer: PlanLayer, index: int, spec: ViTSpec) -> None:
  """Kept counts must leave the prefix and a patch token; rising counts are the authors' right."""
  if not isinstance(layer.reduce, reducers.PruneMerge):
    return
  for name in ("prune_keep", "merge_keep"):
    count, least = getattr(layer.reduce, name), spec.num_prefix + 1
    if not least <= count <= spec.num_tokens:
      raise UserError(
        f"plan: layer {index}: expected {name} from {least} to {spec.num_tokens}, got {count}."
      )


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


@functools.cache
def _published() -> dict[str, dict[str, Any]]:
  file = importlib.resources.files("vitcomp_jax") / "bundled" / "published_plans.json"
  return dict(json.loads(file.read_text()))


def _from_published(name: str) -> Plan:
  entry = _published()[name]
  made_by = {k: v for k, v in entry.items() if k in ("source", "published")}
  # CAFormer's authors only merge; an unpruned layer keeps all tokens of its stage.
  prune_keep = entry["prune_keep"] or [196] * 18 + [49] * 3
  keeps = zip(prune_keep, entry["merge_keep"], strict=True)
  layers = tuple(PlanLayer(reduce=reducers.PruneMerge(p, m)) for p, m in keeps)
  return Plan(entry["variant"], entry["num_tokens"], layers, entry["gmacs"], made_by)
