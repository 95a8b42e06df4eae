"""State shared by the stages of a run: the config, the workdir, the model and the data."""

import dataclasses
import functools
import importlib.metadata
import operator
import pathlib
import reprlib
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from vitcomp_jax import config as config_lib
from vitcomp_jax import multihost, paths, strict_json
from vitcomp_jax.atomic import write_json
from vitcomp_jax.config import Config
from vitcomp_jax.cost import latency
from vitcomp_jax.cost.cost_models import MACS, CostModel
from vitcomp_jax.data import labels, loader, sources, transforms
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.spec import LayerSpec, ViTSpec, removes_tokens
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.parallel import Layout
from vitcomp_jax.plans import Plan, load_plan
from vitcomp_jax.weights import description, loading, timm_slimmed
from vitcomp_jax.weights.loading import Params

_PACKAGES = ("vitcomp_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class Run:
  """One run in its workdir."""

  config: Config
  workdir: pathlib.Path
  running: tuple[str, ...] = ()  # stages that are run now, which the config may not name
  _sources: dict[str, sources.Source] = dataclasses.field(
    default_factory=dict, init=False, repr=False, compare=False
  )

  def begin(self) -> None:
    """Records the config in the workdir, which is made if need be, or the stages that it got since.

    Raises:
      UserError: If the folder cannot be written.
    """
    path = self.workdir / "config.json"
    multihost.meet("open")  # Whether it is there is asked before it is written.
    if path.exists():
      found = read_json(path)
      if self._recorded_names and self._recorded_names != self.class_names:
        how = labels.differing(self._recorded_names, self.class_names)
        raise UserError(
          f"{self.workdir} was begun with {how}; give another --workdir, or the class folders that "
          "it was begun with."
        )
      if len(found["config"]["stages"]) < len(self.config.stages):
        found["config"]["stages"] = list(self.config.stages)
        write_json(path, found)
      return
    values = {
      "config": config_lib.to_dict(self.config),
      "class_names": list(self.class_names),
      "git_commit": _git_commit(),
    }
    try:
      self.workdir.mkdir(parents=True, exist_ok=True)
      write_json(path, values | environment())
      multihost.meet("begin")
    except OSError as error:
      raise UserError(f"--workdir {self.workdir}: cannot be written ({error.strerror}).") from error

  def finished(self, stage: str) -> dict[str, Any] | None:
    """Returns what a finished stage reported; None if it is not finished."""
    path = self._marker(stage)
    return read_json(path) if path.exists() else None

  def finish(self, stage: str, summary: dict[str, Any]) -> dict[str, Any]:
    """Marks a stage as finished."""
    self._marker(stage).parent.mkdir(exist_ok=True)
    write_json(self._marker(stage), summary)
    multihost.meet(f"finish {stage}")
    return summary

  def _marker(self, stage: str) -> pathlib.Path:
    return self.workdir / "finished" / f"{stage}.json"

  @functools.cached_property
  def spec(self) -> ViTSpec:
    """Returns the spec of the dense model, from its weights and the config.

    A head that is trained, or random, gets as many outputs as the data have classes, unless the
    config says otherwise.
    """
    model = self.config.model
    dtype = None if model.dtype == "float32" else model.dtype
    if model.attention == "cudnn" and dtype is None:
      raise UserError(
        "config.model.attention: cudnn computes in half precision only; set "
        "config.model.dtype=bfloat16."
      )
    classes = model.num_classes
    if classes is None and self._head_is_new and get_spec(model.variant).num_classes:
      classes = len(self._recorded_names or self._asked_names or self._data_names) or None
    spec = loading.spec_for(model.variant, model.weights, classes, model.image_size, dtype)
    spec = dataclasses.replace(spec, attention=model.attention)
    if model.antialias is not None:
      spec = dataclasses.replace(spec, antialias=model.antialias)
    # The config goes before what the weights say of preprocessing.
    asked = {key: getattr(self.config.data, key) for key in description.PREPROCESS}
    asked = {key: value for key, value in asked.items() if value is not None}
    dataclasses.replace(spec.preprocess, **asked)  # raises for what no image can be made with
    return dataclasses.replace(spec, **asked)

  @property
  def _head_is_new(self) -> bool:
    """Returns whether the classifier is trained in this run, or random."""
    trains = "pretrain" in (*self.config.stages, *self.running) or self.finished("pretrain")
    return bool(trains) or self.config.model.weights is None

  @functools.cached_property
  def _recorded_names(self) -> tuple[str, ...]:
    """Returns the class names that the run began with; empty if it has not begun."""
    path = self.workdir / "config.json"
    return tuple(read_json(path).get("class_names", ())) if path.exists() else ()

  @functools.cached_property
  def class_names(self) -> tuple[str, ...]:
    """Returns the names of the model's outputs, in order; empty if not known, or for features."""
    if not self.spec.num_classes:
      return ()
    known, names = self.spec.class_names, self._label_names
    if asked := self._asked_names:
      labels.check_count(asked, self.spec.num_classes)
      return asked
    if known and (not self._head_is_new or labels.are_numbers(names)):
      return known
    return names or known

  @functools.cached_property
  def _label_names(self) -> tuple[str, ...]:
    """Returns the names by which the data's classes are found among the outputs.

    Raises:
      UserError: If classes cannot be told from each other.
    """
    names, classes = self._data_names, self.spec.num_classes
    if not names or not classes:
      return ()
    if asked := self._asked_names:
      labels.check_count(asked, classes)
      return asked
    data, known = self.config.data, self.spec.class_names
    if self._head_is_new and not (known and labels.are_numbers(names)):
      return labels.name_trained_outputs(names, classes, known, data.name)
    # Only folders have an order of their own to choose.
    order = data.class_order if data.name == "folder" else "sorted"
    return labels.name_outputs(names, classes, known, data.name, order)

  @functools.cached_property
  def _asked_names(self) -> tuple[str, ...]:
    """Returns the names in `config.data.classes`; empty if it is not set."""
    return labels.read_names(self.config.data.classes) if self.config.data.classes else ()

  @functools.cached_property
  def _data_names(self) -> tuple[str, ...]:
    """Returns the data's own class names, in order; empty if there are no labels."""
    if self.config.data.name == "fake":
      return ()
    stages = {*self.config.stages, *self.running}
    trains = {"pretrain", "slim", "search", "finetune"} & stages
    of_training = self._source("train").class_names if trains else ()
    return of_training or self._source("eval").class_names

  @functools.cached_property
  def plan(self) -> Plan | None:
    """The plan in force: what this workdir's last search made, or the config's."""
    made_here = self.workdir / "plan.json"
    if made_here.exists() or self.finished("search") or self.finished("slim"):
      return load_plan(str(made_here))
    return load_plan(self.config.model.plan) if self.config.model.plan else None

  @functools.cached_property
  def front(self) -> dict[str, Plan]:
    """The plans of a search for several budgets, by the names of their rows."""
    found = (self.finished("search") or {}).get("front", [])
    names = [summary["plan"] for summary in found]
    return {name: load_plan(str(self.workdir / "plans" / f"{name}.json")) for name in names}

  @functools.cached_property
  def base_plan(self) -> Plan | None:
    """Returns the plan a search starts from: this workdir's slimmed plan, or the config's."""
    made_here = self.workdir / "slimmed.json"
    if made_here.exists():
      return load_plan(str(made_here))
    return load_plan(self.config.model.plan) if self.config.model.plan else None

  @functools.cached_property
  def layers(self) -> tuple[LayerSpec, ...]:
    """The layers under the plan in force."""
    return self.plan.layers_for(self.spec) if self.plan else self.spec.dense_layers

  @functools.cached_property
  def params(self) -> Params:
    """The weights for `layers`: the last that this workdir's stages made, or the config's."""
    finetuned = self.workdir / "finetuned.safetensors"
    if not finetuned.exists():
      return self.params_before_finetune
    return self._load(self.layers, str(finetuned))

  @functools.cached_property
  def params_before_finetune(self) -> Params:
    """The weights for `layers` that `finetune` starts from: those of `slim`, or the dense ones."""
    slimmed = str(self.workdir / "slimmed.safetensors")
    return self._load(self.layers, slimmed if self.finished("slim") else self._dense_weights)

  @functools.cached_property
  def dense_params(self) -> Params:
    """The dense model's weights: what `pretrain` made in this workdir, or the config's."""
    return self._load(self.spec.dense_layers, self._dense_weights)

  @functools.cached_property
  def searched_params(self) -> Params:
    """The dense model's weights after `slim` trained them together with the masks."""
    return self._load(self.spec.dense_layers, str(self.workdir / "searched.safetensors"))

  @property
  def _dense_weights(self) -> str | None:
    made_here = self.workdir / "weights.safetensors"
    return str(made_here) if made_here.exists() else self.config.model.weights

  def _load(self, layers: tuple[LayerSpec, ...], weights: str | None) -> Params:
    fresh_head = self._head_is_new and not self.finished("pretrain")
    dense = layers == self.spec.dense_layers
    indices = self.plan.indices if self.plan and not dense else None
    fresh_predictors = "finetune" in self.config.stages and not self.finished("finetune")
    return loading.load_params(
      self._named_spec, layers, weights, self.config.seed, fresh_head, indices, fresh_predictors
    )

  def save(self, params: Params, path: str | pathlib.Path) -> None:
    """Writes weights of the model under timm's names, with its classes and preprocessing."""
    loading.save_params(self._named_spec, params, path)

  @property
  def _named_spec(self) -> ViTSpec:
    return dataclasses.replace(self.spec, class_names=self.class_names)

  def forget(self) -> None:
    """Forgets what a stage has just made anew, so that it is read when it is next needed."""
    multihost.meet("written")
    for name in ("plan", "front", "base_plan", "layers"):
      vars(self).pop(name, None)
    for name in ("params", "params_before_finetune", "dense_params"):
      vars(self).pop(name, None)

  @functools.cached_property
  def cost(self) -> CostModel:
    """Returns the cost that the budget limits; measures a latency table on first use."""
    budget = self.config.budget
    if budget.latency_ms is None:
      return MACS
    kept = self.workdir / "latency.json"
    if kept.exists():
      return latency.read(kept)
    compiled = self.config.compilation_cache
    cache = pathlib.Path(paths.expand(compiled)).parent / "latency" if compiled else None
    importance = self.spec.importance(self.config.search.importance)
    return latency.table(self.spec, budget.latency_batch, importance, cache)

  @functools.cached_property
  def targets(self) -> dict[str, float]:
    """The budgets in the cost's unit, by what stands behind the names of their plans and rows.

    One for most runs, with nothing behind the names; `@FRACTION` for each of several.

    Raises:
      UserError: If not exactly one kind of budget is given, or one is not above 0 and at most what
        the dense model costs, or several do not fall.
    """
    budget = self.config.budget
    kinds = {
      name: getattr(budget, name) for name in ("fraction", "fractions", "gmacs", "latency_ms")
    }
    given = {name: value for name, value in kinds.items() if value is not None}
    if len(given) != 1:
      got = " and ".join(f"{name} {value}" for name, value in given.items()) or "none"
      raise UserError(f"config.budget: expected one of {', '.join(kinds)}, got {got}.")
    shares = budget.fractions
    if shares is not None and not (shares and sorted(set(shares), reverse=True) == list(shares)):
      raise UserError(f"config.budget.fractions: expected falling shares, got {shares}.")
    dense = self.cost.static(self.spec, self.spec.dense_layers)
    ((kind, asked),) = given.items()
    most, what = 1.0, "of the dense model"
    if kind == self.cost.key:
      most, what = dense, f"{self.cost.unit}, what the dense model takes"
    for value in shares or (asked,):
      if not 0 < value <= most:
        raise UserError(
          f"config.budget.{kind}: expected more than 0 and at most {most:.4g} {what}, got "
          f"{value:g}."
        )
    if shares is not None:
      return {f"@{share:g}": share * dense for share in shares}
    return {"": asked * dense if kind == "fraction" else asked}

  @property
  def target_gmacs(self) -> float:
    """The one budget of what is no search of token counts, in 1e9 multiply-accumulates.

    Raises:
      UserError: As `targets`, or if the budget is several, or a latency.
    """
    budget = self.config.budget
    for name in ("latency_ms", "fractions"):
      if getattr(budget, name) is not None:
        raise UserError(
          f"config.budget.{name}: expected fraction or gmacs here, as only the stage search can "
          f"meet {name}, got {getattr(budget, name)}."
        )
    return self.targets[""]

  def open_data(self, split: str) -> loader.Dataset:
    """Opens a split, `train` or `eval`; refuses classes that the model does not know."""
    return self.train_data if split == "train" else self.eval_data

  def check_trainable(self, stage: str) -> None:
    """Refuses data without labels, or a model without a classifier."""
    if not self.train_data.has_labels or not self.spec.num_classes:
      raise UserError(
        f"stage {stage}: expected labels and a classifier, got {self.spec.name} with "
        f"{self.spec.num_classes} classes on {self.train_data.name}."
      )

  @functools.cached_property
  def train_data(self) -> loader.Dataset:
    return self._open("train")

  @functools.cached_property
  def eval_data(self) -> loader.Dataset:
    return self._open("eval")

  @functools.cached_property
  def layout(self) -> Layout:
    """Returns the layout of state and batches on the devices."""
    return Layout(self.config.parallel)

  def train_batches(self, batch_size: int, start_step: int) -> Iterator[loader.Batch]:
    """This process's rows of the training batches from a step on."""
    return self.train_data.train_batches(batch_size, start_step, self.layout.rows(batch_size))

  def eval_batches(self, batch_size: int) -> Iterator[loader.Batch]:
    """This process's rows of batches that hold every example once; of a size that the devices
    divide."""
    count = self.layout.num_devices
    size = -(-batch_size // count) * count
    return self.eval_data.eval_batches(size, self.layout.rows(size))

  def check_batches(self, stage: str) -> None:
    """Refuses batches of a stage that the devices do not divide."""
    config = getattr(self.config, stage)
    pairs = 2 if self.config.data.mixup or self.config.data.cutmix else 1
    self.layout.check_batch_size(f"{stage}.batch_size", config.batch_size, config.parts, pairs)

  @functools.cached_property
  def preprocess(self) -> transforms.Preprocess:
    return self.spec.preprocess

  def _open(self, split: str) -> loader.Dataset:
    source = None if self.config.data.name == "fake" else self._source(split)
    seed, classes = self.config.seed, self.spec.num_classes or 1000
    return loader.load(
      self.config.data, split, self.preprocess, seed, classes, source, self._label_names
    )

  def _source(self, split: str) -> sources.Source:
    """Opens a split once: a folder may hold a million files."""
    if split not in self._sources:
      self._sources[split] = loader.open_source(self.config.data, split)
    return self._sources[split]


def for_timm(run: Run, layers: Sequence[LayerSpec], params: Params) -> tuple[Params, str]:
  """Parameters for timm's own model, and for which one they are.

  Raises:
    UserError: If timm's model cannot hold the network.
  """
  spec, indices = run.spec, run.plan.indices if run.plan else None
  if removes_tokens(layers):
    raise UserError("timm's VisionTransformer does not remove tokens")
  if not indices:
    return params, f"timm.safetensors is for timm's {spec.name}"
  found = timm_slimmed.arguments(indices, spec.width)
  if found is None:
    raise UserError("timm's VisionTransformer has the same widths in all layers")
  head_dim = found["attn_head_dim"]
  return (
    timm_slimmed.rescale(params, spec.width // spec.num_heads, head_dim),
    f"timm.safetensors is for timm's model with num_heads={found['num_heads']}, mlp_ratio="
    f"{found['mlp_ratio']}, attn_layer=a subclass of timm.layers.Attention with `__init__ = "
    f"functools.partialmethod(timm.layers.Attention.__init__, attn_head_dim={head_dim})`",
  )


def write_for_timm(run: Run, layers: Sequence[LayerSpec], params: Params) -> str:
  """Writes `timm.safetensors` if timm's own model can hold a slimmed network.

  Returns:
    How to load it, or why it was not written.
  """
  try:
    params, how = for_timm(run, layers, params)
  except UserError as why:
    return f"Not written for timm: {why}"
  run.save(params, run.workdir / "timm.safetensors")
  return how


def open_run(config: Config, workdir: pathlib.Path, running: Sequence[str] = ()) -> Run:
  """Opens a workdir to be resumed, or a new one, in which nothing is written yet.

  Raises:
    UserError: If another config made what is there.
  """
  path = workdir / "config.json"
  values = config_lib.to_dict(config)
  try:
    names = {entry.name for entry in workdir.iterdir()} if workdir.exists() else set()
  except OSError as error:
    raise UserError(f"--workdir {workdir}: cannot be read ({error.strerror}).") from error
  if path.name not in names and names & {"finished", "checkpoints"}:
    raise UserError(
      f"{workdir} holds a run whose config.json is gone; give another --workdir, or empty it."
    )
  if path.name in names:
    made_with = read_json(path).get("config")
    if not isinstance(made_with, dict):
      raise UserError(f"{path}: expected a run's config, got {reprlib.repr(made_with)}; remove it.")
    # A run may be given further stages, and then be called by its old name.
    before = made_with.get("stages")
    if before and all(map(operator.eq, before, values["stages"])):
      made_with = made_with | {"stages": values["stages"]}
    differing = config_lib.differing_keys(made_with, values)
    if differing:
      raise UserError(
        f"{workdir} was made with another config ({'; '.join(differing)}); give another --workdir, "
        "or the config it was made with."
      )
  return Run(config, workdir, tuple(running))


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object that a run has written.

  Raises:
    UserError: If it is something else by now.
  """
  try:
    values = strict_json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}); remove it.") from error
  if not isinstance(values, dict):
    raise UserError(f"{path}: expected a JSON object, got {reprlib.repr(values)}; remove it.")
  return values


def environment() -> dict[str, Any]:
  """Device and package versions, as they stand in config.json and result.json."""
  device = jax.devices()[0]
  return {
    "device": f"{len(jax.devices())} x {device.device_kind}",
    "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
  }


def _git_commit() -> str | None:
  """The commit of the code, where it runs from a checkout."""
  command = ["git", "rev-parse", "HEAD"]
  try:
    result = subprocess.run(
      command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False
    )
  except OSError:
    return None
  return result.stdout.strip() or None
