"""Models from names, weights and plans; what `import vitcomp_jax as vc` shows of them."""

import dataclasses
import functools
import importlib.resources
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vitcomp_jax import macs
from vitcomp_jax.convert import files
from vitcomp_jax.convert.slicing import LayerIndex, slice_params
from vitcomp_jax.convert.timm import port
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.build import build
from vitcomp_jax.models.predictor import PredictorSelect
from vitcomp_jax.models.reducers import keep_all
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.plans import Plan, load_plan

Params = dict[str, Any]


def load(
  variant: str,
  weights: str | os.PathLike[str] | None = None,
  plan: Plan | str | os.PathLike[str] | None = None,
  num_classes: int | None = None,
  image_size: int | tuple[int, int] | None = None,
) -> tuple[ViT, Params]:
  """A model and its parameters.

  Args:
    variant: timm's name.
    weights: A file, a hub id `timm/…`, `bundled`, or none: random weights.
    plan: A plan, a published plan's name or the path of a plan.json; none: dense.
    num_classes: 0 gives the pooled features; another number than the weights' a fresh head;
      none: the variant's.
    image_size: Side of a square, or height and width, in pixels; none: the variant's. Position
      embeddings are resampled.

  Returns:
    An ordinary Flax module, and its parameter tree.

  Raises:
    UserError: If variant, weights and plan are not there or do not fit each other.
  """
  spec = get_spec(variant, num_classes, image_size)
  plan = load_plan(os.fspath(plan)) if isinstance(plan, str | os.PathLike) else plan
  layers = plan.layers_for(spec) if plan else spec.dense_layers
  weights = None if weights is None else os.fspath(weights)
  return build(spec, layers), load_params(
    spec, layers, weights, indices=plan.indices if plan else None
  )


def load_params(
  spec: ViTSpec,
  layers: tuple[LayerSpec, ...],
  weights: str | None,
  seed: int = 0,
  fresh_head: bool = True,
  indices: Sequence[LayerIndex] | None = None,
  fresh_predictors: bool = False,
) -> Params:
  """Parameters of a model, from weights fitted to it, or random.

  Args:
    spec: The model.
    layers: Its layers.
    weights: As for `load`.
    seed: Of what is random.
    fresh_head: Whether weights for another number of classes are taken, with a random head.
    indices: Which units slimmed layers keep; the weights may be the slimmed network's, or the dense
      one's, which are then cut.
    fresh_predictors: Whether weights without DynamicViT's prediction modules are taken, with random
      ones.
  """
  if weights is None:
    model, images = build(spec, layers), jnp.zeros((1, *spec.image_size, 3))
    return dict(jax.jit(model.init)(jax.random.key(seed), images)["params"])
  initial = None
  if fresh_head and spec.num_classes:
    random = load_params(spec, layers, None, seed)
    initial = {k: v for k, v in random.items() if k in ("head", "head_dist", "fc_norm")}
  state = files.read(bundled_weights(spec) if weights == "bundled" else weights)
  predictors: Params = {}
  if not any(".select." in name or name.startswith("score_predictor.") for name in state):
    layers, predictors = _split_predictors(spec, layers, seed, fresh_predictors)
  is_cut = indices is None or _has_widths(state, layers)
  params = port(
    state,
    abstract_params(build(spec, layers if is_cut else spec.dense_layers)),
    grid=spec.grid,
    prefix_positions=spec.pos_prefix,
    antialias=spec.antialias,
    initial=initial,
  )
  broken = [
    ".".join(key.key for key in path)
    for path, value in jax.tree.leaves_with_path(params)
    if not (np.issubdtype(value.dtype, np.floating) and np.isfinite(value).all())
  ]
  if broken:
    raise UserError(f"weights {weights}: expected finite floats, got others in {broken[0]}.")
  if indices and not is_cut:
    params = slice_params(params, indices)
  for block, module in predictors.items():
    params[block] = params[block] | {"select": module}
  return jax.tree.map(jnp.asarray, params)


def _split_predictors(
  spec: ViTSpec, layers: tuple[LayerSpec, ...], seed: int, fresh: bool
) -> tuple[tuple[LayerSpec, ...], Params]:
  """Layers without DynamicViT's prediction modules, and random modules by the block's name.

  Raises:
    UserError: If there are some, and they may not be random.
  """
  places = [i for i, layer in enumerate(layers) if isinstance(layer.select, PredictorSelect)]
  if not places:
    return layers, {}
  if not fresh:
    raise UserError(
      "weights: expected DynamicViT's prediction modules, which the plan has, got none; train them "
      "with the stage finetune, or give weights that were trained."
    )
  random = load_params(spec, layers, None, seed)
  without = tuple(
    dataclasses.replace(layer, select=keep_all) if i in places else layer
    for i, layer in enumerate(layers)
  )
  return without, {f"blocks_{i}": random[f"blocks_{i}"]["select"] for i in places}


def _has_widths(state: Mapping[str, np.ndarray], layers: tuple[LayerSpec, ...]) -> bool:
  """Whether weights under timm's names are those of slimmed layers."""
  expected = {}
  for i, layer in enumerate(layers):
    expected[f"blocks.{i}.attn.qkv.weight"] = 3 * layer.num_heads * layer.head_dim
    expected[f"blocks.{i}.mlp.fc1.weight"] = layer.mlp_dim
  return all(name in state and len(state[name]) == rows for name, rows in expected.items())


def abstract_params(model: ViT) -> Params:
  """The shapes of a model's parameters."""
  images = jax.ShapeDtypeStruct((1, *model.spec.image_size, 3), jnp.float32)
  return dict(jax.eval_shape(model.init, jax.random.key(0), images)["params"])


def bundled_weights(spec: ViTSpec) -> str:
  """The path of the weights that ship with the package.

  Raises:
    UserError: If none ship for this variant.
  """
  folder = importlib.resources.files("vitcomp_jax") / "bundled"
  path = folder / f"{spec.name}.safetensors"
  if not path.is_file():
    known = sorted(p.name.removesuffix(".safetensors") for p in folder.iterdir())
    known = [name for name in known if not name.endswith(".json")]
    raise UserError(
      f"weights: expected a variant whose weights ship with the package ({', '.join(known)}), "
      f"got {spec.name}; give a file or a hub id."
    )
  return str(path)


@functools.partial(jax.jit, static_argnums=0)
def apply(model: ViT, params: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b c"]:
  """Logits (features for a model without classifier); compiled once per model and batch shape.

  Args:
    model: From `load`. Models with equal plans are equal, and compile once.
    params: From `load`.
    images: Normalised by `model.spec.mean` and `model.spec.std`.
  """
  return model.apply({"params": params}, images)


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a model costs.

  Attributes:
    gmacs: 1e9 multiply-accumulates per image (the papers' "GFLOPs").
    params: Number of parameters.
  """

  gmacs: float
  params: int


def count_cost(model: ViT) -> Cost:
  """Counts a model's multiply-accumulates and parameters."""
  params = abstract_params(model)
  gmacs = macs.static_macs(model.spec, model.layers) / 1e9
  return Cost(gmacs, sum(p.size for p in jax.tree.leaves(params)))
