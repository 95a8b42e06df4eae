"""Plans without a search: ToMe, EViT, DynamicViT, and hand-made and random schedules.

Each function takes a dense model, and either the method's own parameter or a budget: `macs`, a
fraction of the dense model's multiply-accumulates, or `gmacs`, 1e9 multiply-accumulates per image.
"""

import math
from collections.abc import Sequence
from typing import Any

from vitcomp_jax import methods
from vitcomp_jax.cost import budgets
from vitcomp_jax.cost.cost_models import MACS
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.base import Layers, quarters
from vitcomp_jax.methods.handmade import random_counts
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.plans import Plan, make_plan


def tome(
  model: Backbone,
  r: int | Sequence[int | float] | None = None,
  *,
  macs: float | None = None,
  gmacs: float | None = None,
) -> Plan:
  """Makes ToMe's plan: every layer merges its most similar tokens.

  Args:
    model: The dense model.
    r: Tokens to merge in each layer, at most half of its tokens; or a list with one count per
      layer; or a pair of mean and inflection, see `methods.tome.tome_counts`.
    macs: Budget as a fraction, instead of `r`.
    gmacs: Budget in 1e9 multiply-accumulates, instead of `r`.

  Raises:
    UserError: If not exactly one of the three is given, or a budget cannot be met.

  Examples:
    >>> import vitcomp_jax as vc
    >>> model, _ = vc.load("vit_mini_patch3_30", "bundled")
    >>> vc.tome(model, r=7).layers[0].reduce
    BipartiteMerge(remove=7)
    >>> vc.tome(model, macs=0.65).made_by
    {'method': 'tome', 'macs': 0.65}

  References:
    Bolya et al., `ToMe <https://arxiv.org/abs/2210.09461>`_, 2022.
  """
  spec = _dense_spec(model)
  if r is None:
    return _within("tome", spec, macs, gmacs)
  _check_alone("r", macs, gmacs)
  _check_r(r, spec.depth)
  # ToMe's authors do not use proportional attention for MAE.
  layers = methods.tome.layers(spec, r, prop_attn=spec.pool != "size_mean")
  return _plan(spec, layers, method="tome", r=r)


def _check_r(r: int | Sequence[int | float], depth: int) -> None:
  """Rejects anything but a count, a list of counts, or a pair of mean and inflection."""
  if isinstance(r, tuple) and len(r) == 2:
    is_right = all(map(_is_number, r)) and r[0] >= 0 and -1 <= r[1] <= 1
  elif isinstance(r, list | tuple):
    is_right = len(r) <= depth and all(type(count) is int and count >= 0 for count in r)
  else:
    is_right = type(r) is int and r >= 0
  if not is_right:
    raise UserError(
      f"r: expected a whole number from 0, up to {depth} of them, or a pair of mean and inflection "
      f"(-1 to 1), got {r!r}."
    )


def _is_number(value: object) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def evit(
  model: Backbone,
  keep: float | Sequence[float] | None = None,
  *,
  fuse: bool = True,
  macs: float | None = None,
  gmacs: float | None = None,
) -> Plan:
  """Makes EViT's plan: removes tokens after a quarter, a half and three quarters of the layers.

  Args:
    model: The dense model.
    keep: Share of patch tokens to keep at each of the three places; or one share per layer.
    fuse: Whether the removed tokens are fused into one token.
    macs: Budget as a fraction, instead of `keep`.
    gmacs: Budget in 1e9 multiply-accumulates, instead of `keep`.

  Raises:
    UserError: If not exactly one of the three is given, or it is out of range.

  Examples:
    >>> import vitcomp_jax as vc
    >>> model, _ = vc.load("vit_mini_patch3_30", "bundled")
    >>> vc.evit(model, keep=0.7).layers[2].reduce
    AttentiveSelect(keep=71, fuse=True, importance='cls')

  References:
    Liang et al., `EViT <https://arxiv.org/abs/2202.07800>`_, 2022.
  """
  spec, name = _dense_spec(model), "evit" if fuse else "evit_nofuse"
  if keep is None:
    return _within(name, spec, macs, gmacs)
  _check_alone("keep", macs, gmacs)
  if isinstance(keep, Sequence):
    rates = [_share(share) for share in keep]
  else:
    rates = [_share(keep) if i in quarters(spec) else 1.0 for i in range(spec.depth)]
  if len(rates) != spec.depth:
    raise UserError(f"keep: expected one share, or {spec.depth} of them, got {len(rates)}.")
  return _plan(spec, methods.evit.layers(spec, rates, fuse), method=name, keep=keep)


def dynamicvit(
  model: Backbone,
  keep: float | None = None,
  *,
  macs: float | None = None,
  gmacs: float | None = None,
) -> Plan:
  """Makes DynamicViT's plan, whose prediction modules must be trained.

  Args:
    model: The dense model.
    keep: Share of patch tokens to keep after a quarter of the layers; its square is kept after a
      half, and its cube after three quarters.
    macs: Budget as a fraction, instead of `keep`.
    gmacs: Budget in 1e9 multiply-accumulates, instead of `keep`.

  Raises:
    UserError: If not exactly one of the three is given, or it is out of range.

  Examples:
    >>> import vitcomp_jax as vc
    >>> model, _ = vc.load("vit_mini_patch3_30", "bundled")
    >>> [layer.select.keep for layer in vc.dynamicvit(model, keep=0.5).layers[2::2]]
    [51, 26, 13]

  References:
    Rao et al., `DynamicViT <https://arxiv.org/abs/2106.02034>`_, 2021.
  """
  spec = _dense_spec(model)
  if keep is None:
    return _within("dynamicvit", spec, macs, gmacs)
  _check_alone("keep", macs, gmacs)
  ratios = [_share(keep) ** power for power in (1, 2, 3)]
  layers = methods.dynamicvit.layers(spec, quarters(spec), ratios)
  return _plan(spec, layers, method="dynamicvit", keep=keep)


def uniform(
  model: Backbone,
  *,
  macs: float | None = None,
  gmacs: float | None = None,
  merge: bool = False,
  importance: str = "auto",
) -> Plan:
  """Makes a plan that prunes or merges to the same token count in all layers.

  Args:
    model: The dense model.
    macs: Budget as a fraction.
    gmacs: Budget in 1e9 multiply-accumulates.
    merge: Whether tokens are merged rather than pruned.
    importance: Importance metric, see `ViTSpec.importance`.

  Raises:
    UserError: If not exactly one budget is given, or it cannot be met.

  Examples:
    >>> import vitcomp_jax as vc
    >>> model, _ = vc.load("vit_mini_patch3_30", "bundled")
    >>> plan = vc.uniform(model, macs=0.65)
    >>> round(plan.gmacs / vc.count_cost(model).gmacs, 2)
    0.65
  """
  name = "uniform_merge" if merge else "uniform"
  return _within(name, _dense_spec(model), macs, gmacs, importance)


def linear(
  model: Backbone,
  *,
  macs: float | None = None,
  gmacs: float | None = None,
  merge: bool = False,
  importance: str = "auto",
) -> Plan:
  """Makes a plan whose token counts fall linearly with depth, by pruning or merging.

  Args:
    model: The dense model.
    macs: Budget as a fraction.
    gmacs: Budget in 1e9 multiply-accumulates.
    merge: Whether tokens are merged rather than pruned.
    importance: Importance metric, see `ViTSpec.importance`.

  Raises:
    UserError: If not exactly one budget is given, or it cannot be met.

  Examples:
    >>> import vitcomp_jax as vc
    >>> model, _ = vc.load("vit_mini_patch3_30", "bundled")
    >>> plan = vc.linear(model, gmacs=0.03, merge=True)
    >>> round(plan.gmacs, 3)
    0.03
  """
  name = "linear_merge" if merge else "linear"
  return _within(name, _dense_spec(model), macs, gmacs, importance)


def random(
  model: Backbone, *, macs: float | None = None, gmacs: float | None = None, seed: int = 0
) -> Plan:
  """Draws a random plan: sorted random counts whose cost is within 1 % of a budget.

  Args:
    model: The dense model.
    macs: Budget as a fraction.
    gmacs: Budget in 1e9 multiply-accumulates.
    seed: Random seed.

  Raises:
    UserError: If not exactly one budget is given, or no draw meets it.

  Examples:
    >>> import vitcomp_jax as vc
    >>> model, _ = vc.load("vit_mini_patch3_30", "bundled")
    >>> vc.random(model, macs=0.6, seed=1) == vc.random(model, macs=0.6, seed=1)
    True

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Fig. 5.
  """
  spec = _dense_spec(model)
  if type(seed) is not int or seed < 0:
    raise UserError(f"seed: expected a whole number from 0, got {seed!r}.")
  (layers,) = random_counts(spec, _target(spec, macs, gmacs), 1, seed)
  return _plan(spec, layers, method="random", seed=seed, macs=macs, gmacs=gmacs)


def _target(spec: ViTSpec, macs: float | None, gmacs: float | None) -> float:
  return budgets.target(spec, MACS, {"macs": macs, "gmacs": gmacs})


def _within(
  name: str,
  spec: ViTSpec,
  macs: float | None,
  gmacs: float | None,
  importance: str = "auto",
) -> Plan:
  layers = methods.within(name, spec, _target(spec, macs, gmacs), importance)
  return _plan(spec, layers, method=name, macs=macs, gmacs=gmacs)


def _plan(spec: ViTSpec, layers: Layers, **made_by: Any) -> Plan:
  return make_plan(spec, layers, {k: v for k, v in made_by.items() if v is not None})


def _dense_spec(model: Backbone) -> ViTSpec:
  if model.layers != model.spec.dense_layers:
    raise UserError(
      f"expected a dense model, got {model.spec.name} under a plan; give the model that "
      "compress() was given."
    )
  return model.spec


def _check_alone(name: str, macs: float | None, gmacs: float | None) -> None:
  if (macs, gmacs) != (None, None):
    raise UserError(f"budget: expected {name} alone, or macs or gmacs, got several of them.")


def _share(value: float) -> float:
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
    raise UserError(f"keep: expected a share above 0 and at most 1, got {value!r}.")
  return float(value)
