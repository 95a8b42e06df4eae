"""The current plan and weights: made by stages in this workdir, or given by the config."""

import dataclasses
import functools
import logging
import pathlib

from vitcomp_jax.config import Config
from vitcomp_jax.models.spec import LayerSpec
from vitcomp_jax.plans import Plan, load_plan
from vitcomp_jax.results import SearchResult
from vitcomp_jax.runs.inputs import Inputs
from vitcomp_jax.runs.workdir import Workdir
from vitcomp_jax.weights import loading
from vitcomp_jax.weights.loading import Params


@dataclasses.dataclass(frozen=True)
class Artefacts:
  """The current plan and weights, each read once.

  Stages replace some of them, so every stage gets a new object (`Run.reread`), and a stage never
  reads its own artefacts from it.

  Attributes:
    config: Config of the run.
    workdir: Workdir of the run.
    inputs: Inputs of the run.
  """

  config: Config
  workdir: Workdir
  inputs: Inputs

  @functools.cached_property
  def plan(self) -> Plan | None:
    """Returns the last plan made in this workdir, or else the config's; None for a dense model."""
    if self.workdir.is_finished("search") or self.workdir.is_finished("slim"):
      return load_plan(str(self.workdir.path / "plan.json"))
    return self._plan_of_config

  @functools.cached_property
  def front(self) -> dict[float, Plan]:
    """Returns the plans of a search for several budgets, by share of the dense model's MACs."""
    search = self.workdir.finished("search", SearchResult)
    if search is None or not search.front:
      return {}
    folder, shares = self.workdir.path / "plans", self.config.budget.fractions or ()
    plans = [load_plan(str(folder / f"{found.plan}.json")) for found in search.front]
    return dict(zip(shares, plans, strict=True))

  @functools.cached_property
  def base_plan(self) -> Plan | None:
    """Returns the plan that a search starts from: this workdir's slimmed one, or the config's."""
    made_here = self.workdir.path / "slimmed.json"
    return load_plan(str(made_here)) if made_here.exists() else self._plan_of_config

  @property
  def _plan_of_config(self) -> Plan | None:
    return load_plan(self.config.model.plan) if self.config.model.plan else None

  @functools.cached_property
  def layers(self) -> tuple[LayerSpec, ...]:
    """Returns the layers under the current plan."""
    spec = self.inputs.spec
    return self.plan.layers_for(spec) if self.plan else spec.dense_layers

  @functools.cached_property
  def params(self) -> Params:
    """Returns the weights for `layers`: the latest ones in this workdir, or the config's."""
    finetuned = self.workdir.path / "finetuned.safetensors"
    if not finetuned.exists():
      return self.params_before_finetune
    return self._load(self.layers, str(finetuned))

  @functools.cached_property
  def params_before_finetune(self) -> Params:
    """Returns the weights for `layers` that `finetune` starts from: slimmed or dense ones."""
    slimmed = str(self.workdir.path / "slimmed.safetensors")
    is_slimmed = self.workdir.is_finished("slim") or self._has_searched_widths
    weights = slimmed if is_slimmed else self._dense_weights
    return self._load(self.layers, weights)

  @property
  def _has_searched_widths(self) -> bool:
    is_searched = self.workdir.is_finished("search")
    return is_searched and self.plan is not None and self.plan.has_own_widths

  @functools.cached_property
  def dense_params(self) -> Params:
    """Returns the dense model's weights: those of `pretrain` in this workdir, or the config's."""
    return self._load(self.inputs.spec.dense_layers, self._dense_weights)

  @functools.cached_property
  def searched_params(self) -> Params:
    """Returns the dense model's weights after `slim` trained them together with the masks."""
    searched = str(self.workdir.path / "searched.safetensors")
    return self._load(self.inputs.spec.dense_layers, searched)

  @property
  def _dense_weights(self) -> str | None:
    made_here = self.workdir.path / "weights.safetensors"
    return str(made_here) if made_here.exists() else self.config.model.weights

  def _load(self, layers: tuple[LayerSpec, ...], weights: str | None) -> Params:
    if weights is None:
      logging.warning("config.model.weights is none: the weights are random")
    head_is_new = self.inputs.names.head_is_new and not self.workdir.is_finished("pretrain")
    is_dense = layers == self.inputs.spec.dense_layers
    indices = self.plan.indices if self.plan and not is_dense else None
    trains = "finetune" in self.config.stages and not self.workdir.is_finished("finetune")
    return loading.load_params(
      self.inputs.named_spec,
      layers,
      weights,
      self.config.seed,
      fresh_head=head_is_new,
      indices=indices,
      fresh_predictors=trains,
    )

  def save(self, params: Params, path: str | pathlib.Path) -> None:
    """Writes weights under timm's names, with the model's classes and preprocessing."""
    loading.save_params(self.inputs.named_spec, params, path)

  def check_weights(self) -> None:
    """Rejects weights that do not fit the current layers."""
    _ = self.params

  def check_dense_weights(self) -> None:
    """Rejects weights that do not fit the dense model."""
    _ = self.dense_params
