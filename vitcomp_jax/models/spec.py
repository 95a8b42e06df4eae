"""A ViT as data: the spec of the model, and the specs of its layers."""

import dataclasses
import functools
from collections.abc import Sequence

from vitcomp_jax.data.transforms import Preprocess
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.importance import IMPORTANCES
from vitcomp_jax.models.layer_spec import LayerSpec
from vitcomp_jax.models.layers import NO_NORM, NormSpec
from vitcomp_jax.models.reducers import keep_all
from vitcomp_jax.models.rotary import Rotary


def removes_tokens(layers: Sequence[LayerSpec]) -> bool:
  """Returns whether any layer removes tokens, before or after its attention."""
  return any((layer.select, layer.reduce) != (keep_all, keep_all) for layer in layers)


@dataclasses.dataclass(frozen=True)
class ViTSpec:
  """A Vision Transformer without any compression of its layers.

  Attributes:
    name: The variant's name.
    image_size: Height and width in pixels.
    patch_size: Side of a square patch in pixels; pixels outside whole patches are cropped.
    width: Channels of a token.
    depth: Number of layers.
    num_heads: Heads of a dense layer.
    mlp_dim: Hidden units of a dense layer's MLP.
    in_chans: Channels of an image.
    num_classes: Outputs of the classifier; 0: no classifier, the model returns features.
    projection: Whether these outputs are an embedding, such as CLIP's, instead of class logits.
    class_token: Whether there is a CLS token.
    distilled: Whether there are a distillation token and a second head, averaged with the first.
    num_registers: Number of register tokens.
    pos_on_prefix: Whether position embeddings cover the prefix as well as the patches.
    positions: Kind of position embedding before the first layer, a key of `positions.POSITIONS`.
    rotary: Rotary position embedding inside attention; None: no rotation.
    relative_bias: Relative position bias of attention (BEiT): `layer`, a table for each layer;
      `shared`, one table for all layers; None: no bias.
    pool: Pooling of the head, a key of `heads.HEADS`: `cls`, `cls_dist` (CLS and distillation
      token), `size_mean` (mean over patch tokens weighted by size), `cls_mean` (CLS and that
      mean, concatenated), `mean` (mean over tokens, for CAFormer), or `map` (a learnt
      query attends to the tokens, weighted by size, for SigLIP).
    pool_prefix: Whether the head's mean or query includes the prefix tokens.
    pool_heads: Heads of the head's query; None: as many as in a layer.
    pool_mlp_dim: Hidden units of the MLP after the head's query; None: as many as in a layer.
    norm_pre: Whether tokens are normalised before the first layer.
    final_norm: Whether tokens are normalised after the last layer.
    fc_norm: Whether pooled features are normalised.
    norm: Kind of every norm, a key of `layers.NORMS`.
    norm_eps: Epsilon of every norm, added to the variance or mean square.
    norm_after: Whether a layer normalises the outputs of its branches instead of their inputs.
    patch_bias: Whether the patch embedding has a bias.
    patch_norm: Whether patches are normalised before positions are added (AIMv2).
    qkv_bias: Which of query, key and value have a bias: `qkv`, `qv`, or ``""`` for none.
    linear_bias: Whether attention's last projection and the MLP have biases.
    qk_norm: Whether the queries and keys of each head are normalised.
    attn_norm: Whether attention's output is normalised before its projection.
    mlp: Kind of every MLP, a key of `layers.MLPS`.
    mlp_norm: Whether hidden units are normalised.
    activation: Activation of every MLP, a key of `ops.activations.ACTIVATIONS`.
    layer_scale: Whether residual branches have learnt per-channel factors (DINOv2).
    antialias: If true, position embeddings are resampled to another grid as timm does; otherwise
      by PyTorch's plain bicubic interpolation, as DINOv2's authors do.
    mean: Mean of the input channels, in [0, 1].
    std: Standard deviation of the input channels, in [0, 1].
    crop_pct: Share of the resized image that evaluation keeps.
    interpolation: Interpolation with which evaluation resizes images.
    crop_mode: How evaluation crops images, see `data.Preprocess`.
    pad: Pixels of zeros added around images, see `data.Preprocess`.
    exif_orientation: Whether images are rotated according to their EXIF tag.
    class_names: Names of the classifier's outputs, in order; empty: unknown. Not compared.
    naming: timm's class whose parameter names are used to write weights: `vit`, `eva`, `eva_split`
      (with separate query, key and value) or `beit`. Not compared.
    huggingface: Text of transformers' config.json stored beside the weights, or empty. Not
      compared.
    dtype: Dtype of the computation; None: that of inputs and weights.
    attention: Implementation of attention, see `ops.attention.attend`.
  """

  name: str
  image_size: tuple[int, int]
  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  in_chans: int = 3
  num_classes: int = 1000
  projection: bool = False
  class_token: bool = True
  distilled: bool = False
  num_registers: int = 0
  pos_on_prefix: bool = True
  positions: str = "absolute"
  rotary: Rotary | None = None
  relative_bias: str | None = None
  pool: str = "cls"
  pool_prefix: bool = False
  pool_heads: int | None = None
  pool_mlp_dim: int | None = None
  norm_pre: bool = False
  final_norm: bool = True
  fc_norm: bool = False
  norm: str = "layer"
  norm_eps: float = 1e-6
  norm_after: bool = False
  patch_bias: bool = True
  patch_norm: bool = False
  linear_bias: bool = True
  qkv_bias: str = "qkv"
  qk_norm: bool = False
  attn_norm: bool = False
  mlp: str = "mlp"
  mlp_norm: bool = False
  activation: str = "gelu"
  layer_scale: bool = False
  antialias: bool = True
  mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
  std: tuple[float, float, float] = (0.229, 0.224, 0.225)
  crop_pct: float = 0.9
  interpolation: str = "bicubic"
  crop_mode: str = "center"
  pad: int = 0
  exif_orientation: bool = False
  class_names: tuple[str, ...] = dataclasses.field(default=(), compare=False)
  naming: str = dataclasses.field(default="vit", compare=False)
  huggingface: str = dataclasses.field(default="", compare=False, repr=False)
  dtype: str | None = None
  attention: str = "auto"

  def __post_init__(self) -> None:
    if min(self.image_size) < self.patch_size:
      raise UserError(
        f"image size: expected at least the patch size {self.patch_size} for {self.name}, got "
        f"{min(self.image_size)}."
      )

  @property
  def preprocess(self) -> Preprocess:
    """Returns the preprocessing of the model's images."""
    return Preprocess(
      self.image_size,
      self.mean,
      self.std,
      self.crop_pct,
      self.interpolation,
      self.pad,
      crop_mode=self.crop_mode,
      exif_orientation=self.exif_orientation,
    )

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Returns height, width and channels of an image."""
    return *self.image_size, self.in_chans

  @property
  def grid(self) -> tuple[int, int]:
    """Returns rows and columns of patches."""
    return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

  @property
  def num_patches(self) -> int:
    return self.grid[0] * self.grid[1]

  @property
  def num_prefix(self) -> int:
    """Returns the number of CLS, distillation and register tokens."""
    return self.class_token + self.distilled + self.num_registers

  @property
  def num_tokens(self) -> int:
    return self.num_prefix + self.num_patches

  @property
  def pools_patches(self) -> bool:
    """Returns whether the head reads the patch tokens rather than the prefix."""
    return self.pool not in ("cls", "cls_dist")

  @property
  def has_classifier(self) -> bool:
    """Returns whether the outputs are logits of classes."""
    return self.num_classes > 0 and not self.projection

  @property
  def num_features(self) -> int:
    """Returns the channels of the pooled features."""
    return 2 * self.width if self.pool == "cls_mean" else self.width

  @property
  def pos_prefix(self) -> int:
    """Returns the rows of the position embeddings that belong to the prefix."""
    return self.num_prefix if self.pos_on_prefix else 0

  def norm_spec(self, is_there: bool = True) -> NormSpec:
    """Returns the spec of the model's norms, or of no norm if `is_there` is false."""
    return NormSpec(self.norm, self.norm_eps) if is_there else NO_NORM

  def importance(self, asked: str = "auto", where: str = "importance") -> str:
    """Resolves `auto` to the best importance metric that this model supports.

    Args:
      asked: One of `importance.IMPORTANCES`; or `auto`, which selects the attention paid by the CLS
        token, by the head's own query or, if the head takes a mean, by all tokens.
      where: Name of the option, for the error.

    Raises:
      UserError: If the model does not support the metric.
    """
    # Only a layer norm can be folded into the query.
    has_query = self.pool == "map" and self.final_norm and self.norm == "layer"
    there = {"cls": self.class_token, "pool_query": has_query}
    has = [name for name in IMPORTANCES if there.get(name, True)]
    if asked not in ("auto", *has):
      part = "CLS token" if asked == "cls" else "query in its head"
      raise UserError(
        f"{where}: expected one of auto, {', '.join(has)} for {self.name}, which has no {part}, "
        f"got {asked}."
      )
    return has[0] if asked == "auto" else asked

  @property
  def starts(self) -> dict[int, int]:
    """Returns the token counts of the layers that start with all tokens, by layer."""
    return {0: self.num_tokens}

  def tokens_at(self, layer: int) -> int:
    """Returns the number of tokens that enter a layer if none are removed."""
    return self.starts[max(start for start in self.starts if start <= layer)]

  def patches_at(self, layer: int) -> int:
    """Returns the number of patch tokens that enter a layer if none are removed."""
    return self.tokens_at(layer) - self.num_prefix

  def grid_at(self, layer: int) -> tuple[int, int]:
    """Returns rows and columns of the patches at a layer."""
    del layer
    return self.grid

  def width_at(self, layer: int) -> int:
    """Returns the channels of a layer's tokens."""
    del layer
    return self.width

  def layer_path(self, layer: int) -> tuple[str, ...]:
    """Returns the path of a layer's variables in the tree of all variables."""
    return (f"blocks_{layer}",)

  def with_tokens(self, num_tokens: int) -> "ViTSpec":
    """Returns the spec with an image size that gives `num_tokens` tokens."""
    sides = (self.patch_size, (num_tokens - self.num_prefix) * self.patch_size)
    return dataclasses.replace(self, image_size=sides)

  @property
  def embed_macs(self) -> int:
    """Returns the multiply-accumulates of the patch embedding, which no reduction changes."""
    return self.num_tokens * self.width * self.in_chans * self.patch_size**2

  def check_plain(self, what: str) -> None:
    """Rejects a model that starts again with all tokens between layers, such as a CAFormer.

    Args:
      what: Feature to name in the error.

    Raises:
      UserError: If the model is not a plain Vision Transformer.
    """
    if len(self.starts) > 1:
      raise UserError(
        f"{what}: expected a Vision Transformer, got {self.name}, whose tokens begin anew on the "
        "way; leave it out."
      )

  @functools.cached_property
  def dense_layers(self) -> tuple[LayerSpec, ...]:
    """Returns the layers before any compression."""
    head_dim = self.width // self.num_heads
    layer = LayerSpec(
      self.num_heads,
      head_dim,
      self.mlp_dim,
      head_dim**-0.5,
      layer_scale=self.layer_scale,
      pairing=None if self.rotary is None else "halves" if self.rotary.halves else "adjacent",
      is_gated=self.mlp != "mlp",
    )
    return (layer,) * self.depth


def with_drop_path(layers: tuple[LayerSpec, ...], rate: float) -> tuple[LayerSpec, ...]:
  """Returns layers with drop rates that grow linearly from 0 in the first to `rate` in the last."""
  last = max(len(layers) - 1, 1)
  return tuple(
    dataclasses.replace(layer, drop_path=rate * i / last) for i, layer in enumerate(layers)
  )
