"""Models from names, weights and plans; what `import vitcomp_jax as vc` shows of them."""

import dataclasses
import functools
import os

import jax
from jaxtyping import Array, Float

from vitcomp_jax.cost import macs
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.build import build
from vitcomp_jax.plans import Plan, load_plan
from vitcomp_jax.weights.loading import Params, abstract_params, load_params, spec_for


def load(
  variant: str,
  weights: str | os.PathLike[str] | None = None,
  plan: Plan | str | os.PathLike[str] | None = None,
  num_classes: int | None = None,
  image_size: int | tuple[int, int] | None = None,
) -> tuple[Backbone, Params]:
  """Loads a model and its parameters.

  Args:
    variant: timm's name.
    weights: A file, a hub id `timm/…`, `bundled`, or None: random weights.
    plan: A plan, a published plan's name or the path of a plan.json; None: dense.
    num_classes: Outputs of the classifier. None: the weights', and so is their classifier; weights
      without one give the pooled features, and a warning says so. 0: the pooled features, without
      the weights' classifier. Another number than the weights': a fresh, random classifier, which
      has to be trained; a warning says so.
    image_size: Side of a square, or height and width, in pixels; None: the weights'. Position
      embeddings of another grid are resampled.

  Returns:
    An ordinary Flax module, and its parameter tree. `model.spec` has the class names and the
    preprocessing, as far as the weights say them.

  Raises:
    UserError: If variant, weights and plan are not there or do not fit each other.
  """
  weights = None if weights is None else os.fspath(weights)
  spec = spec_for(variant, weights, num_classes, image_size)
  plan = load_plan(os.fspath(plan)) if isinstance(plan, str | os.PathLike) else plan
  layers = plan.layers_for(spec) if plan else spec.dense_layers
  indices = plan.indices if plan else None
  fresh_head = num_classes is not None
  return build(spec, layers), load_params(
    spec, layers, weights, fresh_head=fresh_head, indices=indices
  )


@functools.partial(jax.jit, static_argnums=0)
def apply(model: Backbone, params: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b c"]:
  """Logits (features for a model without classifier); compiled once per model and batch shape.

  Args:
    model: From `load`. Models with equal plans are equal, and compile once.
    params: From `load`.
    images: Normalised by `model.spec.mean` and `model.spec.std`.
  """
  return model.apply({"params": params}, images)


@dataclasses.dataclass(frozen=True)
class Cost:
  """The cost of a model.

  Attributes:
    gmacs: 1e9 multiply-accumulates per image (the papers' "GFLOPs").
    params: Number of parameters.
  """

  gmacs: float
  params: int


def count_cost(model: Backbone) -> Cost:
  """Counts a model's multiply-accumulates and parameters."""
  params = abstract_params(model)
  gmacs = macs.static_macs(model.spec, model.layers) / 1e9
  return Cost(gmacs, sum(p.size for p in jax.tree.leaves(params)))
