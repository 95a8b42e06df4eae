"""The configuration of a run: frozen dataclasses, one per part.

A config file's `get_config()` returns the `ConfigDict` of `default_config()` with some values
changed; `main` turns it into a `Config` once, and nothing after that can change it. The comment
behind a field is its documentation.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from vitcomp_jax.errors import UserError

STAGES = ("pretrain", "search", "evaluate")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  variant: str = "deit_small_patch16_224"  # timm's name; `vc.list_variants()` names all
  weights: str | None = None  # file, hub id `timm/…`, `bundled`, or none: random weights
  plan: str | None = None  # published plan's name or path of a plan.json, for `evaluate`
  num_classes: int | None = None  # none: as many as the data set has
  image_size: int | None = None  # pixels; none: the variant's
  dtype: str = "float32"  # of the computation: float32 or bfloat16; weights stay float32


@dataclasses.dataclass(frozen=True)
class DataConfig:
  name: str = "bundled"  # `bundled`, `folder`, `fake`, or a TFDS name such as `imagenet2012`
  dir: str | None = None  # the image folder, or TFDS's data_dir
  train_split: str = "train"  # a split's name; TFDS slices such as `train[:90%]` work
  eval_split: str | None = None  # none: `validation`, `val` or `test`, whichever is there
  train_examples: int | None = None  # use only this many training images (drawn by seed)
  eval_examples: int | None = None  # use only this many evaluation images (drawn by seed)
  pad: int = 0  # pixels of zeros added on every side before anything else
  crop_pct: float | None = None  # share of the resized image that is kept; none: the variant's
  augment: str = "none"  # of training images: `none`, `flip_shift` or `crop_flip`
  on_error: str = "stop"  # a corrupt image: `stop`, or `skip` and count
  workers: int = 2  # threads that decode images


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
  fraction: float | None = None  # of the dense model's MACs, in (0, 1]
  gmacs: float | None = None  # in 1e9 multiply-accumulates per image


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  epochs: float = 10.0  # passes over the training images
  batch_size: int = 128  # images per step, over all devices
  learning_rate: float = 1e-3  # at the peak
  min_learning_rate: float = 1e-5  # at the end of the cosine
  warmup_epochs: float = 1.0  # of linear warm-up
  weight_decay: float = 0.05  # of kernels; biases, norms, tokens and positions take none
  label_smoothing: float = 0.1  # share of the target spread over all classes
  drop_path: float = 0.0  # stochastic depth at the last layer, growing linearly from 0
  clip_norm: float | None = 1.0  # global norm of the gradient; none: not clipped
  ema: float | None = None  # decay of the averaged weights that are kept; none: the last ones
  log_every: int = 50  # steps
  checkpoint_every: int = 500  # steps


@dataclasses.dataclass(frozen=True)
class SearchConfig:
  method: str = "diffrate"  # what is searched
  steps: int = 300  # optimizer steps
  batch_size: int = 64  # images per step, over all devices
  learning_rate: float = 0.1  # of the rates (AdamW, no decay)
  min_learning_rate: float = 0.01  # at the end of the schedule
  schedule: str = "cosine"  # `cosine` per step, or `authors`: per epoch, one epoch late
  epoch_steps: int | None = None  # steps per epoch of `authors`; none: one pass over the images
  loss: str = "labels"  # `labels`, or the divergence from the dense model's `logits` or `features`
  label_smoothing: float = 0.0  # share of the target spread over all classes
  granularity: int = 1  # distance between neighbouring candidate counts
  init: str = "merge_first"  # where the rates start: `merge_first`, or the authors' `zeros`
  budget_weight: float = 5.0  # lambda of the budget term
  budget_scale: str = "relative"  # MACs in units of dense/4.6, or the authors' `gmacs`
  warmup_steps: int = 0  # steps without the budget term
  compress_first: bool = False  # may the first layer lose tokens
  compress_last: bool | None = (
    None  # none: as the authors, yes with a CLS head, no with average pool
  )
  clamp_size: bool = False  # the authors' clamp of sizes to 1, which deployment does not have
  signed_similarity: bool = False  # the authors' merge weight, which may be negative
  drop_path: float = 0.0  # stochastic depth while searching (authors: 0.1)
  log_every: int = 10  # steps
  checkpoint_every: int = 50  # steps


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  batch_size: int = 100  # images per step
  dense: bool = True  # a row for the dense model
  baselines: tuple[str, ...] = ()  # hand-made rows at the same MACs: `uniform`, `uniform_merge`
  token_maps: int = 4  # images in the token-map figure


@dataclasses.dataclass(frozen=True)
class Config:
  stages: tuple[str, ...] = ("evaluate",)  # run in this order
  seed: int = 0  # of everything random
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  budget: BudgetConfig = BudgetConfig()
  pretrain: TrainConfig = TrainConfig()
  search: SearchConfig = SearchConfig()
  evaluate: EvaluateConfig = EvaluateConfig()


def default_config() -> ml_collections.ConfigDict:
  """Every key with its default, for config files to change."""
  return _to_config_dict(Config)


def _to_config_dict(cls: type) -> ml_collections.ConfigDict:
  values: dict[str, Any] = {}
  for field in dataclasses.fields(cls):
    kind = _field_type(cls, field.name)
    if dataclasses.is_dataclass(kind):
      values[field.name] = _to_config_dict(typing.cast(type, kind))
    elif field.default is None:
      # A placeholder knows the type that an override must have.
      values[field.name] = ml_collections.config_dict.placeholder(_strip_none(kind))
    else:
      values[field.name] = field.default
  return ml_collections.ConfigDict(values)


def from_config_dict(values: Mapping[str, Any]) -> Config:
  """Turns a (possibly partial) mapping into a `Config`.

  Raises:
    UserError: For an unknown key (naming the nearest known one) or a value of the wrong type.
  """
  config = _from_mapping(Config, values, "")
  for stage in config.stages:
    if stage not in STAGES:
      raise UserError(f"config.stages: expected some of {STAGES}, got {stage!r}.")
  return config


def _from_mapping(cls: type, values: Mapping[str, Any], path: str) -> Any:
  known = {field.name: field for field in dataclasses.fields(cls)}
  result = {}
  for key in values:
    if key not in known:
      raise UserError(unknown_key(path + key))
    kind, value = _field_type(cls, key), values[key]
    if dataclasses.is_dataclass(kind):
      if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise UserError(f"config.{path}{key}: expected a group of keys, got {value!r}.")
      result[key] = _from_mapping(typing.cast(type, kind), value, f"{path}{key}.")
    else:
      result[key] = _checked(value, kind, path + key)
  return cls(**result)


def unknown_key(path: str) -> str:
  """The message for a key that does not exist, with the nearest one that does."""
  near = difflib.get_close_matches(path, all_keys(), n=1, cutoff=0.0)
  return f"config.{path} does not exist; did you mean config.{near[0]}?"


def all_keys(cls: type = Config, path: str = "") -> list[str]:
  """Dotted names of all keys."""
  keys = []
  for field in dataclasses.fields(cls):
    kind = _field_type(cls, field.name)
    keys += (
      all_keys(typing.cast(type, kind), f"{path}{field.name}.")
      if (dataclasses.is_dataclass(kind))
      else [path + field.name]
    )
  return keys


def _checked(value: Any, kind: Any, path: str) -> Any:
  """`value` as `kind`, or an error that names the key."""
  options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
  if types.NoneType in options and value in ("none", "None"):
    return None  # how a command line unsets what a config file sets
  for option in options:
    origin = typing.get_origin(option) or option
    if origin is tuple and isinstance(value, tuple | list):
      return tuple(_checked(v, typing.get_args(option)[0], path) for v in value)
    if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
      return float(value)
    if isinstance(value, origin) and (origin is bool or not isinstance(value, bool)):
      return value
  names = " or ".join(
    "none" if o is types.NoneType else str(getattr(o, "__name__", o)) for o in options
  )
  raise UserError(f"config.{path}: expected {names}, got {value!r}.")


def _field_type(cls: type, name: str) -> Any:
  return typing.get_type_hints(cls)[name]


def _strip_none(kind: Any) -> type:
  return next(t for t in typing.get_args(kind) if t is not types.NoneType)


def to_dict(config: Config) -> dict[str, Any]:
  """Nested plain values, as they stand in `config.json` (tuples become lists)."""
  return typing.cast(dict[str, Any], _listed(dataclasses.asdict(config)))


def _listed(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _listed(v) for k, v in value.items()}
  return [_listed(v) for v in value] if isinstance(value, tuple | list) else value


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
  """Dotted names of the keys whose values differ, each with both values."""
  lines = []
  for key in sorted(set(old) | set(new)):
    a, b = old.get(key), new.get(key)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += differing_keys(a, b, f"{path}{key}.")
    elif a != b:
      lines.append(f"config.{path}{key}: {a!r} there, {b!r} here")
  return lines
