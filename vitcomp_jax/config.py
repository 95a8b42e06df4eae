"""The configuration of a run: frozen dataclasses, one per part.

A config file's `get_config()` returns the `ConfigDict` of `default_config()` with some values
changed; `main` converts it to an immutable `Config`. The comment after or above a field documents
it.
"""

import dataclasses
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
# `mean_attention_of_all` counts attention from masked tokens too, as in CAFormer's authors' code.
Importance = Literal[
  "auto", "cls", "pool_query", "mean_attention", "mean_attention_of_all", "value_norm", "random"
]

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
  # Name in timm, one of `vc.list_variants()`; none: the architecture that the weights specify.
  variant: str | None = "deit_small_patch16_224"
  weights: str | None = None  # file, folder, hub id, `bundled`, or none: random weights
  num_heads: Count | None = None  # set this and the next four if the weights do not specify them
  norm_eps: Positive | None = None  # epsilon of every norm
  activation: str | None = None  # one of gelu, gelu_tanh, quick_gelu, relu and silu
  pool: str | None = None  # one of cls, cls_dist, size_mean (the mean), cls_mean and map
  projection: bool | None = None  # whether the outputs are an embedding, like CLIP's, not logits
  plan: str | None = None  # published plan's name or path of a plan.json, for `evaluate`
  # Outputs of the classifier; none: the weights', or the data's for a new classifier.
  num_classes: CountOrZero | None = None
  image_size: Count | None = None  # side in pixels; none: the weights'
  antialias: bool | None = None  # antialias resampled position embeddings; none: as the authors do
  dtype: Literal["float32", "bfloat16"] = "float32"  # dtype to compute in; weights stay float32
  # XLA's own, or cuDNN's fused kernel (NVIDIA, bfloat16); auto: cuDNN's if available.
  attention: Literal["auto", "xla", "cudnn"] = "auto"


@dataclasses.dataclass(frozen=True)
class DataConfig:
  name: str = "bundled"  # `bundled`, `folder`, `fake`, or a TFDS name such as `imagenet2012`
  dir: str | None = None  # the image folder, or TFDS's data_dir
  train_split: str = "train"  # a split's name; TFDS slices such as `train[:90%]` work
  eval_split: str | None = None  # a split's name; none: first of `validation`, `val` and `test`
  # Halve a folder without `train` and `val`, to train and to evaluate on, unless splits are named.
  divide: bool = False
  train_examples: Count | None = None  # use only this many training images (drawn by seed)
  eval_examples: Count | None = None  # use only this many evaluation images (drawn by seed)
  # Names of the model's outputs, which class folders are matched with: a file with one name per
  # line, or `imagenet1k`; none: the weights' names, WordNet ids, or else the order of the folders.
  classes: str | None = None
  # If the class folders do not match the model's classes: `required` raises an error, `auto`
  # ignores the labels, with a warning.
  labels: Literal["required", "auto"] = "required"
  # Order of class folders that are not matched by name: `sorted` as in torchvision (1, 10, 2),
  # `natural` as in timm (1, 2, 10); none: sorted, with a warning if the two differ.
  class_order: Literal["sorted", "natural"] | None = None
  # Pixels of zeros to pad every side with first; none, here and for the next keys: the weights'.
  pad: CountOrZero | None = None
  # Share of the resized image's side that the crop keeps.
  crop_pct: Annotated[float, Range(above=0, most=1)] | None = None
  crop_mode: Literal["center", "squash", "border"] | None = None  # as in timm
  interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"] | None = None  # for resizing
  mean: tuple[Finite, ...] | None = None  # means of red, green and blue, in [0, 1]
  std: tuple[Positive, ...] | None = None  # standard deviations of red, green and blue
  # Rotate images by their EXIF tag, as viewers do; none: as in the weights' training (timm and
  # torchvision do not rotate).
  exif_orientation: bool | None = None
  # For training images: none, random flip and shift by 2 pixels, random crop and flip, or the
  # latter with RandAugment (m9, mstd0.5, inc1).
  augment: Literal["none", "flip_shift", "crop_flip", "rand_augment"] = "none"
  erase: Share = 0.0  # probability that a random box of a training image becomes noise (DeiT: 0.25)
  mixup: PositiveOrZero = 0.0  # alpha; 0: no mixup (DeiT: 0.8)
  cutmix: PositiveOrZero = 0.0  # alpha; 0: no cutmix (DeiT: 1)
  repeats: Count = 1  # augmentations of each image in the same batch (DeiT: 3)
  on_error: Literal["stop", "skip"] = "stop"  # what to do at a corrupt image; `skip` counts them
  workers: Count = 2  # threads that decode images


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
  """One of `fraction`, `fractions`, `gmacs` and `latency_ms`."""

  fraction: Finite | None = None  # fraction of the dense model's MACs, in (0, 1]
  # Several fractions in decreasing order; one search meets them in turn and makes a plan for each.
  fractions: tuple[Finite, ...] | None = None
  gmacs: Positive | None = None  # 1e9 multiply-accumulates per image
  latency_ms: Positive | None = None  # milliseconds per batch on the searching device; for `search`
  latency_batch: Count = 1  # images in the batch of `latency_ms`
  runtime: Literal["jax", "onnxruntime"] = "jax"  # runtime that `latency_ms` is measured with


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  epochs: Positive = 10.0  # passes over the training images
  batch_size: Count = 128  # images per step
  learning_rate: Positive = 1e-3  # peak learning rate
  min_learning_rate: PositiveOrZero = 1e-5  # learning rate at the end of the cosine schedule
  # Batch size that both rates are given for; they scale linearly with the actual one; none: fixed.
  learning_rate_for: Count | None = None
  warmup_epochs: PositiveOrZero = 1.0  # of linear warm-up
  weight_decay: PositiveOrZero = 0.05  # of kernels, not of biases, norms, tokens or positions
  label_smoothing: Share = 0.1  # share of the target spread over all classes
  drop_path: Rate = 0.0  # stochastic depth at the last layer, growing linearly from 0
  clip_norm: Positive | None = 1.0  # maximum global norm of the gradient; none: not clipped
  keep_rate_epochs: PositiveOrZero = 0.0  # epochs for EViT's keep rate to fall from 1 to the plan's
  ema: Rate | None = None  # decay of the averaged weights to save; none: save the last weights
  parts: Count = 1  # parts that a batch is processed in, one after the other, to save memory
  log_every: Count = 50  # steps between log entries
  checkpoint_every: Count = 500  # steps between checkpoints


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
  trains: Literal["all", "norms"] = "all"  # which weights to train; `norms` includes all biases


@dataclasses.dataclass(frozen=True)
class ViTSlimOptions:
  attn: Literal["dims", "heads", "uniform"] = "dims"  # unit of an attention mask
  w_attn: PositiveOrZero = 2e-4  # weight of the attention masks' L1 norm; 0: not searched
  w_mlp: PositiveOrZero = 5e-5  # weight of the L1 norm of the hidden units' masks
  w_patch: PositiveOrZero = 1e-4  # weight of the L1 norm of the patches' masks


@dataclasses.dataclass(frozen=True)
class SlimConfig(TrainConfig, ViTSlimOptions):
  # Learning rate of the masks; none: `learning_rate`, as in the authors' code.
  mask_learning_rate: Positive | None = None
  mask_weight_decay: PositiveOrZero = 0.0  # weight decay of the masks
  # Shares of attention masks, hidden units and patches to keep; none: one share for all searched
  # kinds, chosen to meet `config.budget`.
  budgets: tuple[Annotated[float, Range(above=0, most=1)], ...] | None = None
  min_units: CountOrZero = 0  # minimum head dimensions, hidden units and patches in each layer
  tile: Count = 1  # multiple to which head dimensions and hidden units are padded
  # Fold the learnt factors of kept units into the weights; false: set them to 1, as the authors do.
  keep_factors: bool = False
  freeze_weights: bool = False  # train masks and norms only
  # `masks.safetensors` of another run, to cut without a search; set `model.weights` to that run's
  # `searched.safetensors`. One search can thus serve any number of budgets.
  masks: str | None = None


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  # What to learn from the dense model: its softmax, its predicted class, or its pooled features.
  kind: Literal["none", "soft", "hard", "features"] = "none"
  weight: Share = 0.5  # share of distillation in the loss; labels get the rest; 1 needs no labels
  temperature: Positive = 1.0  # softmax temperature of `soft`
  tokens: PositiveOrZero = 0.0  # weight of the distance of DynamicViT's kept tokens to dense ones


@dataclasses.dataclass(frozen=True)
class DiffRateOptions:
  # `paper`: as in the authors' code (`methods/diffrate/recipe.py` lists the differences).
  recipe: Literal["ours", "paper"] = "ours"
  # What to search: token counts, widths (hidden units and head dimensions), or both.
  what: Literal["tokens", "widths", "both"] = "tokens"
  granularity: Count = 1  # distance between neighbouring candidate counts, with recipe=paper
  tile: Count = 1  # round the plan's counts, prefix included, up to multiples of this (8, 16)
  actions: Literal["both", "prune", "merge"] = "both"  # what a layer may do with its tokens
  # Importance metric of tokens: attention from CLS, from the pooling head's query (SigLIP) or from
  # all tokens, norm of the values, or random; auto: the first that the model supports, but a search
  # uses `mean_attention` (from all tokens) if its loss on the images is clearly lower.
  importance: Importance = "auto"
  # Lambda of the budget term; the authors use 5, but here a search must end on the budget.
  budget_weight: PositiveOrZero = 20.0
  warmup_steps: CountOrZero = 0  # first steps, which have no budget term
  compress_first: bool = False  # whether the first layer may remove tokens
  # Whether the last layer may remove tokens; none: with a CLS head, not a mean (as the authors).
  compress_last: bool | None = None


@dataclasses.dataclass(frozen=True)
class SearchConfig(DiffRateOptions):
  method: Literal["diffrate"] = "diffrate"  # search method
  steps: Count = 60  # optimizer steps
  batch_size: Count = 32  # images per step
  learning_rate: Positive = 0.02  # Adam's learning rate for the rates (shares of tokens or widths)
  min_learning_rate: PositiveOrZero = 0.002  # learning rate at the end of the schedule
  # Adam's decay of squared gradients; lower than the authors' 0.999, to forget the budget term's
  # large initial gradients soon.
  adam_b2: Rate = 0.95
  schedule: Literal["cosine", "authors"] = "cosine"  # decay per step, or per epoch, one epoch late
  epoch_steps: Count | None = None  # steps per epoch of `authors`; none: one pass over the images
  # Cross-entropy with the labels, or the divergence from the dense model's logits or features;
  # auto: logits, which need no labels, or features if there is no classifier; labels with
  # recipe=paper.
  loss: Literal["auto", "labels", "logits", "features"] = "auto"
  label_smoothing: Share = 0.0  # share of the target spread over all classes
  drop_path: Rate = 0.0  # stochastic depth while searching (authors: 0.1)
  remat: bool = False  # recompute activations in the backward pass, to save memory
  parts: Count = 1  # parts that a batch is processed in, one after the other, to save memory
  # Images to choose the plan with the least loss among those passed through; half of them also
  # choose the start. 0: the first start and the last plan, as always with recipe=paper.
  choose_images: CountOrZero = 256
  calibration_images: Count = 128  # images used to sort the widths
  log_every: Count = 10  # steps between log entries
  checkpoint_every: Count = 50  # steps between checkpoints


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  batch_size: Count = 100  # images per step
  dense: bool = True  # add a row for the dense model
  # Schedules without a search to add rows for, at the same MACs: uniform, linear, tome, evit, ...
  baselines: tuple[str, ...] = ()
  masked: bool = False  # add a row with cut units masked in the dense model, as the authors do
  before_finetune: bool = False  # add a row for the plan before `finetune`
  token_maps: CountOrZero = 4  # images in the token-map plot


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  batch_sizes: tuple[Count, ...] = (1, 8, 32)  # images per batch
  seconds: Positive = 10.0  # minimum time to measure per model and batch size
  rounds: Count = 10  # rounds in which all models take turns


@dataclasses.dataclass(frozen=True)
class CompareConfig:
  # `diffrate` (searched) and schedules without a search; `NAME[KEY=VALUE,...]` changes keys of
  # `search`, or dotted keys such as `data.train_examples`, for that row only.
  methods: tuple[str, ...] = ()
  plans: tuple[str, ...] = ()  # names or paths of plans to add rows for
  budgets: tuple[Share, ...] = (0.8, 0.65, 0.5)  # shares of the dense model's MACs
  seeds: Count = 1  # number of seeds per search
  searched: str | None = None  # folder with earlier plans for `methods`; none: search again
  finetuned: tuple[str, ...] = ()  # methods to train, including `vit_slim` and `dynamicvit`
  finetune_budgets: tuple[Share, ...] = (0.65,)  # shares of the dense model's MACs
  random_schedules: CountOrZero = 0  # number of random schedules per budget
  random_examples: Count = 2000  # number of first examples that random schedules are measured on


@dataclasses.dataclass(frozen=True)
class VisualizeConfig:
  images: CountOrZero = 2  # images whose tokens and attention are drawn
  layers: tuple[Count, ...] = ()  # layers after which to draw them, counted from 1; empty: up to 14
  plans: tuple[str, ...] = ()  # names or paths of plans to draw beside the run's
  published: bool = True  # draw published results beside measured ones, if there are any


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  formats: tuple[Literal["stablehlo", "onnx", "timm"], ...] = ("stablehlo",)  # formats to write
  # StableHLO's platforms
  platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = ("cpu", "cuda", "tpu")
  # Whether the model takes uint8 pixels and normalises them itself, or takes normalised floats.
  normalize: bool = True


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
  # State replicated on every device, sharded (`fsdp`), or replicated under `jax.pmap`.
  mode: Literal["data", "fsdp", "pmap"] = "data"
  devices: Count | None = None  # number of devices; none: all


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  steps: tuple[CountOrZero, ...] = ()  # first and last step of a trace, (10, 15); empty: no trace


@dataclasses.dataclass(frozen=True)
class Config:
  stages: tuple[Stage, ...] = ("evaluate",)  # stages to run, in this order
  seed: Annotated[int, Range(0, below=2**32)] = 0  # seed of all random numbers
  # Folder of `python -m vitcomp_jax.main`'s persistent compilation cache; none: no cache.
  compilation_cache: str | None = "~/.cache/vitcomp_jax/xla"
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  budget: BudgetConfig = BudgetConfig()
  pretrain: TrainConfig = TrainConfig()
  slim: SlimConfig = SlimConfig()
  search: SearchConfig = SearchConfig()
  finetune: FinetuneConfig = FinetuneConfig()
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
  """Converts a (possibly partial) mapping to a `Config`.

  Raises:
    UserError: For an unknown key (naming the nearest known one), or a value of the wrong type or
      out of range.
  """
  config = config_parsing.parse(Config, values)
  if not config.stages:
    raise UserError("config.stages: expected at least one stage, got none.")
  return config


def with_overrides(values: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
  """Sets keys from the text of a command line: Python literals, or else strings.

  Raises:
    UserError: For an unknown key (naming the nearest known one).
  """
  return config_parsing.with_overrides(Config, values, overrides)


def all_keys() -> list[str]:
  """Returns the dotted names of all keys."""
  return config_parsing.all_keys(Config)
