"""Plans: the tokens and units that each layer keeps."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vitcomp_jax.cost import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.reducers import KeepAll, StaticReducer
from vitcomp_jax.models.slicing import LayerIndex
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.variants import VARIANTS, get_spec, is_variant, model_fields_of
from vitcomp_jax.plans.layer import PlanLayer, check_counts

FORMAT, VERSION = "vitcomp-plan", 1


@dataclasses.dataclass(frozen=True)
class Plan:
  """A compression plan for one variant and token count.

  Attributes:
    variant: timm's name of the model.
    num_tokens: Tokens before any reduction, prefix included.
    layers: Kept units and reducers of each layer.
    gmacs: 1e9 multiply-accumulates per image.
    made_by: Origin of the plan, such as method and steps, as JSON.
    history: Plans that the search passed through; empty if they were not kept, as in a file.
    architecture: Spec of the dense model, if the variant's name does not determine it; or None.
    params: Weights of the compressed network, if a search made new ones; None: those of the dense
      model, or slices of them. A plan.json does not hold them; `save` writes them beside it.

  Examples:
    >>> import vitcomp_jax as vc
    >>> plan = vc.load_plan("diffrate/deit_small@2.9")
    >>> plan.variant, plan.num_tokens, len(plan.layers)
    ('deit_small_patch16_224', 197, 12)
  """

  variant: str
  num_tokens: int
  layers: tuple[PlanLayer, ...]
  gmacs: float
  made_by: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
  history: tuple["PassedPlan", ...] = dataclasses.field(default=(), compare=False, repr=False)
  architecture: ViTSpec | None = dataclasses.field(default=None, compare=False, repr=False)
  params: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False, repr=False)

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
      UserError: If the plan is for another depth, width or token count, or a layer has widths to
        which the model's layer cannot be cut.

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
      layer.check_widths(spec.dense_layers[i], f"plan: layer {i}")
    pairs = zip(spec.dense_layers, self.layers, strict=True)
    return tuple(layer.apply_to(base) for base, layer in pairs)

  def masked_layers_for(self, spec: ViTSpec) -> tuple[LayerSpec, ...]:
    """Returns layers of the dense model that mask the units cut by the plan.

    A masked patch still has a key and a value (the biases), as in the code of ViT-Slim's authors.

    Raises:
      UserError: If the plan has widths without indices, as it then cuts no units of dense layers.

    Examples:
      >>> import vitcomp_jax as vc
      >>> from vitcomp_jax.methods.vit_slim import KeepPositions
      >>> spec = vc.get_spec("vit_mini_patch3_30")
      >>> first = dataclasses.replace(spec.dense_layers[0], select=KeepPositions((0, 1, 2)))
      >>> plan = vc.make_plan(spec, (first, *spec.dense_layers[1:]), {})
      >>> plan.masked_layers_for(spec)[0].token_gate.kept
      (0, 1, 2)
    """
    if self.has_own_widths:
      raise UserError(
        "plan: expected indices of units to mask in the dense model, got widths with weights of "
        "their own; use the slimmed model."
      )
    pairs = zip(spec.dense_layers, self.layers, strict=True)
    return tuple(layer.mask(spec, base) for base, layer in pairs)

  @property
  def has_own_widths(self) -> bool:
    """Returns whether layers have widths without indices, so that dense weights do not fit.

    Examples:
      >>> import vitcomp_jax as vc
      >>> vc.load_plan("diffrate/deit_small@2.9").has_own_widths
      False
    """
    return any(layer.widths or layer.rotated for layer in self.layers)

  @property
  def is_slimmed(self) -> bool:
    """Returns whether the plan removes units or patches by index, or has widths of its own.

    Examples:
      >>> import vitcomp_jax as vc
      >>> vc.load_plan("diffrate/deit_small@2.9").is_slimmed
      False
    """
    return bool(self.indices) or self.has_own_widths

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
    known = self.dense_spec if self.has_own_widths else self.architecture
    known = known or VARIANTS.get(self.variant)
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
    loss: Task loss on held-out images.
    plan: The plan, adjusted to the budget.
  """

  step: int
  loss: float
  plan: Plan


def make_plan(
  spec: ViTSpec,
  layers: Sequence[LayerSpec],
  made_by: Mapping[str, Any],
  indices: Sequence[LayerIndex | None] | None = None,
  params: Mapping[str, Any] | None = None,
) -> Plan:
  """Makes the plan of a model whose layers are static.

  Args:
    spec: The model.
    layers: Layers of the model.
    made_by: Origin of the layers, as JSON.
    indices: Units of the dense layers that slimmed ones keep; None: those that the layers hold.
    params: Weights of the model, if they are not slices of the dense model's; None: not kept.

  Raises:
    UserError: If a layer is still searched or trained to select tokens, or has fewer heads but no
      indices.

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
    index, dense = indices[i] if indices else layer.index, spec.dense_layers[i]
    made = PlanLayer(index, select, reduce, layer.size_bias)
    if index is None:
      if layer.num_heads != dense.num_heads:
        raise UserError(
          f"layer {i}: expected {dense.num_heads} heads, got {layer.num_heads} without the indices "
          "of the units that they keep."
        )
      own = None if layer.widths == dense.widths else layer.widths
      made = dataclasses.replace(made, widths=own, rotated=layer.rotated)
    plan_layers.append(made)
  gmacs = macs.static_macs(spec, tuple(layers)) / 1e9
  architecture = None if is_variant(spec) else spec
  return Plan(
    spec.name,
    spec.num_tokens,
    tuple(plan_layers),
    gmacs,
    made_by,
    architecture=architecture,
    params=params,
  )


def plan_of(model: Backbone) -> Plan | None:
  """Returns the plan of a deployed model; None for a dense one.

  Raises:
    UserError: If no plan can represent its layers, because they still learn or mask.
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
