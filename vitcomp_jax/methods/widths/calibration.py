"""Moments of a dense model's activations on calibration images."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.widths.lists import HIDDEN, sorted_lists
from vitcomp_jax.models.attention import Attention
from vitcomp_jax.models.build import build
from vitcomp_jax.models.layers import Mlp
from vitcomp_jax.models.spec import ViTSpec


@dataclasses.dataclass(frozen=True)
class Moments:
  """Holds the mean and spread of channels over tokens, in double precision.

  Attributes:
    count: Number of tokens.
    mean: Mean of each channel, f[c].
    scatter: Sum over tokens of the products of deviations from the mean, f[c c].
  """

  count: int
  mean: np.ndarray
  scatter: np.ndarray

  @property
  def covariance(self) -> np.ndarray:
    """Returns the covariance of the channels, f[c c]."""
    return self.scatter / self.count

  def joined(self, other: "Moments") -> "Moments":
    """Returns the moments over the tokens of both objects.

    References:
      Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
      variances", 1979, Eq. 2.1.
    """
    count = self.count + other.count
    change = other.mean - self.mean
    between = np.outer(change, change) * (self.count * other.count / count)
    mean = self.mean + change * (other.count / count)
    return Moments(count, mean, self.scatter + other.scatter + between)


@dataclasses.dataclass(frozen=True)
class LayerMoments:
  """Holds the moments of a layer.

  Attributes:
    tokens: Moments of the inputs of attention.
    attended: Moments of the attended values of all heads, the inputs of attention's last
      projection.
    hidden: Moments of the MLP's hidden units, the inputs of fc2; None: they cannot be cut.
  """

  tokens: Moments
  attended: Moments
  hidden: Moments | None


def calibrate(
  spec: ViTSpec, params: Mapping[str, Any], batches: Iterable[Array | np.ndarray]
) -> tuple[LayerMoments, ...]:
  """Measures the layers of a dense model on images.

  A few times as many tokens as hidden units are enough, such as the tokens of 128 images.

  Args:
    spec: The dense model.
    params: Its parameters.
    batches: Normalised images, f[b h w c]; batches of the same size are compiled once.

  Returns:
    Moments of each layer.

  Raises:
    UserError: If there are no images, or the model is not a plain Vision Transformer.
  """
  names = ["tokens", "attended"]
  if HIDDEN in sorted_lists(spec):
    names.append(HIDDEN)
  total: list[dict[str, Moments]] = []
  for images in batches:
    found = jax.device_get(_measure(spec, params, images))
    layers = [{name: _moments(*layer[name]) for name in names} for layer in found]
    total = [_joined(*pair) for pair in zip(total, layers, strict=True)] if total else layers
  if not total:
    raise UserError("calibration: expected images to measure the model on, got none; give some.")
  return tuple(
    LayerMoments(layer["tokens"], layer["attended"], layer.get(HIDDEN)) for layer in total
  )


def _moments(count: np.ndarray, mean: np.ndarray, scatter: np.ndarray) -> Moments:
  return Moments(int(count), mean.astype(np.float64), scatter.astype(np.float64))


def _joined(first: dict[str, Moments], second: dict[str, Moments]) -> dict[str, Moments]:
  return {name: moments.joined(second[name]) for name, moments in first.items()}


@functools.partial(jax.jit, static_argnums=0)
def _measure(
  spec: ViTSpec, params: Mapping[str, Any], images: Array | np.ndarray
) -> list[dict[str, tuple[int, Array, Array]]]:
  """Returns count, mean and scatter for each field of `LayerMoments`, for each layer."""
  found = {}

  def keep(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
  ) -> Any:
    result, module = call(*args, **kwargs), context.module
    if isinstance(module, Attention) and context.method_name == "__call__":
      found[module.path] = args[0]
    if isinstance(module, nn.Dense) and module.name == "proj":
      found[module.path] = args[0]
    if isinstance(module, Mlp) and context.method_name == "hidden":
      found[module.path] = result
    return result

  with nn.intercept_methods(keep):
    build(spec, spec.dense_layers).apply({"params": params}, images, method="forward")
  layers = []
  for i in range(spec.depth):
    path = spec.layer_path(i)
    layers.append(
      {
        "tokens": _spread(found[*path, "attn"]),
        "attended": _spread(found[*path, "attn", "proj"]),
        HIDDEN: _spread(found[*path, "mlp"]),
      }
    )
  return layers


def _spread(x: Float[Array, "b n c"]) -> tuple[int, Array, Array]:
  """Returns count, mean and scatter of a batch's tokens."""
  x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  mean = jnp.mean(x, axis=0)
  x = x - mean[None]
  return x.shape[0], mean, jnp.matmul(x.T, x, precision="highest")
