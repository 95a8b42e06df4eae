"""Defines what `accelerator.py` measures: models and plans, parts by importance, and checks."""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from common import SearchSteps, plan_counts, without_choice

import vitcomp_jax as vc
from vitcomp_jax import methods
from vitcomp_jax.config import SearchConfig
from vitcomp_jax.cost import macs
from vitcomp_jax.methods.base import Layers
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.methods.diffrate.search import DiffRate
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.build import build
from vitcomp_jax.ops.attention import attend
from vitcomp_jax.parallel import Layout
from vitcomp_jax.training.search import SearchTrainer
from vitcomp_jax.weights.loading import Params, abstract_params

SHARE = 0.65  # of the MACs, if no plan was published
_STD = 0.02  # of random weights, as at the start of training

# Models and their published plans.
_SMALL, _BASE = "deit_small_patch16_224", "deit_base_patch16_224"
_LARGE, _HUGE = "vit_large_patch16_224.mae", "vit_huge_patch14_224.mae"
_DINO = "vit_base_patch14_dinov2"  # at 518 pixels
PLANS = {
  _BASE: "diffrate/deit_base@11.5",
  _SMALL: "diffrate/deit_small@2.9",
  _HUGE: "diffrate/mae_huge@103.4",
  _DINO: None,
  _LARGE: "diffrate/mae_large@38.5",
}
# Returns PyTorch's logits of a subject for images f32[b h w 3], in one of the variants in `TORCH`.
FromTorch = Callable[["Subjects", np.ndarray, str], np.ndarray]
# Rows of a part besides the dense model; `plan` and `dense` use every implementation of attention.
KINDS = {
  "speed": ("plan", "first tokens"),
  "methods": ("plan", "tile 8", "tile 16", "tome", "evit"),
  "search": ("search",),
}
TORCH = ("dense eager", "dense compiled", "plan eager")


@dataclasses.dataclass(frozen=True)
class Part:
  """Rows that are timed in turn: a kind from `KINDS` for one model, batch size and precision."""

  kind: str
  model: str
  batch: int
  dtype: str

  def __str__(self) -> str:
    return f"{self.kind} of {self.model}, batch {self.batch}, {self.dtype}"


def parts(batches: Sequence[int]) -> list[Part]:
  """Returns parts that cover all models, batch sizes and precisions, most important first.

  Args:
    batches: Batch sizes, ascending: one image, some, many.
  """
  one, some, many = batches
  return [
    Part("speed", _BASE, many, "bfloat16"),
    Part("speed", _SMALL, many, "bfloat16"),
    Part("speed", _HUGE, some, "bfloat16"),
    Part("speed", _DINO, some, "bfloat16"),
    Part("methods", _BASE, many, "bfloat16"),
    Part("search", _SMALL, some, "bfloat16"),
    Part("speed", _SMALL, one, "bfloat16"),
    Part("speed", _LARGE, some, "bfloat16"),
    Part("speed", _SMALL, some, "float32"),
  ]


def more_parts(batches: Sequence[int]) -> list[Part]:
  """Returns the other combinations, to measure in the time that remains after `parts`."""
  every = itertools.product(("bfloat16", "float32"), reversed(batches), PLANS)
  found = [Part("speed", model, batch, dtype) for dtype, batch, model in every]
  return [part for part in found if part not in parts(batches)]


def forms(dtype: str, platform: str) -> tuple[str, ...]:
  """Returns the implementations of attention for a precision, starting with that of `auto`."""
  return ("cudnn", "xla") if (platform, dtype) == ("gpu", "bfloat16") else ("xla",)


class Subjects:
  """Holds a model with random weights, and derives the measured models from it.

  Attributes:
    spec: The dense model.
    params: Its weights, float32, on the device.
  """

  def __init__(self, name: str, is_tiny: bool, depth: int | None = None) -> None:
    """Draws the weights.

    Args:
      name: Name of a variant.
      is_tiny: Whether the model is only as large as a test needs.
      depth: Number of layers; None: the variant's.
    """
    spec = vc.get_spec(name)
    if is_tiny:
      side = 5 * spec.patch_size
      small = {"image_size": (side, side), "width": 64, "num_heads": 2, "mlp_dim": 128, "depth": 4}
      spec = dataclasses.replace(spec, **small)
    self.spec = dataclasses.replace(spec, depth=depth or spec.depth)
    self.is_published = not is_tiny and depth is None and PLANS[name] is not None
    self._name = name
    shapes = abstract_params(build(self.spec, self.spec.dense_layers))
    self.params = dict(jax.tree.map_with_path(_random, shapes))

  def layers(self, what: str) -> Layers:
    """Returns the layers of a row: `dense`, `plan`, `first tokens`, `tile N`, `tome` or `evit`."""
    spec = self.spec
    if what == "dense":
      return spec.dense_layers
    if what == "plan":
      return self._plan
    if what == "first tokens":
      return without_choice(self._plan)
    if what.startswith("tile"):
      return _tiled(self._plan, int(what.split()[1]), spec.num_tokens)
    return methods.within(what, spec, self.gmacs(self._plan), "auto")

  @functools.cached_property
  def _plan(self) -> Layers:
    if self.is_published:
      return vc.load_plan(PLANS[self._name]).layers_for(self.spec)
    target = SHARE * self.gmacs(self.spec.dense_layers)
    method = DiffRate(self.spec, target, SearchConfig())
    *_, s_shaped = method.starts().values()  # similar to the published plans
    return method.static_layers(method.adjusted(s_shaped)[0])

  def gmacs(self, layers: Layers) -> float:
    return macs.static_macs(self.spec, layers) / 1e9

  def model(self, what: str, form: str, dtype: str) -> Backbone:
    """Returns the model of a row for an implementation of attention and a precision."""
    return build(dataclasses.replace(self.spec, attention=form, dtype=dtype), self.layers(what))

  def weights(self, dtype: str) -> Params:
    """Returns the weights in the precision of the computation."""
    return dict(jax.tree.map(lambda x: x.astype(dtype), self.params))

  def images(self, batch: int, dtype: str) -> jax.Array:
    """Draws normal noise as images, f[b h w 3]."""
    return jax.random.normal(jax.random.key(0), (batch, *self.spec.image_shape), dtype)

  def search(self, batch: int, dtype: str, form: str) -> SearchSteps:
    """Returns the steps of a search at the cost of the plan; the first step compiles."""
    spec = dataclasses.replace(self.spec, attention=form, dtype=dtype)
    config, layout = SearchConfig(batch_size=batch, choose_images=0), Layout()
    method = DiffRate(spec, self.gmacs(self._plan), config)
    trainer = SearchTrainer(method, config, spec.preprocess, layout)
    shape = (batch, *spec.image_shape)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    inputs = {"image": images, "label": np.zeros(batch, np.int32)}
    params = self.weights(dtype)
    task = trainer.task("search", params, lambda _: iter(()), 1, method.init())
    return SearchSteps(task, layout, inputs)

  def in_timm(self) -> dict[str, Any]:
    """Returns timm's name of the model, and its options at this size."""
    spec = self.spec
    options = {
      "img_size": spec.image_size,
      "embed_dim": spec.width,
      "depth": spec.depth,
      "num_heads": spec.num_heads,
      "mlp_ratio": spec.mlp_dim / spec.width,
      "num_classes": spec.num_classes,
      "global_pool": "avg" if spec.pools_patches else "token",
    }
    counts = plan_counts(spec, self.layers("plan"))
    return {"name": spec.name.split(".")[0], "options": options, "plan": counts}


def _random(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
  """Draws a parameter on the device; norm scales and layer scales are centred at 1."""
  key = jax.random.key(zlib.crc32(jax.tree_util.keystr(path).encode()))
  is_factor = path[-1].key in ("scale", "gamma")
  return _STD * jax.random.normal(key, shape.shape, shape.dtype) + is_factor


def _tiled(layers: Layers, tile: int, most: int) -> Layers:
  """Rounds the counts of a plan up to multiples of a tile."""
  made = []
  for layer in layers:
    reduce = layer.reduce
    assert isinstance(reduce, PruneMerge)
    counts = (-(-count // tile) * tile for count in (reduce.prune_keep, reduce.merge_keep))
    prune, merge = (min(count, most) for count in counts)
    reduce = dataclasses.replace(reduce, prune_keep=prune, merge_keep=merge)
    made.append(dataclasses.replace(layer, reduce=reduce))
  return tuple(made)


@dataclasses.dataclass(frozen=True)
class Check:
  """A check that outputs match: measures their relative distance, which has a limit."""

  name: str
  limit: float
  measure: Callable[[], float]

  def result(self) -> dict[str, Any]:
    """Measures the distance, and returns the entry of the JSON file."""
    distance = self.measure()
    values = {"name": self.name, "distance": distance, "limit": self.limit}
    return {**values, "agrees": distance < self.limit}


def checks(platform: str, is_tiny: bool, from_torch: FromTorch | None) -> list[Check]:
  """Returns checks of all attention implementations against float32, and of float32 with PyTorch.

  Args:
    platform: JAX's name of the platform.
    is_tiny: Whether the model is only as large as a test needs.
    from_torch: PyTorch's side; None: no PyTorch.
  """
  half, subjects = "bfloat16", Subjects(_SMALL, is_tiny, depth=4)

  @functools.cache
  def exact(what: str) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
      return _logits(subjects, what, "xla", "float32")

  def half_distance(what: str, form: str) -> float:
    return _distance(_logits(subjects, what, form, half), exact(what))

  def torch_distance(way: str) -> float:
    assert from_torch
    found = from_torch(subjects, np.asarray(subjects.images(8, "float32")), way)
    return _distance(found, exact(way.split()[0]))

  found = []
  for form in forms(half, platform):
    found.append(Check(f"attention {form}", 0.02, functools.partial(_attention_distance, form)))
    # Under a plan, tokens of nearly equal importance may swap ranks.
    for what, limit in (("dense", 0.03), ("plan", 0.06)):
      measure = functools.partial(half_distance, what, form)
      found.append(Check(f"{what} {form} {half}", limit, measure))
  for way in ("dense eager", "plan eager") if from_torch else ():
    measure = functools.partial(torch_distance, way)
    found.append(Check(f"torch {way} float32", 1e-3, measure))
  return found


def _logits(subjects: Subjects, what: str, form: str, dtype: str) -> np.ndarray:
  model, images = subjects.model(what, form, dtype), subjects.images(8, "float32").astype(dtype)
  logits = jax.jit(model.apply)({"params": subjects.weights(dtype)}, images)
  return np.asarray(logits, np.float32)


def _attention_distance(form: str) -> float:
  """Compares bfloat16 attention over tokens of very different sizes with float32 attention."""
  q, k, v = jax.random.normal(jax.random.key(0), (3, 4, 6, 179, 64))
  log_size = 3 * jax.random.uniform(jax.random.key(1), (4, 179))
  q, k, v = (x.astype("bfloat16") for x in (q, k, v))
  found = jax.jit(lambda *x: attend(*x, 0.125, log_size, form=form))(q, k, v)
  with jax.default_matmul_precision("highest"):
    wide = (x.astype("float32") for x in (q, k, v))
    expected = jax.jit(lambda *x: attend(*x, 0.125, log_size, form="xla"))(*wide)
  return _distance(np.asarray(found, np.float32), np.asarray(expected))


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
  return float(f"{np.linalg.norm(found - expected) / np.linalg.norm(expected):.2g}")
