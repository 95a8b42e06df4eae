"""Stage `slim`: trains soft masks with the weights, cuts them, and extracts a smaller network."""

import logging
from typing import Any, NamedTuple

import jax
import numpy as np

from vitcomp_jax import api, scoring
from vitcomp_jax.cost import macs
from vitcomp_jax.data.mixing import training_inputs
from vitcomp_jax.data.transforms import normalize
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.bisection import bracket
from vitcomp_jax.methods.vit_slim import authors
from vitcomp_jax.methods.vit_slim import search as vit_slim
from vitcomp_jax.methods.vit_slim.search import KINDS, Masks, ViTSlim
from vitcomp_jax.models.slicing import LayerIndex, slice_params
from vitcomp_jax.models.spec import LayerSpec, ViTSpec, with_drop_path
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.ops import losses
from vitcomp_jax.plans import Plan, load_plan, make_plan, save_plan
from vitcomp_jax.results import SlimResult
from vitcomp_jax.runs.run import Run
from vitcomp_jax.training import loop, optimizer
from vitcomp_jax.training.step import init_state, make_step, random_streams, top1
from vitcomp_jax.weights import files, writing_back
from vitcomp_jax.weights.loading import Params

_TRIED = 16  # images on which the slimmed network's outputs must be finite


def check(run: Run) -> None:
  """Rejects an initial plan, invalid budgets, and data without labels."""
  run.inputs.spec.check_plain("stage slim")
  run.inputs.check_trainable("slim")
  run.inputs.check_batches("slim")
  if run.config.model.plan:
    raise UserError(
      f"config.model.plan: expected none, as `slim` starts from the dense model, got "
      f"{run.config.model.plan}."
    )
  budgets = run.config.slim.budgets
  if run.config.slim.masks:
    _read_masks(run, run.config.slim.masks)
  if budgets is None:
    least = _gmacs(run.inputs.spec, _method(run).smallest(run.config.slim.min_units), 1)
    if least > 1.01 * run.inputs.target_gmacs:
      raise UserError(
        f"config.budget: expected at least {least:.4g} GMACs, what the smallest cut of what is "
        f"searched (config.slim.w_*) costs, got {run.inputs.target_gmacs:.4g}."
      )
  elif len(budgets) != len(KINDS):
    raise UserError(
      f"config.slim.budgets: expected shares of {', '.join(KINDS)}, got {len(budgets)} numbers."
    )


def run(run: Run) -> SlimResult:
  """Runs the search, the cut and the extraction.

  Returns:
    Requested and achieved budgets. The slimmed network is in `plan.json` and
    `slimmed.safetensors`; the dense network that it was cut from is in `searched.safetensors`.

  Raises:
    UserError: If the masks cannot be cut at the budgets, or the slimmed network's outputs are not
      finite.
  """
  searched = _searched(run)
  masks, budgets = _cut_or_explain(run, searched.arch)
  slimmed = _extract(run, searched, masks)
  _check_outputs(run, slimmed)
  _save(run, searched, slimmed, budgets)
  return _summary(run, searched, slimmed, masks, budgets)


class _Searched(NamedTuple):
  steps: int
  images: int
  seconds: float
  params: Params
  arch: Any


class _Slimmed(NamedTuple):
  layers: tuple[LayerSpec, ...]
  indices: tuple[LayerIndex, ...]
  params: Params


def _searched(run: Run) -> _Searched:
  """Runs the search, or reads the masks of an earlier search; writes weights and masks."""
  config, layout, path = run.config.slim, run.inputs.layout, run.workdir.path
  steps, seconds, params = 0, 0.0, run.artefacts.dense_params
  if config.masks:
    arch = _read_masks(run, config.masks)
  else:
    searched = task(run)
    state, seconds = loop.train(searched, path, layout, run.config.profile.steps)
    params = layout.get(state.params if state.ema is None else state.ema)
    steps, arch = searched.steps, layout.get(state.arch)
  run.artefacts.save(params, path / "searched.safetensors")
  files.write(authors.to_authors(arch), str(path / "masks.safetensors"))
  return _Searched(steps, steps * config.batch_size, seconds, params, arch)


def _extract(run: Run, searched: _Searched, masks: Masks) -> _Slimmed:
  """Returns the smaller network that is defined by the masks."""
  config, spec, params = run.config.slim, run.inputs.spec, searched.params
  layers, indices = vit_slim.deploy(spec, masks, config.tile)
  if config.keep_factors:
    params = vit_slim.fold(spec, params, searched.arch)
  return _Slimmed(layers, indices, slice_params(params, indices))


def _save(run: Run, searched: _Searched, slimmed: _Slimmed, budgets: tuple[float, ...]) -> None:
  """Writes the network's weights and plan; a later search of token counts replaces `plan.json`."""
  run.artefacts.save(slimmed.params, run.workdir.path / "slimmed.safetensors")
  made_by = {
    "method": "vit_slim",
    "steps": searched.steps,
    "images": searched.images,
    "budgets": budgets,
    "weights": run.config.model.weights,
    "data": run.inputs.train_data.name,
    "seed": run.config.seed,
  }
  plan = make_plan(run.inputs.spec, slimmed.layers, made_by, slimmed.indices)
  for name in ("slimmed.json", "plan.json"):
    save_plan(plan, run.workdir.path / name)


def _summary(
  run: Run, searched: _Searched, slimmed: _Slimmed, masks: Masks, budgets: tuple[float, ...]
) -> SlimResult:
  spec, cost = run.inputs.spec, api.count_cost(ViT(run.inputs.spec, slimmed.layers))
  authors_params, authors_macs = authors.authors_cost(spec, masks)
  return SlimResult(
    steps=searched.steps,
    images=searched.images,
    minutes=round(searched.seconds / 60, 2),
    histogram_limits=vit_slim.HISTOGRAM_LIMITS,
    budget_gmacs=None if run.config.slim.budgets else run.inputs.target_gmacs,
    shares=dict(zip(KINDS, budgets, strict=True)),
    kept={kind: float(np.mean(getattr(masks, kind))) for kind in KINDS},
    gmacs=cost.gmacs,
    of_dense=cost.gmacs * 1e9 / macs.static_macs(spec, spec.dense_layers),
    params_m=cost.params / 1e6,
    authors_params_m=authors_params / 1e6,
    authors_gmacs=authors_macs / 1e9,
    timm=writing_back.write(
      run.inputs.named_spec, slimmed.layers, slimmed.params, run.workdir.path
    ),
  )


def _check_outputs(run: Run, slimmed: _Slimmed) -> None:
  """Rejects a network whose outputs are not finite."""
  images = run.inputs.train_data.sample(_TRIED)["image"]
  model = ViT(run.inputs.spec, slimmed.layers)
  outputs = api.apply(model, slimmed.params, normalize(images, run.inputs.preprocess))
  scoring.check_finite(np.asarray(outputs), "stage slim: the slimmed network")


def made(run: Run) -> Plan:
  """Returns the slimmed network's plan."""
  return load_plan(str(run.workdir.path / "slimmed.json"))


def _method(run: Run) -> ViTSlim:
  return ViTSlim(run.inputs.spec, run.config.slim)


def task(run: Run) -> loop.Task:
  """Returns the training task of the search, which trains masks and weights."""
  method = _method(run)
  config, spec, data = run.config.slim, run.inputs.spec, run.inputs.train_data
  model = ViT(spec, with_drop_path(method.layers(), config.drop_path))

  def loss_fn(params, arch, fixed, batch, key, step):
    del fixed
    images, targets = training_inputs(
      batch, run.inputs.preprocess, spec.num_classes, config.label_smoothing, key
    )
    variables, rngs = {"params": params, "arch": arch}, random_streams(key, batch, ("drop_path",))
    out = model.apply(variables, images, method="forward", rngs=rngs)
    task = losses.soft_cross_entropy(out.logits, targets)
    penalty, metrics = method.penalty(arch, out, step)
    return task + penalty, {"task_loss": task, "top1": top1(out.logits, targets), **metrics}

  def group_of(path: tuple[str, ...]) -> str:
    if path[0] == "arch":
      return "masks" if method.searches(path[-2]) else optimizer.FROZEN
    is_trained = not config.freeze_weights or optimizer.is_of_norm(path)
    return "weights" if is_trained else optimizer.FROZEN

  groups = {
    "weights": optimizer.train_optimizer(config, data.num_examples),
    "masks": optimizer.mask_optimizer(config, data.num_examples),
  }
  tx = optimizer.per_group(group_of, groups)
  trains = ("params", "arch")
  step_fn = make_step(loss_fn, tx, trains, run.inputs.layout, config.ema, config.parts)
  start = run.artefacts.dense_params, method.init()
  return loop.Task(
    stage="slim",
    state=init_state(*start, tx, trains, run.config.seed, config.ema is not None),
    step_at=lambda _: step_fn,
    batches=lambda done: run.inputs.train_batches(config.batch_size, done),
    steps=optimizer.train_steps(config, data.num_examples),
    log_every=config.log_every,
    checkpoint_every=config.checkpoint_every,
    schedule=optimizer.train_schedule(config, data.num_examples),
  )


def _read_masks(run: Run, path: str) -> Any:
  """Reads the masks that another run learnt.

  Raises:
    UserError: If they are missing, not finite, or for another model or kind of attention mask.
  """
  arch = authors.from_authors(files.read(path))
  expected = jax.eval_shape(_method(run).init)
  if jax.tree.map(np.shape, arch) != jax.tree.map(np.shape, expected):
    raise UserError(
      f"config.slim.masks: expected the masks of {run.inputs.spec.name} with config.slim.attn="
      f"{run.config.slim.attn}, got others in {path}."
    )
  values = np.concatenate([np.ravel(mask) for mask in jax.tree.leaves(arch)])
  broken = int(np.sum(~np.isfinite(values)))
  if broken:
    raise UserError(
      f"config.slim.masks: expected finite masks, got {broken} of {values.size} numbers that are "
      f"NaN or infinite in {path}; give another search's."
    )
  return arch


def _cut_or_explain(run: Run, arch: Any) -> tuple[Masks, tuple[float, ...]]:
  """Returns the result of `_cut`; its errors explain how to cut again without a search."""
  path = run.workdir.path
  try:
    return _cut(run, _method(run), arch)
  except UserError as error:
    raise UserError(
      f"{error} Nothing need be searched anew: give another --workdir, config.model.weights="
      f"{path}/searched.safetensors and config.slim.masks={path}/masks.safetensors."
    ) from error


def _cut(run: Run, method: ViTSlim, arch: Any) -> tuple[Masks, tuple[float, ...]]:
  """Returns masks and budgets: the config's budgets, or one share that meets its compute budget."""
  config, spec = run.config.slim, run.inputs.spec
  if config.budgets is not None:
    return method.cut(arch, config.budgets, config.min_units), config.budgets

  def spent(share: float) -> float:
    masks = method.cut(arch, (share,) * 3, config.min_units, refuse_empty=False)
    return _gmacs(spec, masks, config.tile)

  shares = bracket(lambda share: spent(share) > run.inputs.target_gmacs, 1e-9, 1.0)
  share = min(shares, key=lambda share: abs(spent(share) - run.inputs.target_gmacs))
  reached = spent(share)
  if abs(reached - run.inputs.target_gmacs) > 0.01 * run.inputs.target_gmacs:
    logging.warning(
      "the nearest cut has %.4g GMACs, the budget is %.4g", reached, run.inputs.target_gmacs
    )
  budgets = (share,) * 3
  return method.cut(arch, budgets, config.min_units), budgets


def _gmacs(spec: ViTSpec, masks: Masks, tile: int) -> float:
  return macs.static_macs(spec, vit_slim.deploy(spec, masks, tile)[0]) / 1e9
