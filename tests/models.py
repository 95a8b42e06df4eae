"""Small models with random weights, for tests."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax.models.build import build
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.weights.loading import abstract_params


def small_spec(**changes: Any) -> ViTSpec:
  spec = ViTSpec(
    name="small",
    image_size=(24, 24),
    patch_size=4,
    width=32,
    depth=4,
    num_heads=2,
    mlp_dim=64,
    num_classes=7,
  )
  return dataclasses.replace(spec, **changes)


def random_params(
  spec: ViTSpec,
  seed: int = 0,
  noise: float = 0.2,
  layers: tuple[LayerSpec, ...] | None = None,
) -> dict[str, Any]:
  """Weights large enough for attention to be far from even; for the dense layers unless given.

  From the shapes alone: to compile an initialisation takes longer than most of what is tested.
  """
  rng = np.random.default_rng(seed)

  def draw(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
    values = noise * rng.standard_normal(shape.shape) + (path[-1].key == "scale")
    return jnp.asarray(values, shape.dtype)

  shapes = abstract_params(build(spec, layers or spec.dense_layers))
  return dict(jax.tree.map_with_path(draw, shapes))


def random_images(spec: ViTSpec, count: int, seed: int = 0) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), (count, *spec.image_size, 3))


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(
  spec: ViTSpec, layers: tuple[LayerSpec, ...], variables: dict, images: jax.Array
) -> Any:
  return build(spec, layers).apply(variables, images, method="forward")
