"""Fits weights under timm's names to a model."""

import fnmatch
import functools
import logging
import math
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights.dialects.renaming import Array
from vitcomp_jax.weights.positions import resample_positions
from vitcomp_jax.weights.timm_names import (
  Params,
  Shape,
  State,
  module,
  owner,
  timm_shapes,
  to_flax,
  to_timm,
)

Fresh = Callable[[], State] | None  # makes initial parameters under timm's names

# Parameters that no classifier uses; no others are dropped without being asked for.
IGNORED = (
  "mask_token",  # stands for masked patches during pre-training only
  "pre_logits.*",  # ImageNet-21k: a layer that timm dropped; the heads after it are all zero
)
HEADS = ("head", "head_dist", "head.fc.fc2")  # the last layers of classifiers
MAX_LISTED = 10  # number of names per kind to list in an error


def check(params: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
  """Checks that parameters are exactly those of a model.

  Args:
    params: Flax tree of arrays.
    expected: Flax tree of shapes (anything with a `shape`).

  Raises:
    UserError: If parameters are missing, unexpected or misshapen; the message lists them by timm's
      names.
  """
  _check_shapes(timm_shapes(params), timm_shapes(expected))


def port(
  state: State,
  expected: Mapping[str, Any],
  *,
  grid: tuple[int, int],
  prefix_positions: int,
  antialias: bool = True,
  old_grid: tuple[int, int] | None = None,
  initial: Callable[[], Mapping[str, Any]] | None = None,
  put: Callable[[np.ndarray, str], Any] | None = None,
) -> Params:
  """Fits weights under timm's names to a model.

  - Position embeddings of another grid are resampled. If the weights have as many patches as the
    model, their grid is assumed to be the model's, unless `old_grid` differs.
  - The classifier is dropped if the model has none. If the model has another number of classes, or
    the weights have no classifier, it comes from `initial`.
  - MAE's pre-training weights lack `fc_norm`, which also comes from `initial`.

  Dropped, initialised and resampled parameters are logged.

  Args:
    state: Arrays by name, in PyTorch's layout, as `files.read` returns them.
    expected: The model's Flax tree of shapes.
    grid: The model's patches per column and per row (height, width).
    prefix_positions: Number of leading rows of the model's `pos_embed` that belong to no patch.
    antialias: Rule for resampling positions, see `resample_positions`.
    old_grid: The grid of the weights; None: the model's grid if it has as many patches, or else a
      square.
    initial: Makes initial parameters, at least those of `head`, `head_dist` and `fc_norm` if the
      model has them; called only if needed. None: all parameters must come from the weights.
    put: Function to apply to each array, see `to_flax`.

  Returns:
    The Flax parameter tree, in the weights' precision.

  Raises:
    UserError: If the weights do not fit.
  """
  shapes = timm_shapes(expected)
  fresh = None if initial is None else functools.cache(lambda: to_timm(initial()))
  kept = {name: array for name, array in state.items() if not _is_ignored(name)}
  fitted = _from_dynamicvit(kept, shapes)
  fitted = _fit_heads(fitted, shapes, fresh)
  fitted = _fit_pretraining(fitted, shapes, fresh)
  if "pos_embed" in fitted and "pos_embed" in shapes:
    fitted["pos_embed"] = _fit_positions(
      np.asarray(fitted["pos_embed"]),
      shapes["pos_embed"],
      prefix_positions,
      old_grid,
      grid,
      antialias,
    )
  _check_shapes({name: tuple(array.shape) for name, array in fitted.items()}, shapes)
  return to_flax(fitted, put)


def _is_ignored(name: str) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in IGNORED)


def _from_dynamicvit(state: State, shapes: Mapping[str, Shape]) -> dict[str, Array]:
  """Renames DynamicViT's predictors, which its authors number, by the layers that they precede."""
  layers = sorted({int(name.split(".")[1]) for name in shapes if ".select." in name})
  renamed = {}
  for name, array in state.items():
    match = re.fullmatch(r"score_predictor\.(\d+)\.(.*)", name)
    if match and int(match[1]) < len(layers):
      name = f"blocks.{layers[int(match[1])]}.select.{match[2]}"
    renamed[name] = array
  return renamed


def without_head(state: State) -> dict[str, Array]:
  """Drops the classifier."""
  return {
    name: array
    for name, array in state.items()
    if owner(name) not in HEADS and not name.startswith("head.fc.")
  }


def _fit_heads(state: State, shapes: Mapping[str, Shape], fresh: Fresh) -> dict[str, Array]:
  """Drops the classifier, or takes a fresh one, if the model requires it."""
  wanted = [head for head in HEADS if f"{head}.weight" in shapes]
  if not wanted:
    left = without_head(state)
    if len(left) < len(state):
      logging.info("weights: left out their classifier, as the model gives features")
    return left
  if fresh is None:
    return dict(state)

  def fits(head: str) -> bool:
    # An incomplete classifier means a damaged file, which the final check reports.
    parts = [array for name, array in state.items() if owner(name) == head]
    return bool(parts) and all(a.shape[:1] == shapes[f"{head}.weight"][:1] for a in parts)

  if all(fits(head) for head in wanted):
    return dict(state)
  logging.warning(
    "weights: their classifier (%s) is replaced by a random one of %d classes, to be trained",
    ", ".join(str(a.shape[0]) for n, a in state.items() if n == f"{wanted[0]}.weight") or "none",
    shapes[f"{wanted[0]}.weight"][0],
  )
  kept = {name: array for name, array in state.items() if owner(name) not in wanted}
  return kept | {name: array for name, array in fresh().items() if owner(name) in wanted}


def _fit_pretraining(state: State, shapes: Mapping[str, Shape], fresh: Fresh) -> dict[str, Array]:
  """Replaces the norm from MAE's pre-training with a fresh norm for pooled features.

  Raises:
    UserError: If there are no initial parameters.
  """
  has, wants = {module(name) for name in state}, {module(name) for name in shapes}
  if not ({"norm"} <= has - wants and {"fc_norm"} <= wants - has):
    return dict(state)
  if fresh is None or "head" not in wants:
    raise UserError(
      "weights are of a pre-training: expected fc_norm.weight and fc_norm.bias, got norm.weight "
      "and norm.bias; give fine-tuned weights, or num_classes for a fresh classifier to train."
    )
  kept = {name: array for name, array in state.items() if module(name) != "norm"}
  return kept | {name: array for name, array in fresh().items() if module(name) == "fc_norm"}


def _fit_positions(
  positions: np.ndarray,
  shape: Shape,
  prefix: int,
  old_grid: tuple[int, int] | None,
  grid: tuple[int, int],
  antialias: bool,
) -> np.ndarray:
  """Resamples positions of another grid; positions that fit no grid are left to the final check."""
  if positions.ndim != 3 or positions.shape[::2] != shape[::2]:
    return positions
  patches = positions.shape[1] - prefix
  side = math.isqrt(max(patches, 0))
  old_grid = old_grid or (grid if math.prod(grid) == patches else (side, side))
  if patches <= 0 or math.prod(old_grid) != patches:
    return positions
  if old_grid != grid:
    sizes = (*old_grid, *grid)
    logging.info("weights: position embeddings of %d x %d patches resampled to %d x %d", *sizes)
  return resample_positions(positions, prefix, old_grid, grid, antialias)


def _check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
  """Raises a one-line UserError that lists every difference."""
  missing = [f"{name} {shape}" for name, shape in expected.items() if name not in found]
  extra = [f"{name} {shape}" for name, shape in found.items() if name not in expected]
  differing = [name for name in expected if name in found and found[name] != expected[name]]
  only_classes = all(
    owner(name) in HEADS and found[name][1:] == expected[name][1:] for name in differing
  )
  if differing and only_classes and not missing and not extra:
    theirs, ours = (shapes[differing[0]][0] for shapes in (found, expected))
    raise UserError(
      f"weights do not fit the model: they know {theirs} classes, the model has "
      f"{ours}. Give weights for the data's classes, or train a head by the stage pretrain."
    )
  hint = _prefix_hint(found, expected)
  misshapen = [f"{name} (expected {expected[name]}, got {found[name]})" for name in differing]
  kinds = {"missing": missing, "unexpected": extra, "misshapen": misshapen}
  found_faults = [f"{len(v)} {kind}: {_listed(v)}" for kind, v in kinds.items() if v]
  if found_faults:
    raise UserError(
      f"weights do not fit the model: {'; '.join(found_faults)}. "
      f"{hint}Give weights of this variant, or the variant of these weights."
    )


def _prefix_hint(found: Iterable[str], expected: Container[str]) -> str:
  """Returns a hint if names would fit without a common prefix, or else an empty string."""
  extra = [name for name in found if name not in expected]
  for prefix in {name.partition(".")[0] + "." for name in extra}:
    count = sum(name.startswith(prefix) and name.removeprefix(prefix) in expected for name in extra)
    if count:
      return (
        f"{count} names would fit without {prefix!r}, which is removed only where all names begin "
        "with it and a usual wrapper puts it there: rename them. "
      )
  return ""


def _listed(items: Sequence[str]) -> str:
  more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
  return ", ".join(items[:MAX_LISTED]) + more
