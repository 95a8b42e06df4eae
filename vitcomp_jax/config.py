"""The configuration of a run: frozen dataclasses, one per part.

A config file's `get_config()` returns the `ConfigDict` of `default_config()` with some values
changed; `main` turns it into a `Config` once, and nothing after that can change it. The comment
behind or above a field is its documentation.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import ml_collections

from vitcomp_jax import config_parsing
from vitcomp_jax.config_parsing import Range
from vitcomp_jax.errors import UserError

Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(above=0)]
PositiveOrZero = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, most=1)]
Rate = Annotated[float, Range(0, below=1)]

Loss = Literal["labels", "logits", "features"]

Stage = Literal[
  "pretrain",
  "slim",
  "search",
  "finetune",
  "evaluate",
  "benchmark",
  "compare",
  "visualize",
  "export",
]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  # Name, as timm's, `vc.list_variants()` names all; none: what the weights say that they are.
  variant: str | None = "deit_small_patch16_224"
  weights: str | None = None  # file, hub id `timm/…`, `bundled`, or none: random weights
  plan: str | None = None  # published plan's name or path of a plan.json, for `evaluate`
  # Outputs of the classifier; none: the weights', or the data's for one that is trained anew.
  num_classes: CountOrZero | None = None
  image_size: Count | None = None  # pixels; none: the weights'
  antialias: bool | None = None  # of resampled position embeddings; none: as the variant's origin
  dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights stay float32
  # XLA's own, or cuDNN's fused kernel (NVIDIA, bfloat16); auto: cuDNN's where it can be had.
  attention: Literal["auto", "xla", "cudnn"] = "auto"


@dataclasses.dataclass(frozen=True)
class DataConfig:
  name: str = "bundled"  # `bundled`, `folder`, `fake`, or a TFDS name such as `imagenet2012`
  dir: str | None = None  # the image folder, or TFDS's data_dir
  train_split: str = "train"  # a split's name; TFDS slices such as `train[:90%]` work
  eval_split: str | None = None  # none: `validation`, `val` or `test`, whichever is there
  # A folder without `train` and `val`: half of its images to train on, the others to evaluate on.
  divide: bool = False
  train_examples: Count | None = None  # use only this many training images (drawn by seed)
  eval_examples: Count | None = None  # use only this many evaluation images (drawn by seed)
  # Names of the model's outputs, which say what a class folder is: a file, one name per line, or
  # `imagenet1k`; none: the weights' own names, or WordNet ids, or else the order of the folders.
  classes: str | None = None
  # `auto`: where the class folders do not match the model's classes, images have no labels, and a
  # warning says so; otherwise that is refused.
  labels: Literal["required", "auto"] = "required"
  # Of class folders where no names say more: `sorted` as torchvision (1, 10, 2), `natural` as timm
  # (1, 2, 10); none: sorted, with a warning where the two differ.
  class_order: Literal["sorted", "natural"] | None = None
  # Pixels of zeros added on every side before anything else; none: the weights'. So are the next.
  pad: CountOrZero | None = None
  # Share of the resized image that is kept.
  crop_pct: Annotated[float, Range(above=0, most=1)] | None = None
  crop_mode: Literal["center", "squash", "border"] | None = None  # as timm's
  interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"] | None = None  # of resizing
  mean: tuple[Finite, ...] | None = None  # of red, green and blue, which are in [0, 1]
  std: tuple[Positive, ...] | None = None  # their standard deviations
  # Turn images as their EXIF tag says, as viewers do; none: as for the weights' training (timm and
  # torchvision leave them as stored).
  exif_orientation: bool | None = None
  # Of training images: nothing, mirrored and moved by 2 pixels, a random crop mirrored, or that and
  # RandAugment (m9, mstd0.5, inc1).
  augment: Literal["none", "flip_shift", "crop_flip", "rand_augment"] = "none"
  erase: Share = 0.0  # probability that a random box of a training image becomes noise (DeiT: 0.25)
  mixup: PositiveOrZero = 0.0  # alpha; 0: none (DeiT: 0.8)
  cutmix: PositiveOrZero = 0.0  # alpha; 0: none (DeiT: 1)
  repeats: Count = 1  # augmentations of an image that share a batch (DeiT: 3)
  on_error: Literal["stop", "skip"] = "stop"  # at a corrupt image; `skip` counts them
  workers: Count = 2  # threads that decode images


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
  """One of `fraction`, `fractions`, `gmacs` and `latency_ms`."""

  fraction: Finite | None = None  # of the dense model's MACs, in (0, 1]
  # The same, falling: one search walks down all of them, and makes a plan for each.
  fractions: tuple[Finite, ...] | None = None
  gmacs: Positive | None = None  # in 1e9 multiply-accumulates per image
  latency_ms: Positive | None = None  # of a batch on the device that searches; for `search` alone
  latency_batch: Count = 1  # images in that batch


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  epochs: Positive = 10.0  # passes over the training images
  batch_size: Count = 128  # images per step
  learning_rate: Positive = 1e-3  # at the peak
  min_learning_rate: PositiveOrZero = 1e-5  # at the end of the cosine
  # Images per step that both rates are given for, and scale linearly from; none: not scaled.
  learning_rate_for: Count | None = None
  warmup_epochs: PositiveOrZero = 1.0  # of linear warm-up
  weight_decay: PositiveOrZero = 0.05  # of kernels; biases, norms, tokens and positions take none
  label_smoothing: Share = 0.1  # share of the target spread over all classes
  drop_path: Rate = 0.0  # stochastic depth at the last layer, growing linearly from 0
  clip_norm: Positive | None = 1.0  # global norm of the gradient; none: not clipped
  keep_rate_epochs: PositiveOrZero = 0.0  # in which EViT's keep rates fall from 1 to the plan's
  ema: Rate | None = None  # decay of the averaged weights that are kept; none: the last ones
  parts: Count = 1  # in which a batch is done one after the other, to save memory
  log_every: Count = 50  # steps
  checkpoint_every: Count = 500  # steps


@dataclasses.dataclass(frozen=True)
class ViTSlimOptions:
  attn: Literal["dims", "heads", "uniform"] = "dims"  # what a mask of the attention stands for
  w_attn: PositiveOrZero = 2e-4  # weight of the attention masks' L1 norm; 0: not searched
  w_mlp: PositiveOrZero = 5e-5  # weight of the L1 norm of the hidden units' masks
  w_patch: PositiveOrZero = 1e-4  # weight of the L1 norm of the patches' masks


@dataclasses.dataclass(frozen=True)
class SlimConfig(TrainConfig, ViTSlimOptions):
  # The masks' own; none: `learning_rate`, as the authors.
  mask_learning_rate: Positive | None = None
  mask_weight_decay: PositiveOrZero = 0.0  # of the masks
  # Shares of attention masks, hidden units and patches to keep; none: one share for all that are
  # searched, such that `config.budget` is met.
  budgets: tuple[Annotated[float, Range(above=0, most=1)], ...] | None = None
  min_units: CountOrZero = 0  # head dimensions, hidden units and patches each layer keeps at least
  tile: Count = 1  # head dimensions and hidden units are filled up to a multiple of it
  # What is kept keeps its learnt factor, as part of the weights; authors: the factor becomes 1.
  keep_factors: bool = False
  freeze_weights: bool = False  # train masks and norms only
  # masks.safetensors of another run, whose searched.safetensors is `model.weights`; then nothing is
  # searched, only cut: one search serves any number of budgets.
  masks: str | None = None


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  kind: Literal["none", "soft", "hard"] = "none"  # from the dense model's prediction, or its class
  weight: Share = 0.5  # of the distillation loss; the rest is the labels'
  temperature: Positive = 1.0  # of `soft`
  tokens: PositiveOrZero = 0.0  # of DynamicViT's kept tokens' distance from the dense model's


@dataclasses.dataclass(frozen=True)
class DiffRateOptions:
  # `paper`: the authors' code, quirks included (`methods/diffrate/recipe.py` lists them).
  recipe: Literal["ours", "paper"] = "ours"
  granularity: Count = 1  # distance between neighbouring candidate counts
  tile: Count = 1  # the plan's counts are rounded up to multiples of it (8, 16), prefix included
  actions: Literal["both", "prune", "merge"] = "both"  # what a layer may do with its tokens
  # What tells the important tokens: the attention of CLS, of the pooling head's query (SigLIP) or
  # of all, the values, or chance; auto: the first of these that the model has.
  importance: Literal[
    "auto",
    "cls",
    "pool_query",
    "mean_attention",
    "mean_attention_of_all",  # CAFormer's authors: the attention of masked tokens too
    "value_norm",
    "random",
  ] = "auto"
  init: Literal["merge_first", "zeros"] = "merge_first"  # where the rates start; authors: `zeros`
  budget_weight: PositiveOrZero = 5.0  # lambda of the budget term
  warmup_steps: CountOrZero = 0  # steps without the budget term
  compress_first: bool = False  # may the first layer lose tokens
  compress_last: bool | None = None  # none: as the authors, yes with a CLS head, no with a mean


@dataclasses.dataclass(frozen=True)
class SearchConfig(DiffRateOptions):
  method: Literal["diffrate"] = "diffrate"  # what is searched
  steps: Count = 300  # optimizer steps
  batch_size: Count = 64  # images per step
  learning_rate: Positive = 0.1  # of the rates (Adam)
  min_learning_rate: PositiveOrZero = 0.01  # at the end of the schedule
  # Adam's memory of squared gradients; the budget's, large at first, must be forgotten soon
  # (authors: 0.999).
  adam_b2: Rate = 0.95
  schedule: Literal["cosine", "authors"] = "cosine"  # per step, or per epoch and one epoch late
  epoch_steps: Count | None = None  # steps per epoch of `authors`; none: one pass over the images
  # Cross-entropy with the labels, or the divergence from the dense model's logits or features;
  # auto: the first of these that data and model allow.
  loss: Literal["auto", "labels", "logits", "features"] = "labels"
  label_smoothing: Share = 0.0  # share of the target spread over all classes
  drop_path: Rate = 0.0  # stochastic depth while searching (authors: 0.1)
  remat: bool = False  # compute activations again in the backward pass, to save memory
  parts: Count = 1  # in which a batch is done one after the other, to save memory
  # The plan with the least loss on so many images, of those passed through, is kept; 0: the last.
  choose_images: CountOrZero = 1024
  log_every: Count = 10  # steps
  checkpoint_every: Count = 50  # steps


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  batch_size: Count = 100  # images per step
  dense: bool = True  # a row for the dense model
  # Rows for schedules without a search, at the same MACs: uniform, linear, tome, evit, ...
  baselines: tuple[str, ...] = ()
  masked: bool = False  # a row with what `slim` cut masked in the dense model, the authors' way
  before_finetune: bool = False  # a row for the plan before `finetune`
  token_maps: CountOrZero = 4  # images in the token-map figure


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  batch_sizes: tuple[Count, ...] = (1, 8, 32)  # images at once
  seconds: Positive = 10.0  # of timing, for each model and batch size, at least
  rounds: Count = 10  # in which all take turns


@dataclasses.dataclass(frozen=True)
class CompareConfig:
  # `diffrate` (searched) and schedules without a search; `NAME[KEY=VALUE,...]` changes keys of
  # `search`, or, named in full as in `data.train_examples`, any other, for that row alone.
  methods: tuple[str, ...] = ()
  plans: tuple[str, ...] = ()  # names or paths of plans that have rows of their own
  budgets: tuple[Share, ...] = (0.8, 0.65, 0.5)  # of the dense model's MACs
  seeds: Count = 1  # of each search
  searched: str | None = None  # a folder with an earlier comparison's plans; none: searches anew
  finetuned: tuple[str, ...] = ()  # methods that are trained, `vit_slim` and `dynamicvit` too
  finetune_budget: Share = 0.65  # of the dense model's MACs
  random_schedules: CountOrZero = 0  # for each budget
  random_examples: Count = 2000  # on which these are measured: the first ones


@dataclasses.dataclass(frozen=True)
class VisualizeConfig:
  images: CountOrZero = 2  # whose tokens and attention are drawn
  layers: tuple[Count, ...] = ()  # after which they are drawn, from 1; empty: up to 14
  plans: tuple[str, ...] = ()  # names or paths of plans to draw beside the run's own
  published: bool = True  # draw published figures beside measured ones, where there are some


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  formats: tuple[Literal["stablehlo", "onnx", "timm"], ...] = ("stablehlo",)  # what is written
  platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = (
    "cpu",
    "cuda",
    "tpu",
  )  # StableHLO's platforms
  # The model takes uint8 pixels and scales them itself; otherwise normalised floats.
  normalize: bool = True


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
  # The whole state on every device, the state cut up too, or as the first under `jax.pmap`.
  mode: Literal["data", "fsdp", "pmap"] = "data"
  devices: Count | None = None  # how many are used; none: all


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  steps: tuple[CountOrZero, ...] = ()  # first and last step of a trace, as (10, 15); empty: none


@dataclasses.dataclass(frozen=True)
class Config:
  stages: tuple[Stage, ...] = ("evaluate",)  # run in this order
  seed: Annotated[int, Range(0, below=2**32)] = 0  # seed of everything random
  # Where `python -m vitcomp_jax.main` keeps compiled programs for the next time; none: nowhere.
  compilation_cache: str | None = "~/.cache/vitcomp_jax/xla"
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  budget: BudgetConfig = BudgetConfig()
  pretrain: TrainConfig = TrainConfig()
  slim: SlimConfig = SlimConfig()
  search: SearchConfig = SearchConfig()
  finetune: TrainConfig = TrainConfig()
  distill: DistillConfig = DistillConfig()
  evaluate: EvaluateConfig = EvaluateConfig()
  benchmark: BenchmarkConfig = BenchmarkConfig()
  compare: CompareConfig = CompareConfig()
  visualize: VisualizeConfig = VisualizeConfig()
  export: ExportConfig = ExportConfig()
  parallel: ParallelConfig = ParallelConfig()
  profile: ProfileConfig = ProfileConfig()


def default_config() -> ml_collections.ConfigDict:
  """Returns every key with its default, for config files to change.

  Examples:
    >>> import vitcomp_jax as vc
    >>> config = vc.default_config()
    >>> config.budget.fraction = 0.65
    >>> config.stages
    ('evaluate',)
  """
  return config_parsing.defaults(Config)


def from_config_dict(values: Mapping[str, Any]) -> Config:
  """Turns a (possibly partial) mapping into a `Config`.

  Raises:
    UserError: For an unknown key (naming the nearest known one), or a value of the wrong type or
      out of its range.
  """
  config = config_parsing.parse(Config, values)
  if not config.stages:
    raise UserError("config.stages: expected at least one stage, got none.")
  return config


def with_overrides(values: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
  """Sets keys from a command line's text: Python literals, or strings as they are.

  Raises:
    UserError: For an unknown key (naming the nearest known one).
  """
  return config_parsing.with_overrides(Config, values, overrides)


def all_keys() -> list[str]:
  """Returns the dotted names of all keys."""
  return config_parsing.all_keys(Config)


def to_dict(config: Config) -> dict[str, Any]:
  """Returns nested plain values, as they stand in `config.json` (tuples become lists)."""
  return typing.cast(dict[str, Any], _listed(dataclasses.asdict(config)))


def _listed(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _listed(v) for k, v in value.items()}
  return [_listed(v) for v in value] if isinstance(value, tuple | list) else value
