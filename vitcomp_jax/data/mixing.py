"""Mixup, CutMix and random erasing, drawn on the host and applied inside the step.

The draws are functions of the seed, the step and the row, so they do not depend on the number of
devices and processes. A row is mixed with its neighbour (0 with 1, 2 with 3, ...), which is on the
same device; the order of examples is random, so neighbours are random pairs.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax.data.transforms import Preprocess, normalize

Box = tuple[int, int, int, int]  # top, left, bottom, right, in pixels; the last two exclusive

_NO_BOX: Box = (0, 0, 0, 0)
_ERASED_AREA = 0.02, 1 / 3
_ERASED_LOG_ASPECT = math.log(0.3), -math.log(0.3)


def draw_mix(
  size: tuple[int, int], rng: np.random.Generator, mixup: float, cutmix: float
) -> tuple[float, Box]:
  """Draws the parameters of Mixup or CutMix for a batch; if both are on, picks one at random.

  Args:
    size: Height and width of the images, in pixels.
    rng: Random generator.
    mixup: Alpha of Mixup's Beta distribution; 0 turns Mixup off.
    cutmix: Alpha of CutMix's Beta distribution; 0 turns CutMix off.

  Returns:
    The share of itself that each image keeps, and CutMix's box, which the neighbour fills; the box
    is empty for Mixup.

  References:
    Zhang et al., `mixup <https://arxiv.org/abs/1710.09412>`_, 2018;
    Yun et al., `CutMix <https://arxiv.org/abs/1905.04899>`_, 2019.
  """
  if not (mixup or cutmix):
    return 1.0, _NO_BOX
  cuts = cutmix and (not mixup or rng.random() < 0.5)
  alpha = cutmix if cuts else mixup
  share = float(rng.beta(alpha, alpha))
  if not cuts:
    return share, _NO_BOX
  sides = [int(side * math.sqrt(1 - share)) for side in size]
  centre = [int(rng.integers(side)) for side in size]
  top, left = (max(c - s // 2, 0) for c, s in zip(centre, sides, strict=True))
  ends = zip(centre, sides, size, strict=True)
  bottom, right = (min(c + s // 2, limit) for c, s, limit in ends)
  # The box is clipped to the image, so the share is computed from its area.
  return 1 - (bottom - top) * (right - left) / (size[0] * size[1]), (top, left, bottom, right)


def draw_erased(size: tuple[int, int], rng: np.random.Generator, probability: float) -> Box:
  """Draws the box to erase from an image; the box is empty if nothing is erased.

  Args:
    size: Height and width of the image, in pixels.
    rng: Random generator.
    probability: Probability that a box is erased.

  References:
    Zhong et al., `Random Erasing <https://arxiv.org/abs/1708.04896>`_, 2017.
  """
  if rng.random() >= probability:
    return _NO_BOX
  for _ in range(10):
    area = rng.uniform(*_ERASED_AREA) * size[0] * size[1]
    aspect = math.exp(rng.uniform(*_ERASED_LOG_ASPECT))
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if height < size[0] and width < size[1]:
      top = int(rng.integers(size[0] - height + 1))
      left = int(rng.integers(size[1] - width + 1))
      return top, left, top + height, left + width
  return _NO_BOX


def mix(
  images: jax.Array, targets: jax.Array, share: jax.Array, box: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Mixes each image and target with those of its neighbour.

  Args:
    images: f[b h w 3], b even.
    targets: f[b classes].
    share: f[b], share of itself that each image keeps.
    box: i[b 4], CutMix's boxes, which neighbours fill; empty for Mixup.

  Returns:
    The mixed images and targets, of the same shapes.
  """
  is_cut = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])
  outside = 1 - _inside(box, *images.shape[1:3]).astype(images.dtype)
  own = jnp.where(is_cut[:, None, None], outside, share[:, None, None].astype(images.dtype))
  own, share = own[..., None], share[:, None].astype(targets.dtype)
  return (
    own * images + (1 - own) * _neighbours(images),
    share * targets + (1 - share) * _neighbours(targets),
  )


def erase(images: jax.Array, box: jax.Array, key: jax.Array, row: jax.Array) -> jax.Array:
  """Fills each image's box with normal noise.

  Args:
    images: f[b h w 3], normalised.
    box: i[b 4], the boxes.
    key: Random key of the step.
    row: i[b], row of each image in the whole batch.
  """
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row)
  noise = jax.vmap(lambda k: jax.random.normal(k, images.shape[1:], images.dtype))(keys)
  return jnp.where(_inside(box, *images.shape[1:3])[..., None], noise, images)


def training_inputs(
  batch: Mapping[str, jax.Array],
  pre: Preprocess,
  num_classes: int,
  smoothing: float,
  key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes the inputs and targets of a training step.

  Args:
    batch: `image` uint8[b h w 3], `label` i[b] and `row` i[b]; with random erasing, `erased`
      i[b 4]; with Mixup or CutMix, `mix_share` f[b] and `mix_box` i[b 4].
    pre: Preprocessing of the images.
    num_classes: Number of classes.
    smoothing: Label smoothing, the share of the target spread evenly over all classes.
    key: Random key of the step.

  Returns:
    Normalised images f[b h w 3], and class probabilities f[b classes].
  """
  images = normalize(batch["image"], pre)
  targets = jax.nn.one_hot(batch["label"], num_classes, dtype=jnp.float32)
  targets = (1 - smoothing) * targets + smoothing / max(num_classes, 1)
  if "erased" in batch:
    images = erase(images, batch["erased"], key, batch["row"])
  if "mix_share" in batch:
    images, targets = mix(images, targets, batch["mix_share"], batch["mix_box"])
  return images, targets


def _inside(box: jax.Array, height: int, width: int) -> jax.Array:
  """Returns the pixels inside each image's box, bool[b h w]."""
  top, left, bottom, right = (box[:, i, None] for i in range(4))
  y, x = (jnp.arange(side, dtype=box.dtype)[None] for side in (height, width))
  return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]


def _neighbours(x: jax.Array) -> jax.Array:
  return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
