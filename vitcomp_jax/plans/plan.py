"""Plans: the tokens and units that each layer keeps."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from vitcomp_jax.cost import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.gates import HardMask
from vitcomp_jax.models.reducers import KeepAll, StaticReducer
from vitcomp_jax.models.slicing import LayerIndex
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.variants import VARIANTS, get_spec, is_variant, model_fields_of

FORMAT, VERSION = "vitcomp-plan", 1
WIDTHS = ("num_heads", "head_dim", "mlp_dim")


@dataclasses.dataclass(frozen=True)
class Plan:
  """A compression plan for one variant and token count.

  Attributes:
    variant: timm's name of the model.
    num_tokens: Tokens before any reduction, prefix included.
    layers: Kept units and reducers of each layer.
    gmacs: 1e9 multiply-accumulates per image.
    made_by: Origin of the plan, such as method and steps, as JSON.
    history: Plans that the search passed through; empty if not kept, as in a file.
    architecture: Spec of the dense model, where the variant's name does not tell it; or None.

  Examples:
    >>> import vitcomp_jax as vc
    >>> plan = vc.load_plan("diffrate/deit_small@2.9")
    >>> plan.variant, plan.num_tokens, len(plan.layers)
    ('deit_small_patch16_224', 197, 12)
  """

  variant: str
  num_tokens: int
  layers: tuple["PlanLayer", ...]
  gmacs: float
  made_by: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
  history: tuple["PassedPlan", ...] = dataclasses.field(default=(), compare=False, repr=False)
  architecture: ViTSpec | None = dataclasses.field(default=None, compare=False, repr=False)

  @property
  def dense_spec(self) -> ViTSpec:
    """Returns the spec of the dense model, at the size of the variant's images.

    Examples:
      >>> import vitcomp_jax as vc
      >>> vc.load_plan("diffrate/deit_small@2.9").dense_spec.depth
      12
    """
    return self.architecture or get_spec(self.variant)

  def layers_for(self, spec: ViTSpec) -> tuple[LayerSpec, ...]:
    """Returns the layer specs of a model under this plan.

    Raises:
      UserError: If the plan is for another depth, width or token count.

    Examples:
      >>> import vitcomp_jax as vc
      >>> plan = vc.load_plan("diffrate/deit_small@2.9")
      >>> layers = plan.layers_for(vc.get_spec("deit_small_patch16_224"))
      >>> layers[2].num_heads, layers[2].reduce.merge_keep
      (6, 176)
    """
    mine = self.dense_spec
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
    check_counts(self.layers, spec, "plan")
    for i, layer in enumerate(self.layers):
      if layer.select != KeepAll():
        spec.check_plain(f"plan: layer {i}: select")
      if hasattr(layer.reduce, "importance"):
        spec.importance(layer.reduce.importance, f"plan: layer {i}: importance")
    pairs = zip(spec.dense_layers, self.layers, strict=True)
    return tuple(layer.apply_to(base) for base, layer in pairs)

  def masked_layers_for(self, spec: ViTSpec) -> tuple[LayerSpec, ...]:
    """Returns layers of the dense model that mask the units cut by the plan.

    A masked patch still has a key and a value, the biases, as in the code of ViT-Slim's authors.

    Examples:
      >>> import vitcomp_jax as vc
      >>> from vitcomp_jax.methods.vit_slim import KeepPositions
      >>> spec = vc.get_spec("vit_mini_patch3_30")
      >>> first = dataclasses.replace(spec.dense_layers[0], select=KeepPositions((0, 1, 2)))
      >>> plan = vc.make_plan(spec, (first, *spec.dense_layers[1:]), {})
      >>> plan.masked_layers_for(spec)[0].token_gate.kept
      (0, 1, 2)
    """
    pairs = zip(spec.dense_layers, self.layers, strict=True)
    return tuple(layer.mask(spec, base) for base, layer in pairs)

  @property
  def indices(self) -> tuple[LayerIndex, ...] | None:
    """Returns the kept units of the dense layers; None if all are kept.

    Examples:
      >>> import vitcomp_jax as vc
      >>> print(vc.load_plan("diffrate/deit_small@2.9").indices)
      None
    """
    kept = [layer.index for layer in self.layers if layer.index]
    return tuple(kept) or None

  def to_json(self) -> dict[str, Any]:
    """Returns the content of a plan.json.

    Examples:
      >>> import vitcomp_jax as vc
      >>> vc.load_plan("diffrate/deit_small@2.9").to_json()["layers"][2]["reduce"]
      {'type': 'prune_merge', 'prune_keep': 190, 'merge_keep': 176}
    """
    known = self.architecture or VARIANTS.get(self.variant)
    bases = known.dense_layers if known else (None,) * len(self.layers)
    dense = {"architecture": model_fields_of(self.architecture)} if self.architecture else {}
    return {
      "format": FORMAT,
      "version": VERSION,
      "variant": self.variant,
      **dense,
      "num_tokens": self.num_tokens,
      "gmacs": round(self.gmacs, 6),
      "made_by": dict(self.made_by),
      "layers": [layer.to_json(base) for layer, base in zip(self.layers, bases, strict=True)],
    }


@dataclasses.dataclass(frozen=True)
class PassedPlan:
  """A plan that a search passed through.

  Attributes:
    step: Number of steps done.
    loss: Task loss on images that were not trained on.
    plan: The plan, adjusted to the budget.
  """

  step: int
  loss: float
  plan: Plan


@dataclasses.dataclass(frozen=True)
class PlanLayer:
  """One layer of a plan.

  Attributes:
    index: Kept units of the dense layer; None: all.
    select: Reducer before attention.
    reduce: Reducer between attention and MLP.
    size_bias: Whether attention weights tokens by size.
  """

  index: LayerIndex | None = None
  select: StaticReducer = KeepAll()
  reduce: StaticReducer = KeepAll()
  size_bias: bool = True

  def apply_to(self, base: LayerSpec) -> LayerSpec:
    """Returns a dense layer's spec with this layer's widths and reducers."""
    changes: dict[str, Any] = base.sliced(self.index) if self.index else {}
    changes |= {name: getattr(self, name) for name in ("index", "select", "reduce", "size_bias")}
    return dataclasses.replace(base, **changes)

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
    indices = {"attn_index": self.index.attn, "mlp_index": self.index.mlp} if self.index else {}
    reductions = {"select": self.select.to_json(), "reduce": self.reduce.to_json()}
    plain = {} if self.size_bias else {"size_bias": False}
    return {**widths, **indices, **reductions, **plain}


def make_plan(
  spec: ViTSpec,
  layers: Sequence[LayerSpec],
  made_by: Mapping[str, Any],
  indices: Sequence[LayerIndex | None] | None = None,
) -> Plan:
  """Makes the plan of a model whose layers are static.

  Args:
    spec: The model.
    layers: Layers of the model.
    made_by: Origin of the layers, as JSON.
    indices: Units of the dense layers that slimmed ones keep; None: those in the layers.

  Raises:
    UserError: If a layer still searches, or is trained to select tokens.

  Examples:
    >>> import vitcomp_jax as vc
    >>> spec = vc.get_spec("deit_small_patch16_224")
    >>> layers = vc.methods.tome.layers(spec, r=13)
    >>> round(vc.make_plan(spec, layers, {"method": "tome"}).gmacs, 2)
    2.7
  """
  if len(layers) != spec.depth:
    raise UserError(f"layers: expected {spec.depth} for {spec.name}, got {len(layers)}.")
  plan_layers = []
  for i, layer in enumerate(layers):
    select, reduce = layer.select, layer.reduce
    if not (isinstance(select, StaticReducer) and isinstance(reduce, StaticReducer)):
      raise UserError(
        f"layer {i}: expected deployed reducers, got ones that still learn "
        f"({type(select).__name__}, {type(reduce).__name__}); deploy them first."
      )
    index = indices[i] if indices else layer.index
    plan_layers.append(PlanLayer(index, select, reduce, layer.size_bias))
  gmacs = macs.static_macs(spec, tuple(layers)) / 1e9
  architecture = None if is_variant(spec) else spec
  return Plan(
    spec.name, spec.num_tokens, tuple(plan_layers), gmacs, made_by, architecture=architecture
  )


def plan_of(model: Backbone) -> Plan | None:
  """Returns the plan of a deployed model; None for a dense one.

  Raises:
    UserError: If no plan can represent its layers, as they still learn or mask.
  """
  spec, dense = model.spec, model.spec.dense_layers
  # Stochastic depth is only for training.
  layers = tuple(dataclasses.replace(layer, drop_path=0.0) for layer in model.layers)
  if layers == dense:
    return None
  plan = make_plan(spec, layers, {})
  if plan.layers_for(spec) != layers:
    raise UserError(
      "expected a deployed model, got one with layers that mask or have other widths than a plan "
      "says; build it with the layers of a plan."
    )
  return plan


def check_counts(layers: Sequence[PlanLayer], spec: ViTSpec, where: str) -> None:
  """Refuses invalid token counts.

  Counts may rise between layers, as in some published plans; a count above the tokens left has no
  effect.
  """
  n = 0
  for index, layer in enumerate(layers):
    n = spec.starts.get(index, n)
    at = f"{where}: layer {index}"
    layer.select.check(n, spec.num_prefix, spec.num_tokens, at)
    n = layer.select.count(n)
    layer.reduce.check(n, spec.num_prefix, spec.num_tokens, at)
    n = layer.reduce.count(n)
