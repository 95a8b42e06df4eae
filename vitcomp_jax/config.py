"""The configuration of a run: frozen dataclasses, one per part.

A config file's `get_config()` returns the `ConfigDict` of `default_config()` with some values
changed; `main` converts it to an immutable `Config`. The comment after or above a field is its
documentation.
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
# `mean_attention_of_all` counts that of masked tokens too, as in CAFormer's authors' code.
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
  # timm's name, one of `vc.list_variants()`; none: what the weights say that they are.
  variant: str | None = "deit_small_patch16_224"
  weights: str | None = None  # file, folder, hub id, `bundled`, or none: random weights
  num_heads: Count | None = None  # this and the next four: where weights do not say it
  norm_eps: Positive | None = None  # of every norm
  activation: str | None = None  # gelu, gelu_tanh, quick_gelu, relu or silu
  pool: str | None = None  # cls, cls_dist, size_mean (the mean), cls_mean or map
  projection: bool | None = None  # whether the outputs are an embedding, as CLIP's, not logits
  plan: str | None = None  # published plan's name or path of a plan.json, for `evaluate`
  # Outputs of the classifier; none: the weights', or the data's for a new classifier.
  num_classes: CountOrZero | None = None
  image_size: Count | None = None  # pixels; none: the weights'
  antialias: bool | None = None  # of resampled position embeddings; none: as the variant's authors
  dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights stay float32
  # XLA's own, or cuDNN's fused kernel (NVIDIA, bfloat16); auto: cuDNN's if available.
  attention: Literal["auto", "xla", "cudnn"] = "auto"


@dataclasses.dataclass(frozen=True)
class DataConfig:
  name: str = "bundled"  # `bundled`, `folder`, `fake`, or a TFDS name such as `imagenet2012`
  dir: str | None = None  # the image folder, or TFDS's data_dir
  train_split: str = "train"  # a split's name; TFDS slices such as `train[:90%]` work
  eval_split: str | None = None  # none: the first of `validation`, `val` and `test`
  # Halve a folder that has no `train` and `val`, unless splits are named: to train, to evaluate.
  divide: bool = False
  train_examples: Count | None = None  # use only this many training images (drawn by seed)
  eval_examples: Count | None = None  # use only this many evaluation images (drawn by seed)
  # Names of the model's outputs, to match class folders with: a file, one name per line, or
  # `imagenet1k`; none: the weights' names, or WordNet ids, or else the order of the folders.
  classes: str | None = None
  # If the class folders do not match the model's classes: `required` is an error, `auto` leaves the
  # labels out, with a warning.
  labels: Literal["required", "auto"] = "required"
  # Order of class folders that are not matched by name: `sorted` as torchvision (1, 10, 2),
  # `natural` as timm (1, 2, 10); none: sorted, with a warning if the two differ.
  class_order: Literal["sorted", "natural"] | None = None
  # Pixels of zeros added on every side first; none here and for the next keys: the weights'.
  pad: CountOrZero | None = None
  # Share of the resized image that the crop keeps.
  crop_pct: Annotated[float, Range(above=0, most=1)] | None = None
  crop_mode: Literal["center", "squash", "border"] | None = None  # as timm's
  interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"] | None = None  # of resizing
  mean: tuple[Finite, ...] | None = None  # of red, green and blue, in [0, 1]
  std: tuple[Positive, ...] | None = None  # their standard deviations
  # Rotate images by their EXIF tag, as viewers do; none: as in the weights' training (timm and
  # torchvision do not rotate).
  exif_orientation: bool | None = None
  # Of training images: none, random flip and shift by 2 pixels, random crop and flip, or the latter
  # with RandAugment (m9, mstd0.5, inc1).
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
  # Several of these, falling: one search meets them in turn, and makes a plan for each.
  fractions: tuple[Finite, ...] | None = None
  gmacs: Positive | None = None  # in 1e9 multiply-accumulates per image
  latency_ms: Positive | None = None  # of a batch on the searching device; for `search` only
  latency_batch: Count = 1  # images in the batch of `latency_ms`
  runtime: Literal["jax", "onnxruntime"] = "jax"  # that `latency_ms` is measured with


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  epochs: Positive = 10.0  # passes over the training images
  batch_size: Count = 128  # images per step
  learning_rate: Positive = 1e-3  # at the peak
  min_learning_rate: PositiveOrZero = 1e-5  # at the end of the cosine
  # Images per step for which both rates are given; they scale linearly; none: not scaled.
  learning_rate_for: Count | None = None
  warmup_epochs: PositiveOrZero = 1.0  # of linear warm-up
  weight_decay: PositiveOrZero = 0.05  # of kernels; biases, norms, tokens and positions take none
  label_smoothing: Share = 0.1  # share of the target spread over all classes
  drop_path: Rate = 0.0  # stochastic depth at the last layer, growing linearly from 0
  clip_norm: Positive | None = 1.0  # global norm of the gradient; none: not clipped
  keep_rate_epochs: PositiveOrZero = 0.0  # over which EViT's keep rates fall from 1 to the plan's
  ema: Rate | None = None  # decay of the averaged weights to save; none: saves the last ones
  parts: Count = 1  # in which a batch is done one after the other, to save memory
  log_every: Count = 50  # steps
  checkpoint_every: Count = 500  # steps


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
  trains: Literal["all", "norms"] = "all"  # the weights that change; `norms`: and all biases


@dataclasses.dataclass(frozen=True)
class ViTSlimOptions:
  attn: Literal["dims", "heads", "uniform"] = "dims"  # unit of an attention mask
  w_attn: PositiveOrZero = 2e-4  # weight of the attention masks' L1 norm; 0: not searched
  w_mlp: PositiveOrZero = 5e-5  # weight of the L1 norm of the hidden units' masks
  w_patch: PositiveOrZero = 1e-4  # weight of the L1 norm of the patches' masks


@dataclasses.dataclass(frozen=True)
class SlimConfig(TrainConfig, ViTSlimOptions):
  # Of the masks; none: `learning_rate`, as the authors.
  mask_learning_rate: Positive | None = None
  mask_weight_decay: PositiveOrZero = 0.0  # of the masks
  # Shares of attention masks, hidden units and patches to keep; none: one share for all searched
  # kinds, chosen to meet `config.budget`.
  budgets: tuple[Annotated[float, Range(above=0, most=1)], ...] | None = None
  min_units: CountOrZero = 0  # least head dimensions, hidden units and patches in each layer
  tile: Count = 1  # multiple to which head dimensions and hidden units are padded
  # Fold the learnt factors of kept units into the weights; authors: they become 1.
  keep_factors: bool = False
  freeze_weights: bool = False  # train masks and norms only
  # masks.safetensors of another run, whose searched.safetensors is `model.weights`, to cut without
  # a search: one search serves any number of budgets.
  masks: str | None = None


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  # From the dense model's softmax, its class, or its pooled features.
  kind: Literal["none", "soft", "hard", "features"] = "none"
  weight: Share = 0.5  # of the distillation loss; the rest is the labels', which 1 does without
  temperature: Positive = 1.0  # of `soft`
  tokens: PositiveOrZero = 0.0  # of the distance of DynamicViT's kept tokens from the dense ones


@dataclasses.dataclass(frozen=True)
class DiffRateOptions:
  # `paper`: as the authors' code (`methods/diffrate/recipe.py` lists the differences).
  recipe: Literal["ours", "paper"] = "ours"
  # What is searched: counts of tokens, widths (hidden units, dimensions of heads), or both.
  what: Literal["tokens", "widths", "both"] = "tokens"
  granularity: Count = 1  # distance between neighbouring candidate counts, with recipe=paper
  tile: Count = 1  # the plan's counts are rounded up to multiples of it (8, 16), prefix included
  actions: Literal["both", "prune", "merge"] = "both"  # what a layer may do with its tokens
  # Importance metric of tokens: attention of CLS, of the pooling head's query (SigLIP) or of all
  # tokens, norm of the values, or random; auto: the first that the model supports, or for a search
  # that of all tokens (`mean_attention`) where it loses clearly less on the images.
  importance: Importance = "auto"
  # Lambda of the budget term, 5 for the authors; here a search has to end on the budget.
  budget_weight: PositiveOrZero = 20.0
  warmup_steps: CountOrZero = 0  # steps without the budget term
  compress_first: bool = False  # whether the first layer may remove tokens
  compress_last: bool | None = None  # none: as the authors, true with a CLS head, false with a mean


@dataclasses.dataclass(frozen=True)
class SearchConfig(DiffRateOptions):
  method: Literal["diffrate"] = "diffrate"  # search method
  steps: Count = 60  # optimizer steps
  batch_size: Count = 32  # images per step
  learning_rate: Positive = 0.02  # of the rates (Adam), which are shares of tokens or widths
  min_learning_rate: PositiveOrZero = 0.002  # at the end of the schedule
  # Adam's decay of squared gradients; lower than the authors' 0.999, to forget the budget term's
  # large first gradients soon.
  adam_b2: Rate = 0.95
  schedule: Literal["cosine", "authors"] = "cosine"  # per step, or per epoch and one epoch late
  epoch_steps: Count | None = None  # steps per epoch of `authors`; none: one pass over the images
  # Cross-entropy with the labels, or the divergence from the dense model's logits or features;
  # auto: logits, which need no labels, or features where there is no classifier; labels with
  # recipe=paper.
  loss: Literal["auto", "labels", "logits", "features"] = "auto"
  label_smoothing: Share = 0.0  # share of the target spread over all classes
  drop_path: Rate = 0.0  # stochastic depth while searching (authors: 0.1)
  remat: bool = False  # recompute activations in the backward pass, to save memory
  parts: Count = 1  # in which a batch is done one after the other, to save memory
  # Images on which to choose the plan with the least loss among those passed through, and with half
  # of them where to start; 0: the first start and the last plan, as always with recipe=paper.
  choose_images: CountOrZero = 256
  calibration_images: Count = 128  # on which widths are sorted
  log_every: Count = 10  # steps
  checkpoint_every: Count = 50  # steps


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  batch_size: Count = 100  # images per step
  dense: bool = True  # a row for the dense model
  # Rows for schedules without a search, at the same MACs: uniform, linear, tome, evit, ...
  baselines: tuple[str, ...] = ()
  masked: bool = False  # a row with cut units masked in the dense model, as the authors
  before_finetune: bool = False  # a row for the plan before `finetune`
  token_maps: CountOrZero = 4  # images in the token-map plot


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  batch_sizes: tuple[Count, ...] = (1, 8, 32)  # images per batch
  seconds: Positive = 10.0  # least timing per model and batch size
  rounds: Count = 10  # in which all models take turns


@dataclasses.dataclass(frozen=True)
class CompareConfig:
  # `diffrate` (searched) and schedules without a search; `NAME[KEY=VALUE,...]` changes keys of
  # `search`, or dotted keys such as `data.train_examples`, for that row only.
  methods: tuple[str, ...] = ()
  plans: tuple[str, ...] = ()  # names or paths of plans to add rows for
  budgets: tuple[Share, ...] = (0.8, 0.65, 0.5)  # of the dense model's MACs
  seeds: Count = 1  # of each search
  searched: str | None = None  # folder with an earlier comparison's plans; none: searches
  finetuned: tuple[str, ...] = ()  # methods to train, including `vit_slim` and `dynamicvit`
  finetune_budgets: tuple[Share, ...] = (0.65,)  # of the dense model's MACs
  random_schedules: CountOrZero = 0  # for each budget
  random_examples: Count = 2000  # number of first examples on which these are measured


@dataclasses.dataclass(frozen=True)
class VisualizeConfig:
  images: CountOrZero = 2  # images whose tokens and attention are drawn
  layers: tuple[Count, ...] = ()  # layers after which they are drawn, from 1; empty: up to 14
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
  steps: tuple[CountOrZero, ...] = ()  # first and last step of a trace, as (10, 15); empty: none


@dataclasses.dataclass(frozen=True)
class Config:
  stages: tuple[Stage, ...] = ("evaluate",)  # run in this order
  seed: Annotated[int, Range(0, below=2**32)] = 0  # seed of everything random
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
      out of its range.
  """
  config = config_parsing.parse(Config, values)
  if not config.stages:
    raise UserError("config.stages: expected at least one stage, got none.")
  return config


def with_overrides(values: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
  """Sets keys from a command line's text: Python literals, or else strings.

  Raises:
    UserError: For an unknown key (naming the nearest known one).
  """
  return config_parsing.with_overrides(Config, values, overrides)


def all_keys() -> list[str]:
  """Returns the dotted names of all keys."""
  return config_parsing.all_keys(Config)
