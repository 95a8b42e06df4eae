"""Measures random schedules at a budget, as a baseline for a search."""

import functools
import itertools
import pathlib
from typing import Any

import jax
import numpy as np

from vitcomp_jax import scoring, strict_json
from vitcomp_jax.atomic import write_text
from vitcomp_jax.config import DiffRateOptions
from vitcomp_jax.cost import macs
from vitcomp_jax.data.transforms import Preprocess, normalize
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate.search import DiffRate
from vitcomp_jax.methods.handmade import random_counts
from vitcomp_jax.metrics import progress
from vitcomp_jax.models.attention import LayerPositions
from vitcomp_jax.models.block import encoder_block
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import Tokens
from vitcomp_jax.models.vit import ViT, ViTParts
from vitcomp_jax.runs.run import Run
from vitcomp_jax.weights.loading import Params

# Token counts are rounded up to multiples of this; the excess tokens are masked.
_BUCKET = 8

Point = dict[str, float]


def points(run: Run, budget: float) -> list[Point]:
  """Measures `config.compare.random_schedules` random schedules on the first examples.

  Each schedule's metrics are one line of `compare/random@BUDGET.jsonl`; existing lines are reused.

  Args:
    run: The run.
    budget: Share of the dense model's MACs.

  Returns:
    `gmacs`, `top1` in percent and `loss` in nats of each schedule.

  Raises:
    UserError: If the outputs of a schedule are not finite.
  """
  config, spec = run.config.compare, run.inputs.spec
  gmacs, path = run.inputs.gmacs_of(budget), _file(run, budget)
  found = _kept(path)
  schedules = random_counts(spec, gmacs, config.random_schedules, run.config.seed)
  left = list(itertools.islice(schedules, len(found), None))
  method = DiffRate(spec, gmacs, DiffRateOptions(importance=run.config.search.importance))
  batches = _first(run, config.random_examples) if left else []
  with path.open("a") as stream:
    for layers in progress(left, f"random schedules of {gmacs:.3g} GMACs", len(left)):
      parts = [_score(run, method, layers, *batch) for batch in batches]
      scores = {}
      for key in ("top1", "loss"):
        scores[key] = np.concatenate([part[key] for part in parts])
      what = f"random schedule {len(found) + 1} of {gmacs:.3g} GMACs"
      scoring.check_finite(scores["loss"], what)
      mean = {key: float(np.mean(values)) for key, values in scores.items()}
      found.append({"gmacs": macs.static_macs(spec, layers) / 1e9, **mean})
      stream.write(strict_json.dumps(found[-1]) + "\n")
      stream.flush()
  return found


def _file(run: Run, budget: float) -> pathlib.Path:
  folder = run.workdir.path / "compare"
  folder.mkdir(parents=True, exist_ok=True)
  return folder / f"random@{budget:g}.jsonl"


def _kept(path: pathlib.Path) -> list[Point]:
  """Returns earlier measurements.

  Removes an incomplete last line, left by a killed run, so that new lines can be appended.
  """
  lines = path.read_text().splitlines() if path.exists() else []
  whole = [line for line in lines if line.endswith("}")]
  write_text(path, "".join(f"{line}\n" for line in whole))
  try:
    return [strict_json.loads(line) for line in whole]
  except ValueError as error:
    raise UserError(f"{path}: expected a JSON object per line ({error}); remove it.") from error


def _score(
  run: Run, method: DiffRate, layers: tuple[LayerSpec, ...], images: jax.Array, labels: jax.Array
) -> dict[str, np.ndarray]:
  """Computes top-1 and loss of every example under a schedule, layer by layer.

  The counts are inputs of a compiled layer, and numbers of tokens are rounded up. Schedules thus
  share compiled layers, which cost little more than layers compiled for each schedule.
  """
  spec, params = run.inputs.spec, run.artefacts.dense_params
  arch = method.replayed_arch(layers)
  kept = [after for _, after in macs.static_counts(spec, layers)]
  limits = [min(-(-n // _BUCKET) * _BUCKET, spec.num_tokens) for n in kept]
  model = ViT(spec, method.replayed_layers())
  tokens = _embed(model, run.inputs.preprocess, params, images)
  for i, layer in enumerate(method.replayed_layers(limits)):
    variables = {"params": params[f"blocks_{i}"], "arch": arch[f"blocks_{i}"]}
    positions = model.apply({"params": params}, i, method="layer_positions")
    tokens = _block(spec, layer, variables, tokens, positions)
  return jax.device_get(_classify(spec, params, tokens, labels))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(model: ViT, preprocess: Preprocess, params: Params, images: jax.Array) -> Tokens:
  images = normalize(images, preprocess)
  return model.apply({"params": params}, images, method="embed")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(
  spec: ViTSpec,
  layer: LayerSpec,
  variables: Params,
  tokens: Tokens,
  positions: LayerPositions | None,
) -> Tokens:
  return encoder_block(layer, ViTParts(spec)).apply(variables, tokens, positions)


@functools.partial(jax.jit, static_argnums=0)
def _classify(
  spec: ViTSpec, params: Params, tokens: Tokens, labels: jax.Array
) -> dict[str, jax.Array]:
  model = ViT(spec, spec.dense_layers)
  _, _, logits = model.apply({"params": params}, tokens, method="classify")
  return scoring.scores(logits, labels)


def _first(run: Run, count: int) -> list[tuple[Any, Any]]:
  """Returns images and labels of the first examples, in batches; the last may be smaller."""
  size = run.config.evaluate.batch_size
  found = []
  for i, batch in enumerate(run.inputs.eval_data.eval_batches(size)):
    real = min(int(np.sum(batch["mask"])), count - i * size)
    if real <= 0:
      break
    found.append((batch["image"][:real], batch["label"][:real]))
  return found
