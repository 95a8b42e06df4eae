"""Prints what a model sees in images, and draws what becomes of their tokens.

    python -m vitcomp_jax.predict --plan PLAN --weights WEIGHTS IMAGE...
    python -m vitcomp_jax.predict --workdir RUN IMAGE...
    python -m vitcomp_jax.predict --exported RUN/export IMAGE...

The exit status is 0 on success, and 2 for a mistake in the command, a file or the weights.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from vitcomp_jax import api, paths, scoring
from vitcomp_jax.data import class_names, sources
from vitcomp_jax.data.transforms import Preprocess, evaluation_image, normalize
from vitcomp_jax.errors import UserError
from vitcomp_jax.exported import load_exported
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.build import build
from vitcomp_jax.plans import load_plan
from vitcomp_jax.reporting import model_plots, plots
from vitcomp_jax.runs.run import finished_run
from vitcomp_jax.weights import loading

_BATCH = 32  # images per batch


@dataclasses.dataclass(frozen=True)
class Classifier:
  """A model with its preprocessing and class names.

  Attributes:
    logits: Function from uint8[b h w 3] to f32[b c].
    preprocess: Preprocessing of images.
    classes: Class names by label.
    model: Model whose tokens can be drawn; None for an exported model.
    params: Weights of the model.
  """

  logits: Callable[[np.ndarray], np.ndarray]
  preprocess: Preprocess
  classes: Sequence[str]
  model: Backbone | None = None
  params: loading.Params = dataclasses.field(default_factory=dict)


def main(argv: Sequence[str]) -> int:
  """Prints the most probable classes of each image; returns the exit status."""
  try:
    options = _parse(argv[1:])
    for path in options.images:  # before loading a model
      if not _path(path).is_file():
        raise UserError(f"{path}: expected an image file, got none.")
    classifier = _classifier(options)
    images = np.stack([_read(path, classifier.preprocess) for path in options.images])
    parts = np.split(images, range(_BATCH, len(images), _BATCH))
    logits = np.concatenate([classifier.logits(part) for part in parts])
    for path, row in zip(options.images, logits, strict=True):
      scoring.check_finite(row, path)
    for path, row in zip(options.images, logits, strict=True):
      print(_answer(path, row, classifier.classes, options.top))
    if options.maps:
      _draw(options, classifier, images)
  except UserError as error:
    print(f"vitcomp_jax: {error}", file=sys.stderr)
    return 2
  return 0


def _answer(path: str, logits: np.ndarray, classes: Sequence[str], top: int) -> str:
  """Returns an image's most probable classes, one per line."""
  weights = np.exp(logits - logits.max(), dtype=np.float64)
  shares = 100 * weights / weights.sum()
  best = np.argsort(-shares, kind="stable")[:top]
  return "\n".join([path, *(f"  {shares[i]:5.1f} %  {classes[i]}" for i in best)])


def _draw(options: argparse.Namespace, classifier: Classifier, images: np.ndarray) -> None:
  """Draws one numbered figure per image, as files in different folders may share a name."""
  if classifier.model is None:
    raise UserError("command line: --maps needs the model itself; an exported one gives no tokens.")
  for i, (path, image) in enumerate(zip(options.images, images, strict=True), 1):
    name = f"{i}_{pathlib.Path(path).stem}"
    layers = model_plots.spaced(classifier.model.spec.depth, 4)
    try:
      figure = model_plots.token_maps(
        classifier.model, classifier.params, image[None], [pathlib.Path(path).name], layers
      )
      plots.save(figure, options.maps, name)
    except OSError as error:
      raise UserError(f"--maps {options.maps}: cannot be written ({error.strerror}).") from error
    print(f"tokens: {options.maps / name}.png")


def _read(path: str, pre: Preprocess) -> np.ndarray:
  """Reads an image file and returns the model's input, uint8[h w 3]."""
  try:
    content = pathlib.Path(paths.expand(path)).read_bytes()
    return evaluation_image(sources.decode(content, path), pre)
  except OSError as error:
    raise UserError(f"{path}: expected an image file, got none ({error.strerror}).") from error
  except sources.CorruptImage as error:
    raise UserError(f"expected an image file; {error}.") from error


def _classifier(options: argparse.Namespace) -> Classifier:
  if options.exported:
    found = _from_export(options.exported)
  elif options.workdir:
    found = _from_run(options.workdir)
  else:
    found = _from_weights(options.variant, options.weights, options.plan)
  if not found.classes:
    raise UserError("expected a model with a classifier, got one that gives features.")
  # Photographs are rotated by their EXIF tag, as viewers do.
  upright = dataclasses.replace(found.preprocess, exif_orientation=True)
  return dataclasses.replace(found, preprocess=upright)


def _from_export(path: str) -> Classifier:
  model = load_exported(path)
  pre, wants = model.preprocess, model.manifest["input"]
  count = model.manifest["output"]["shape"][1]
  names = model.manifest["class_names"] or ()
  names = names if len(names) == count else class_names.guess(count)

  def logits(images: np.ndarray) -> np.ndarray:
    return model(normalize(images, pre) if wants["normalized"] else images)

  is_classifier = model.manifest["output"]["name"] == "logits"
  return Classifier(logits, pre, names if is_classifier else ())


def _from_run(workdir: pathlib.Path) -> Classifier:
  """Returns the model of a finished run, with its plan, weights and classes."""
  run = finished_run(workdir)
  inputs, artefacts = run.inputs, run.artefacts
  names = inputs.names.recorded or inputs.class_names
  model = build(inputs.spec, artefacts.layers)
  return _of(model, artefacts.params, inputs.preprocess, names)


def _from_weights(variant: str | None, weights: str | None, plan: str | None) -> Classifier:
  found = load_plan(plan) if plan else None
  name = variant or (found.variant if found else None)
  if weights is None:
    raise UserError("command line: expected --weights, or --workdir, or --exported.")
  model, params = api.load(name, weights, found) if name else api.load(weights)
  return _of(model, params, model.spec.preprocess, model.spec.class_names)


def _of(
  model: Backbone, params: loading.Params, pre: Preprocess, names: Sequence[str]
) -> Classifier:
  def logits(images: np.ndarray) -> np.ndarray:
    return np.asarray(api.apply(model, params, normalize(images, pre)), np.float32)

  count = model.spec.num_classes
  names = class_names.readable(names) if len(names) == count else class_names.guess(count)
  return Classifier(logits, pre, names, model, params)


def _path(text: str) -> pathlib.Path:
  return pathlib.Path(paths.expand(text))


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise UserError(f"command line: {message}.")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = _Parser(
    prog="python -m vitcomp_jax.predict",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
  parser.add_argument("--plan", help="a published plan's name, or a plan.json; none: dense")
  parser.add_argument("--weights", help="a file, a hub id, or `bundled`")
  parser.add_argument("--variant", help="timm's name; none: the plan's, or the weights' own")
  parser.add_argument("--workdir", type=_path, help="a finished run, instead of these three")
  parser.add_argument("--exported", help="a run's folder `export`, or an artefact in it, instead")
  parser.add_argument("--top", type=int, default=5, help="how many classes are printed")
  parser.add_argument("--maps", type=_path, metavar="DIR", help="where to draw token maps")
  options = parser.parse_args(argv)
  given = bool(options.plan or options.weights or options.variant)
  if given + (options.workdir is not None) + (options.exported is not None) > 1:
    parser.error("expected one of --workdir, --exported, and --weights with what belongs to it")
  if options.top < 1:
    parser.error(f"expected --top of at least 1, got {options.top}")
  return options


if __name__ == "__main__":
  sys.exit(main(sys.argv))
