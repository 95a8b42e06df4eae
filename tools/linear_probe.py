"""Evaluates the embeddings of a run's models with a linear probe of the dense model.

    python tools/linear_probe.py runs/NAME [--json FILE]

`runs/NAME` is the workdir of a run with the stage `evaluate` and labelled data; the model need not
know the classes. The tool fits a logistic regression to the dense model's embeddings of the
training images, normalized to unit length as in CLIP. It then applies this classifier to all
models' embeddings of the evaluation images.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vitcomp_jax.atomic import write_json
from vitcomp_jax.data import loader
from vitcomp_jax.data.dataset import Dataset
from vitcomp_jax.data.transforms import normalize
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.build import build
from vitcomp_jax.paths import expand
from vitcomp_jax.results import Row, environment
from vitcomp_jax.runs import table
from vitcomp_jax.runs.run import Run, finished_run
from vitcomp_jax.scoring import measured

_DECAY = 1e-4  # L2 penalty on the weights, large enough for a unique minimum
_FIT_STEPS = 200  # of L-BFGS; the gradient is close to 0 long before the last


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("workdir", help="of a run that evaluated models")
  parser.add_argument("--json", help="where to write the result")
  args = parser.parse_args(argv)
  try:
    found = measure(finished_run(pathlib.Path(expand(args.workdir))))
    if args.json:
      write_json(pathlib.Path(expand(args.json)), found)
  except UserError as error:
    print(error, file=sys.stderr)
    return 2
  for row in found["rows"]:
    print(f"{row['name']:24} {row['gmacs']:7.3f} GMACs  {_shown(row)}")
  return 0


def _shown(row: dict[str, Any]) -> str:
  return f"cosine {row['cosine']:.4f}  top-1 {row['top1']:.2f} ± {row['top1_se']:.2f} %"


def measure(run: Run) -> dict[str, Any]:
  """Returns the linear classifier's top-1 and the mean cosine for every model of a run.

  Args:
    run: A run that has been evaluated.

  Raises:
    UserError: If the data have no labels, or the model has its own classifier.
  """
  spec, batch_size = run.inputs.spec, run.config.evaluate.batch_size
  if spec.has_classifier:
    raise UserError(f"{spec.name}: expected a model that gives embeddings, got a classifier.")
  train, judged = (_labelled(run, split) for split in ("train", "eval"))
  models = table.candidates(run)
  dense = build(spec, spec.dense_layers), run.artefacts.dense_params
  weights, bias = fit(*embeddings(*dense, train, batch_size), train.num_classes)
  aim, labels = embeddings(*dense, judged, batch_size)
  rows = []
  for model in models.values():
    module, mine = build(spec, model.layers), aim
    if model.row.method != "dense":
      mine, _ = embeddings(module, model.params, judged, batch_size)
    right = 100.0 * (np.argmax(mine @ weights + bias, axis=1) == labels)
    row = measured(Row(method=model.row.method), {"top1": right}, module)
    cosine = float(np.mean(np.sum(mine * aim, axis=1)))
    costs = {"gmacs": row.gmacs, "params_m": row.params_m, "cosine": round(cosine, 6)}
    accuracy = {"top1": row.top1, "top1_se": row.top1_se}
    rows.append({"name": model.name, **costs, **accuracy})
  about = {"variant": spec.name, "data": judged.name, "examples": len(labels)}
  return about | {"fitted_to": train.num_examples, **environment(), "rows": rows}


def _labelled(run: Run, split: str) -> Dataset:
  """Opens a split with its labels, which a run ignores if the model has no classifier."""
  data = loader.load(run.config.data, split, run.inputs.preprocess, run.config.seed)
  if not data.has_labels:
    raise UserError(f"{data.name}, split {data.split}: expected labels, got none.")
  return data


def embeddings(
  model: Any, params: Any, data: Dataset, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns unit-length embeddings, f32[n d], and labels, int32[n], of all readable images."""
  spec = model.spec

  @jax.jit
  def embedded(params: Any, images: jax.Array) -> jax.Array:
    images = normalize(images, spec.preprocess)
    out = model.apply({"params": params}, images, method="forward")
    found = out.representation(spec.projection)
    return found / jnp.linalg.norm(found, axis=-1, keepdims=True)

  found, labels = [], []
  for batch in data.eval_batches(batch_size):
    real = batch["mask"] > 0
    found.append(np.asarray(embedded(params, batch["image"]))[real])
    labels.append(batch["label"][real])
  return np.concatenate(found), np.concatenate(labels)


def fit(features: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
  """Fits multinomial logistic regression with a small weight decay.

  Args:
    features: Features, f32[n d].
    labels: Classes, int32[n].
    classes: Number of classes.

  Returns:
    Weights, f32[d c], and biases, f32[c].
  """
  solver = optax.lbfgs()

  def loss(line: dict[str, jax.Array]) -> jax.Array:
    logits = features @ line["weights"] + line["bias"][None]
    wrong = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(wrong) + _DECAY * jnp.sum(line["weights"] ** 2)

  def step(carry: Any, _: None) -> tuple[Any, None]:
    line, state = carry
    value, gradient = optax.value_and_grad_from_state(loss)(line, state=state)
    change, state = solver.update(gradient, state, line, value=value, grad=gradient, value_fn=loss)
    return (optax.apply_updates(line, change), state), None

  line = {"weights": jnp.zeros((features.shape[1], classes)), "bias": jnp.zeros(classes)}
  (line, _), _ = jax.lax.scan(step, (line, solver.init(line)), None, length=_FIT_STEPS)
  return np.asarray(line["weights"]), np.asarray(line["bias"])


if __name__ == "__main__":
  sys.exit(main())
