"""Plots of plans and models: kept tokens, and token and attention maps of images."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from matplotlib.figure import Figure

from vitcomp_jax.data.transforms import normalize
from vitcomp_jax.models.attention import Attention
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.importance import IMPORTANCES
from vitcomp_jax.models.layer_trees import of_layer
from vitcomp_jax.models.reducers import keep_all
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.plans import Plan
from vitcomp_jax.reporting import plots, run_plots
from vitcomp_jax.weights.loading import Params


def token_maps(
  model: Backbone,
  params: Params,
  images: np.ndarray,
  titles: Sequence[str] | None = None,
  layers: Sequence[int] | None = None,
  about: str = "",
) -> Figure:
  """Draws which patches of images were pruned and which were merged, layer by layer.

  Args:
    model: Model with static reducers.
    params: Weights of the model.
    images: uint8[n h w 3].
    titles: Titles of the images; None: numbers.
    layers: Layers after which to draw tokens, counted from 1; None: all.
    about: Sentence to add below, such as the model's name.
  """
  spec, chosen = model.spec, _named(model, patch_tokens(model, params, images), layers)
  titles = _titles(titles, images)
  return plots.token_maps(images, chosen, spec.num_prefix, spec.grid, titles, about)


def patch_tokens(model: Backbone, params: Params, images: np.ndarray) -> list[np.ndarray]:
  """Returns the token that holds each patch after each layer, int[n p]; -1: pruned.

  Args:
    model: Model with static reducers.
    params: Weights of the model.
    images: uint8[n h w 3].
  """
  return _inside(model, params, images)[0]


def cls_attention(
  model: Backbone,
  params: Params,
  images: np.ndarray,
  titles: Sequence[str] | None = None,
  layers: Sequence[int] | None = None,
  about: str = "",
) -> Figure:
  """Draws the attention to each patch from CLS or, without CLS, the mean over all tokens.

  Args:
    model: Model with static reducers.
    params: Weights of the model.
    images: uint8[n h w 3].
    titles: Titles of the images; None: numbers.
    layers: Layers to draw, counted from 1; None: all.
    about: Sentence to add below, such as the model's name.
  """
  if _shown_attention(model.spec) != "cls":
    about += " There is no CLS token: attention from all tokens."
  chosen = _named(model, _inside(model, params, images)[1], layers)
  return plots.cls_attention(images, chosen, model.spec.grid, _titles(titles, images), about)


def schedules(spec: ViTSpec, plans: Mapping[str, Plan]) -> Figure:
  """Draws the tokens that each layer keeps under each of the plans, which are given by name."""
  models = {name: plan.layers_for(spec) for name, plan in plans.items()}
  return plots.schedules(run_plots.schedules_of(spec, models), spec.num_tokens)


def spaced(depth: int, most: int) -> list[int]:
  """Returns up to `most` evenly spaced layers, counted from 1, including the last."""
  return sorted({depth * part // most for part in range(1, most + 1)} - {0})


def _named(
  model: Backbone, found: Sequence[np.ndarray], layers: Sequence[int] | None
) -> dict[str, np.ndarray]:
  chosen = range(1, model.spec.depth + 1) if layers is None else layers
  return {f"layer {layer}": found[layer - 1] for layer in chosen}


def _titles(titles: Sequence[str] | None, images: np.ndarray) -> Sequence[str]:
  return titles or [f"image {i}" for i in range(1, len(images) + 1)]


def _inside(
  model: Backbone, params: Params, images: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Returns, for each layer, the token that holds each patch and the attention to each patch."""
  found: tuple[list[np.ndarray], list[np.ndarray]]
  found = jax.device_get(_traced_inside(model, params, jnp.asarray(images)))
  return found


@functools.partial(jax.jit, static_argnums=0)
def _traced_inside(
  model: Backbone, params: Params, images: jax.Array
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Runs the model for `_inside`; returns i[b p] and f[b p] per layer."""
  spec = model.spec
  out, captured = model.apply(
    {"params": params},
    normalize(images, spec.preprocess),
    method="forward",
    mutable=["intermediates"],
    capture_intermediates=_is_attention,
  )
  sources, shares = [], []
  for i, (layer, tokens) in enumerate(zip(model.layers, out.layers, strict=True)):
    if i in spec.starts:
      patches = spec.num_prefix + jnp.arange(spec.patches_at(i))
      before = jnp.broadcast_to(patches, (images.shape[0], patches.size))
    (attention,) = of_layer(spec, captured["intermediates"], i).values()
    _, stats = attention["__call__"][0]
    # A layer that removes tokens before attention does not remove any after it.
    held = before if layer.select == keep_all else tokens.source
    share = _per_patch(IMPORTANCES[_shown_attention(spec)](stats, tokens), held)
    sources.append(_on_first_grid(spec, i, tokens.source))
    shares.append(_on_first_grid(spec, i, share))
    before = tokens.source
  return sources, shares


def _on_first_grid(spec: ViTSpec, layer: int, values: jax.Array) -> jax.Array:
  """Maps a layer's values per patch to the first layer's grid."""
  (h, w), (rows, columns) = spec.grid, spec.grid_at(layer)
  places = np.arange(h)[:, None] * rows // h * columns + np.arange(w) * columns // w
  return values[:, places.ravel()]


def _shown_attention(spec: ViTSpec) -> str:
  """Returns the metric to draw: attention from CLS or, without CLS, the mean over all tokens."""
  return "cls" if spec.class_token else "mean_attention"


def _is_attention(module: nn.Module, method: str) -> bool:
  return isinstance(module, Attention) and method == "__call__"


def _per_patch(attention: jax.Array, source: jax.Array) -> jax.Array:
  """Spreads attention to tokens, f[b n], evenly over their patches; -1 where pruned."""
  tokens = jnp.arange(attention.shape[1], dtype=source.dtype)
  sizes = jnp.sum(source[:, None] == tokens[None, :, None], axis=2)
  shares = attention / jnp.maximum(sizes, 1).astype(attention.dtype)
  held = jnp.take_along_axis(shares, jnp.maximum(source, 0), axis=1)
  return jnp.where(source >= 0, held, -1.0)
