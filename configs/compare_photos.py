"""Compares methods on a real DeiT-Ti with 2,000 photos of ImageNet's classes, on a CPU.

  python -m vitcomp_jax.main --config configs/compare_photos.py:budgets --config.data.dir=DIR

`DIR` holds the photos as a TFDS data set, `in1k_photos`: `train` has one photo of each of the 1,000
classes (`EliSchwartz/imagenet-sample-images`), for searching, and `validation` has the 1,000 photos
of the NIPS 2017 competition's development set, for evaluation. They are 224 pixels wide. With
`--config.data.name=folder`, `DIR` is an image folder instead, with `train/WNID/*.jpg` and
`val/WNID/*.jpg`. The weights are timm's, from the Hugging Face hub. The part after the colon is one
of

- `budgets`, the default: searches of tokens, of widths and of both, ToMe, and the published plans,
  at the costs of these plans and at 0.5 and 0.4 GMACs; the norms and biases of the models found are
  then tuned on the same photos to match the dense model's features, without labels;
- `off_the_shelf`: the search of tokens and hand-made schedules at the same costs; with
  `--config.compare.searched=configs/plans/photos` it takes the plans that were found before;
- `random`: the search of tokens among 300 random schedules for each of two budgets, on 500 photos;
- `ablation`: importance, actions, loss, steps and number of photos, at 65 % of the MACs;
- `tuning`: the split on which settings were chosen: 800 photos of `train` for searching, and the
  other 200 for evaluation.

An interrupted comparison is resumed, and rows can be added to a finished one. The results are in
`docs/results.md`.
"""

import ml_collections

from vitcomp_jax.config import default_config
from vitcomp_jax.configs import common
from vitcomp_jax.cost import macs
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.plans import load_plan

PARTS = ("budgets", "off_the_shelf", "random", "ablation", "tuning")
PLANS = tuple(f"diffrate/deit_tiny@{name}" for name in ("0.9", "0.8", "0.7", "0.6"))


def get_config(part: str = "budgets") -> ml_collections.ConfigDict:
  common.check_part(part, PARTS)
  config = default_config()
  config.stages = ("compare",)
  config.model.variant = "deit_tiny_patch16_224"
  config.model.weights = "timm/deit_tiny_patch16_224.fb_in1k"
  config.data.name = "in1k_photos"
  config.data.crop_pct = 1.0
  config.evaluate.batch_size = 50
  if part == "tuning":
    config.data.train_split, config.data.eval_split = "train[:800]", "train[800:]"

  spec = get_spec(config.model.variant)
  dense = macs.static_macs(spec, spec.dense_layers) / 1e9
  published = tuple(round(load_plan(name).gmacs / dense, 4) for name in PLANS)
  least = tuple(round(gmacs / dense, 4) for gmacs in (0.5, 0.4))
  compare = config.compare
  if part == "budgets":
    compare.plans = PLANS
    compare.budgets = (*published, *least)
    compare.methods = ("diffrate", "diffrate[what=widths]", "diffrate[what=both]", "tome")
    compare.finetuned = compare.methods[:3]
    compare.finetune_budgets = compare.budgets
  elif part == "off_the_shelf":
    compare.plans = PLANS
    compare.budgets = (*published, *least)
    compare.methods = ("diffrate", "tome", "evit", "uniform", "uniform_merge", "linear_merge")
    compare.methods += ("linear", "random")
  elif part == "random":
    compare.budgets = published[1::2]
    compare.methods = ("diffrate",)
    compare.random_schedules, compare.random_examples = 300, 500
  elif part == "ablation":
    compare.budgets = (published[1],)
    compare.methods = (
      "diffrate",
      *(f"diffrate[importance={name}]" for name in ("mean_attention", "value_norm", "random")),
      *(f"diffrate[actions={name}]" for name in ("prune", "merge")),
      "diffrate[loss=labels]",
      *(f"diffrate[steps={count}]" for count in (15, 30, 100, 200)),
      *(f"diffrate[data.train_examples={count}]" for count in (100, 300)),
    )
  else:
    compare.plans = PLANS[1::2]
    compare.budgets = (published[3],)
    compare.methods = (
      "diffrate",
      *(f"diffrate[steps={count}]" for count in (30, 100)),
      "diffrate[what=both]",
    )

  # To recover from the cuts, norms and biases are trained to follow the dense model's features.
  training = config.finetune
  training.trains = "norms"
  training.epochs, training.batch_size = 3.0, 32
  training.learning_rate, training.warmup_epochs = 1e-3, 0.2
  training.weight_decay = 0.0
  config.distill.kind, config.distill.weight = "features", 1.0
  return config
