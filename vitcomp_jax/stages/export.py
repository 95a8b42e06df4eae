"""Stage `export`: writes the current model in formats that run without this library."""

from typing import Any

import numpy as np

from vitcomp_jax import exported, exporting, multihost
from vitcomp_jax.atomic import write_json
from vitcomp_jax.errors import UserError
from vitcomp_jax.exporting import Program
from vitcomp_jax.models.build import build
from vitcomp_jax.results import ExportResult, environment
from vitcomp_jax.runs.run import Run
from vitcomp_jax.weights.loading import Params

_IMAGES = 64  # on which every artefact is compared with the model


def check(run: Run) -> None:
  """Rejects formats that cannot represent the model."""
  if run.artefacts.plan:
    run.artefacts.plan.layers_for(run.inputs.spec)
  where = "config.export.formats"
  if "timm" in run.config.export.formats and "search" in run.config.stages:
    raise UserError(
      f"{where}: timm: timm's VisionTransformer does not remove tokens, which the search's plan "
      "does; leave timm out."
    )
  program = _program(run, {})
  for form in run.config.export.formats:
    try:
      exporting.check(form, program)
    except UserError as why:
      raise UserError(f"{where}: {why}") from why


def run(run: Run) -> ExportResult:
  """Writes the artefacts, compares each with the model, and lists them in the manifest.

  Returns:
    The manifest's entries for the artefacts.

  Raises:
    UserError: If a format cannot represent the model, or the model's outputs are not finite.
    RuntimeError: If an artefact's outputs differ from the model's.
  """
  check(run)  # again, as the plan may have changed since the first check
  folder, entries = run.workdir.path / "export", []
  if multihost.is_first():
    folder.mkdir(exist_ok=True)
  images = run.inputs.eval_data.sample(_IMAGES)["image"]
  images = np.resize(images, (_IMAGES, *images.shape[1:]))  # repeats images of a small data set
  program = _program(run, run.artefacts.params)
  for form in run.config.export.formats:
    entries.append(exporting.write(form, program, folder / exported.FILES[form], images))
  shared = exporting.manifest(program, run.artefacts.plan) | environment()
  write_json(folder / exported.MANIFEST, shared | {"artefacts": entries})
  multihost.meet("exported")
  return ExportResult(tuple(entries))


def made(run: Run) -> dict[str, Any]:
  """Returns the content of `manifest.json`."""
  return exported.read_manifest(run.workdir.path / "export" / exported.MANIFEST)


def _program(run: Run, params: Params) -> Program:
  spec, config = run.inputs.named_spec, run.config.export
  return Program(
    build(spec, run.artefacts.layers), params, config.normalize, tuple(config.platforms)
  )
