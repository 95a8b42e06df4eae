"""CAFormer: two convolutional stages, then two attention stages whose layers may remove tokens.

Yu et al., `MetaFormer Baselines for Vision <https://arxiv.org/abs/2210.13452>`_, 2022.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.errors import UserError
from vitcomp_jax.models.attention import Attention, AttentionParts
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.block import Scale, encoder_block
from vitcomp_jax.models.gates import Gate, open_gate
from vitcomp_jax.models.heads import HEADS
from vitcomp_jax.models.layers import identity, kernel_init
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import Tokens, unmerge
from vitcomp_jax.ops import select

_HEAD_DIM = 32
_NO_BIAS = AttentionParts(qkv_bias="", proj_bias=False)
_STEM_KERNEL, _KERNEL, _MIXER_KERNEL = 7, 3, 7


@dataclasses.dataclass(frozen=True)
class CAFormerSpec(ViTSpec):
  """A CAFormer as a ViT: convolutions make its tokens, and downsample them once between layers.

  The layers are those of both attention stages, in order. `patch_size` is the side of the patch
  that a token of the first attention stage represents, and `width` the channels of the last stage.

  Attributes:
    depths: Blocks of the four stages.
    dims: Channels of the four stages.
  """

  depths: tuple[int, ...] = ()
  dims: tuple[int, ...] = ()

  @property
  def starts(self) -> dict[int, int]:
    return {0: self.num_patches, self.depths[2]: math.prod(self._last_grid)}

  @property
  def _last_grid(self) -> tuple[int, int]:
    return (self.grid[0] - 1) // 2 + 1, (self.grid[1] - 1) // 2 + 1

  def grid_at(self, layer: int) -> tuple[int, int]:
    return self.grid if layer < self.depths[2] else self._last_grid

  def width_at(self, layer: int) -> int:
    return self.dims[2 if layer < self.depths[2] else 3]

  def layer_path(self, layer: int) -> tuple[str, ...]:
    first = self.depths[2]
    stage, place = (2, layer) if layer < first else (3, layer - first)
    return f"stages_{stage}", f"blocks_{place}"

  def with_tokens(self, num_tokens: int) -> "CAFormerSpec":
    side = math.isqrt(num_tokens)
    if side**2 != num_tokens:
      raise UserError(
        f"plan: expected a square number of tokens for {self.name}, got {num_tokens}."
      )
    return dataclasses.replace(self, image_size=(side * self.patch_size,) * 2)

  @functools.cached_property
  def dense_layers(self) -> tuple[LayerSpec, ...]:
    widths = [self.width_at(i) for i in range(self.depth)]
    return tuple(LayerSpec(w // _HEAD_DIM, _HEAD_DIM, 4 * w, _HEAD_DIM**-0.5) for w in widths)

  @property
  def embed_macs(self) -> int:
    """Returns the multiply-accumulates of all convolutions."""
    patches = self.num_patches
    positions = (16 * patches, 4 * patches, patches, math.prod(self._last_grid))
    total, channels, kernel = 0, 3, _STEM_KERNEL
    for n, width in zip(positions, self.dims, strict=True):
      total += n * width * kernel**2 * channels
      channels, kernel = width, _KERNEL
    for n, width, depth in zip(positions[:2], self.dims[:2], self.depths[:2], strict=True):
      total += depth * n * (12 * width**2 + 2 * _MIXER_KERNEL**2 * width)
    return total


def caformer(
  name: str, image_size: tuple[int, int], depths: tuple[int, ...], dims: tuple[int, ...], **options
) -> CAFormerSpec:
  """Makes a spec from the values that differ between CAFormers."""
  return CAFormerSpec(
    name,
    image_size,
    patch_size=16,
    width=dims[3],
    depth=depths[2] + depths[3],
    num_heads=dims[3] // _HEAD_DIM,
    mlp_dim=4 * dims[3],
    class_token=False,
    pool="mean",
    depths=depths,
    dims=dims,
    **options,
  )


class CAFormer(Backbone):
  """A CAFormer; `layers` describe its attention layers and the tokens that they remove.

  The last stage begins with a convolution, so merged and pruned tokens return to their places on
  the grid before it. The stage starts with all of its tokens.
  """

  spec: CAFormerSpec

  def setup(self) -> None:
    spec, first = self.spec, self.spec.depths[2]
    self.stem = _Stem(spec.dims[0], spec.norm_eps, spec.dtype)
    stages: list[Any] = [
      _ConvStage(width, depth, stage > 0, spec.norm_eps, spec.dtype)
      for stage, (width, depth) in enumerate(zip(spec.dims[:2], spec.depths[:2], strict=True))
    ]
    layers = self.layers[:first], self.layers[first:]
    stages += [
      _AttentionStage(_Parts(spec, spec.dims[2 + i]), part, self.remat)
      for i, part in enumerate(layers)
    ]
    self.stages = stages
    self.head = HEADS[spec.pool](spec)

  def embed(self, images: Array) -> Tokens:
    x = self.stem(images)
    for stage in self.stages[:2]:
      x = stage(x)
    return _tokens_of(self.stages[2].downsample(x))

  def encode(self, layer: int, tokens: Tokens) -> Tokens:
    first = self.spec.depths[2]
    if layer < first:
      return self.stages[2].blocks[layer](tokens)
    if layer == first:
      tokens = _tokens_of(self.stages[3].downsample.conv(self.restore(tokens)))
    return self.stages[3].blocks[layer - first](tokens)

  def restore(self, tokens: Tokens) -> Float[Array, "b h w d"]:
    """Returns the full grid before the last stage, normalised for its convolution.

    A masked token is replaced by the value that its place would have if the token were removed;
    gradients reach the mask.
    """
    tokens = tokens.normed(self.stages[3].downsample.norm)
    x = unmerge(tokens)
    if tokens.keep is not None:
      assert tokens.origin is not None
      place = jnp.argsort(tokens.origin, axis=1)
      own = select.permute(tokens.x, place)
      keep = select.take(tokens.keep, place)[..., None].astype(x.dtype)
      x = keep * own + (1 - keep) * x
    return x.reshape(x.shape[0], *self.spec.grid, x.shape[2])

  def classify(self, tokens: Tokens) -> tuple[Tokens, Array, Array]:
    return self.head(tokens)


def _tokens_of(x: Float[Array, "b h w d"]) -> Tokens:
  """Returns a grid as tokens, none of which is removed."""
  return Tokens.begin(x.reshape(x.shape[0], -1, x.shape[3]), 0, track_origin=True)


@dataclasses.dataclass(frozen=True)
class _Parts:
  """Makes the parts of a stage's layers, with StarReLU, a scaled residual stream and no biases."""

  spec: CAFormerSpec
  width: int
  norm_after: ClassVar[bool] = False

  def norm(self) -> nn.LayerNorm:
    return _norm(self.spec.norm_eps)

  def attention(self, layer: LayerSpec) -> Attention:
    spec = self.spec
    return Attention(layer, self.width, spec.dtype, spec.attention, _NO_BIAS, name="token_mixer")

  def mlp(self, layer: LayerSpec) -> "_StarMlp":
    return _StarMlp(layer.mlp_dim, self.width, False, self.spec.dtype)

  def scales(self, layer: LayerSpec, branch: int) -> tuple[Scale, Scale]:
    del layer
    return _StreamScale(self.width, name=f"res_scale{branch}"), identity


class _AttentionStage(nn.Module):
  parts: _Parts
  layers: tuple[LayerSpec, ...]
  remat: bool

  def setup(self) -> None:
    spec = self.parts.spec
    self.downsample = _Downsample(self.parts.width, spec.norm_eps, spec.dtype)
    self.blocks = [encoder_block(layer, self.parts, self.remat) for layer in self.layers]


class _ConvStage(nn.Module):
  width: int
  depth: int
  downsamples: bool
  norm_eps: float
  dtype: str | None

  def setup(self) -> None:
    if self.downsamples:
      self.downsample = _Downsample(self.width, self.norm_eps, self.dtype)
    self.blocks = [_ConvBlock(self.width, self.norm_eps, self.dtype) for _ in range(self.depth)]

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    x = self.downsample(x) if self.downsamples else x
    for block in self.blocks:
      x = block(x)
    return x


class _ConvBlock(nn.Module):
  width: int
  norm_eps: float
  dtype: str | None

  def setup(self) -> None:
    self.norm1, self.norm2 = _norm(self.norm_eps), _norm(self.norm_eps)
    self.token_mixer = _SeparableConv(self.width, self.dtype)
    self.mlp = _StarMlp(4 * self.width, self.width, True, self.dtype)

  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    x = x + self.token_mixer(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class _SeparableConv(nn.Module):
  """MobileNet's separable convolution: doubles the channels, convolves each, projects back."""

  width: int
  dtype: str | None

  def setup(self) -> None:
    wide = 2 * self.width
    self.pwconv1 = _Linear(wide, True, self.dtype)
    self.act1 = _StarReLU()
    self.dwconv = _conv(
      wide, _MIXER_KERNEL, 1, self.dtype, feature_group_count=wide, use_bias=False
    )
    self.pwconv2 = _Linear(self.width, True, self.dtype)

  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    return self.pwconv2(self.dwconv(self.act1(self.pwconv1(x))))


class _StarMlp(nn.Module):
  mlp_dim: int
  width: int
  on_grid: bool
  dtype: str | None

  def setup(self) -> None:
    self.fc1 = _Linear(self.mlp_dim, self.on_grid, self.dtype)
    self.act = _StarReLU()
    self.fc2 = _Linear(self.width, self.on_grid, self.dtype)

  def __call__(self, x: Float[Array, "... d"], gate: Gate = open_gate) -> Float[Array, "... d"]:
    return self.fc2(gate(self.act(self.fc1(x))))


class _Linear(nn.Module):
  """A projection without bias; on a grid its kernel has the shape of timm's 1x1 convolution."""

  features: int
  on_grid: bool
  dtype: str | None

  @nn.compact
  def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... d"]:
    shape = (x.shape[-1], self.features)
    kernel = self.param("kernel", kernel_init, (1, 1, *shape) if self.on_grid else shape)
    x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
    return x @ kernel.reshape(shape)


class _StarReLU(nn.Module):
  """s·relu(x)² + b with learnt s and b."""

  @nn.compact
  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    scale = self.param("scale", nn.initializers.ones, (1,))
    bias = self.param("bias", nn.initializers.zeros, (1,))
    return scale.astype(x.dtype)[0] * jnp.square(jax.nn.relu(x)) + bias.astype(x.dtype)[0]


class _StreamScale(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    scale = self.param("scale", nn.initializers.ones, (self.width,))
    return x * scale.astype(x.dtype)[None, None]


class _Stem(nn.Module):
  width: int
  norm_eps: float
  dtype: str | None

  def setup(self) -> None:
    self.conv = _conv(self.width, _STEM_KERNEL, 4, self.dtype)
    self.norm = _norm(self.norm_eps)

  def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    return self.norm(self.conv(images))


class _Downsample(nn.Module):
  width: int
  norm_eps: float
  dtype: str | None

  def setup(self) -> None:
    self.norm = _norm(self.norm_eps)
    self.conv = _conv(self.width, _KERNEL, 2, self.dtype)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    return self.conv(self.norm(x))


def _norm(epsilon: float) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=epsilon, use_bias=False, use_fast_variance=False)


def _conv(width: int, kernel: int, stride: int, dtype: str | None, **options: Any) -> nn.Conv:
  # The stem is padded by 2, all others by half of their kernel size.
  padding = [(2 if stride == 4 else kernel // 2,) * 2] * 2
  options |= {"dtype": dtype, "kernel_init": kernel_init}
  return nn.Conv(width, (kernel, kernel), stride, padding, **options)
