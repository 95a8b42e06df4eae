"""timm's names and layouts to the Flax parameter tree and back, and fitting weights to a model.

| timm                                       | Flax                                    |
|--------------------------------------------|-----------------------------------------|
| `blocks.0.…`                               | `blocks_0/…`                            |
| Linear `weight [out, in]`                  | `kernel [in, out]`                      |
| Conv2d `weight [out, in, kh, kw]`          | `kernel [kh, kw, in, out]`              |
| LayerNorm `weight [d]`                     | `scale [d]`                             |
| `bias`, `gamma`, tokens, positions         | the same                                |

The rank tells a linear layer, a convolution and a norm apart. The query, key and value stay one
fused kernel with timm's order of rows (q, k, v; each head by head).
"""

import fnmatch
import functools
import logging
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights.positions import resample_positions

Params = dict[str, Any]
State = Mapping[str, np.ndarray]
Shape = tuple[int, ...]
Fresh = Callable[[], State] | None  # makes initial parameters under timm's names

# What upstream files hold beside the classifier; nothing else is ever left out unasked.
IGNORED = (
  "mask_token",  # DINOv2 and MAE: stands for masked patches during pre-training only
  "decoder_embed.*",  # MAE pre-training: the decoder
  "decoder_pos_embed",
  "decoder_blocks.*",
  "decoder_norm.*",
  "decoder_pred.*",
  "pre_logits.*",  # ImageNet-21k: a layer that timm dropped; the heads behind it are all zero
)
HEADS = ("head", "head_dist", "head.fc.fc2")  # the last layers of classifiers
MAX_LISTED = 10  # names per kind in an error

_TO_FLAX = {2: (1, 0), 4: (2, 3, 1, 0)}
_TO_TIMM = {2: (1, 0), 4: (3, 2, 0, 1)}
# Modules of timm whose parameter is called `scale`, not `weight`.
_SCALES = ("res_scale", "layer_scale", "act")


def to_flax(state: State) -> Params:
  """The Flax parameter tree of timm's tensors: renamed and transposed, nothing else.

  Args:
    state: Arrays by timm's names, in PyTorch's layout.

  Returns:
    Nested dicts of the same arrays in Flax's layout. `to_timm` is the exact inverse.
  """
  params: Params = {}
  for name, array in state.items():
    *modules, leaf = name.split(".")
    if leaf == "weight":
      leaf = {1: "scale", 2: "kernel", 4: "kernel"}.get(array.ndim, leaf)
      array = array.transpose(_TO_FLAX.get(array.ndim))
    branch = params
    for module in _join_indices(modules):
      branch = branch.setdefault(module, {})
    branch[leaf] = np.asarray(array, order="C")
  return params


def to_timm(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """A Flax parameter tree as timm's tensors: renamed and transposed, nothing else.

  Args:
    params: Nested dicts of arrays.

  Returns:
    Contiguous arrays by timm's names, in PyTorch's layout.
  """
  state = {}
  for path, leaf in _leaves(params):
    array = np.asarray(leaf)
    if path[-1] == "kernel":
      array = array.transpose(_TO_TIMM.get(array.ndim))
    state[timm_name(path)] = np.asarray(array, order="C")
  return state


def timm_name(path: Sequence[str]) -> str:
  """The name timm gives a parameter.

  Args:
    path: The keys from the root of the Flax tree to the parameter.

  Returns:
    For example `blocks.0.attn.qkv.weight` for `blocks_0, attn, qkv, kernel`.
  """
  *modules, leaf = path
  owner = modules[-1] if modules else ""
  if leaf == "kernel" or (leaf == "scale" and not owner.startswith(_SCALES)):
    leaf = "weight"
  # `blocks_0` is item 0 of `blocks`; leaves keep their names.
  names = [re.sub(r"_(?=\d+(_\d+)*$)", ".", module) for module in modules]
  return ".".join([*names, leaf])


def timm_shapes(params: Mapping[str, Any]) -> dict[str, Shape]:
  """Shapes in PyTorch's layout by timm's names.

  Args:
    params: Nested dicts of anything with a `shape`, such as `jax.ShapeDtypeStruct`.

  Returns:
    One shape per parameter.
  """
  shapes = {}
  for path, leaf in _leaves(params):
    shape = tuple(leaf.shape)
    axes = _TO_TIMM.get(len(shape)) if path[-1] == "kernel" else None
    shapes[timm_name(path)] = tuple(shape[i] for i in axes) if axes else shape
  return shapes


def check(params: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
  """Refuses parameters that are not exactly those of the model.

  Args:
    params: Flax tree of arrays.
    expected: Flax tree of shapes (anything with a `shape`).

  Raises:
    UserError: Names what is missing, unexpected or misshapen, as timm calls it.
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
) -> Params:
  """Fits weights under timm's (or the authors') names to a model.

  Position embeddings of another grid are resampled; those of as many patches as the model has
  are taken as they are, unless `old_grid` says that their rows and columns are others. A model
  without classifier drops the weights' classifier. With `initial`, a classifier for another
  number of classes, or none in the weights, is taken from there; so is `fc_norm` of MAE's
  pre-training weights, which have none. The log says what is dropped, fresh or resampled. The
  authors' DINOv2 weights with registers hold the position of the CLS token apart from it; it is
  added in, as timm does.

  Args:
    state: Arrays by name, in PyTorch's layout, as `files.read` gives them.
    expected: The model's Flax tree of shapes.
    grid: The model's patches per column and per row (height, width).
    prefix_positions: Leading rows of the model's `pos_embed` that belong to no patch.
    antialias: How positions are resampled, see `resample_positions`.
    old_grid: The grid of the weights; None: the model's where that has as many patches,
      otherwise square.
    initial: Makes initial parameters, at least of `head`, `head_dist` and `fc_norm` where the
      model has them; called where they are needed. None: the weights have to bring everything.

  Returns:
    The Flax parameter tree, in the weights' precision.

  Raises:
    UserError: If the weights do not fit.
  """
  shapes = timm_shapes(expected)
  fresh = None if initial is None else functools.cache(lambda: to_timm(initial()))
  fitted = _from_upstream(state, shapes)
  fitted = _fit_heads(fitted, shapes, fresh)
  fitted = _fit_pretraining(fitted, shapes, fresh)
  if "pos_embed" in fitted and "pos_embed" in shapes:
    fitted["pos_embed"] = _fit_positions(
      fitted["pos_embed"], shapes["pos_embed"], prefix_positions, old_grid, grid, antialias
    )
  _check_shapes({name: array.shape for name, array in fitted.items()}, shapes)
  return to_flax(fitted)


def _from_upstream(state: State, shapes: Mapping[str, Shape]) -> dict[str, np.ndarray]:
  """The authors' own names and layouts as timm's, without what no classifier uses."""
  state = {
    name: array
    for name, array in state.items()
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in IGNORED)
  }
  if {"register_tokens", "cls_token", "pos_embed"} <= state.keys():
    positions = state["pos_embed"]
    state["reg_token"] = state.pop("register_tokens")
    state["cls_token"] = state["cls_token"] + positions[:, :1]
    state["pos_embed"] = positions[:, 1:]
  if "downsample_layers.0.conv.weight" in state:
    state = {_caformer_name(name): array for name, array in state.items()}
    # On a grid, timm has projections as convolutions of single places.
    for name in (name for name in state if name in shapes and state[name].ndim == 2):
      if shapes[name] == (*state[name].shape, 1, 1):
        state[name] = state[name].reshape(shapes[name])
  # DynamicViT counts its prediction modules; here each stands in the layer that it precedes.
  places = sorted({int(name.split(".")[1]) for name in shapes if ".select." in name})
  modules = {f"score_predictor.{i}.": f"blocks.{place}.select." for i, place in enumerate(places)}
  for theirs, ours in modules.items():
    state = {
      ours + name.removeprefix(theirs) if name.startswith(theirs) else name: array
      for name, array in state.items()
    }
  return state


def _caformer_name(name: str) -> str:
  """timm's name of what CAFormer's authors, and DiffRate's, call otherwise."""
  name = re.sub(r"^downsample_layers\.0\.(post_)?", "stem.", name)
  name = re.sub(r"^downsample_layers\.(\d+)\.(pre_)?", r"stages.\1.downsample.", name)
  name = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", name)
  return re.sub(r"^norm\.", "head.norm.", re.sub(r"^head\.", "head.fc.", name))


def without_head(state: State) -> dict[str, np.ndarray]:
  """Leaves out the classifier."""
  return {
    name: array
    for name, array in state.items()
    if _owner(name) not in HEADS and not name.startswith("head.fc.")
  }


def _fit_heads(state: State, shapes: Mapping[str, Shape], fresh: Fresh) -> dict[str, np.ndarray]:
  """Drops the classifier, or takes a fresh one, where the model wants that."""
  wanted = [head for head in HEADS if f"{head}.weight" in shapes]
  if not wanted:
    left = without_head(state)
    if len(left) < len(state):
      logging.info("weights: left out their classifier, as the model gives features")
    return left
  if fresh is None:
    return dict(state)

  def fits(head: str) -> bool:
    # Part of a classifier is a damaged file, which the check at the end reports.
    parts = [array for name, array in state.items() if _owner(name) == head]
    return bool(parts) and all(a.shape[:1] == shapes[f"{head}.weight"][:1] for a in parts)

  if all(fits(head) for head in wanted):
    return dict(state)
  logging.warning(
    "weights: their classifier (%s) is replaced by a random one of %d classes, to be trained",
    ", ".join(str(len(a)) for n, a in state.items() if n == f"{wanted[0]}.weight") or "none",
    shapes[f"{wanted[0]}.weight"][0],
  )
  kept = {name: array for name, array in state.items() if _owner(name) not in wanted}
  return kept | {name: array for name, array in fresh().items() if _owner(name) in wanted}


def _fit_pretraining(
  state: State, shapes: Mapping[str, Shape], fresh: Fresh
) -> dict[str, np.ndarray]:
  """Replaces the norm of MAE's pre-training by a fresh norm of pooled features.

  Raises:
    UserError: If there is no fresh one to take.
  """
  has, wants = {_module(name) for name in state}, {_module(name) for name in shapes}
  if not ({"norm"} <= has - wants and {"fc_norm"} <= wants - has):
    return dict(state)
  if fresh is None or "head" not in wants:
    raise UserError(
      "weights are of a pre-training: expected fc_norm.weight and fc_norm.bias, got norm.weight "
      "and norm.bias; give fine-tuned weights, or num_classes for a fresh classifier to train."
    )
  kept = {name: array for name, array in state.items() if _module(name) != "norm"}
  return kept | {name: array for name, array in fresh().items() if _module(name) == "fc_norm"}


def _fit_positions(
  positions: np.ndarray,
  shape: Shape,
  prefix: int,
  old_grid: tuple[int, int] | None,
  grid: tuple[int, int],
  antialias: bool,
) -> np.ndarray:
  """Resamples positions of another grid; leaves what fits no grid for the check to report."""
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
  """Raises a UserError of one line that lists every kind of difference."""
  missing = [f"{name} {shape}" for name, shape in expected.items() if name not in found]
  extra = [f"{name} {shape}" for name, shape in found.items() if name not in expected]
  differing = [name for name in expected if name in found and found[name] != expected[name]]
  only_classes = all(
    _owner(name) in HEADS and found[name][1:] == expected[name][1:] for name in differing
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
  """Returns a hint if names would fit without a common prefix."""
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


def _module(name: str) -> str:
  """The outermost module of a parameter."""
  return name.split(".", 1)[0]


def _owner(name: str) -> str:
  """The innermost module of a parameter."""
  return name.rpartition(".")[0]


def _join_indices(modules: Sequence[str]) -> list[str]:
  """`blocks, 0, attn` as `blocks_0, attn`."""
  joined: list[str] = []
  for module in modules:
    if module.isdigit() and joined:
      joined[-1] += f"_{module}"
    else:
      joined.append(module)
  return joined


def _leaves(
  tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
  """Every leaf with its path, in the order of the dicts."""
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, (*path, key))
    else:
      yield (*path, key), value
