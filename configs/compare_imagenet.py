"""Compares all methods at the budgets of DiffRate's published schedules, on ImageNet-1k.

  python -m vitcomp_jax.main --config configs/compare_imagenet.py:deit_small --config.data.dir=DIR

The model after the colon is `deit_small` (the default), `deit_base`, `mae_large` or `mae_huge`;
MAE's fine-tuned weights are `.pth` files from its authors. No model is trained: DiffRate's rates
are searched as in `configs/diffrate_vit*.py`, its authors' schedules have their own rows, and the
budget sets the strength of the other methods. This needs accelerators. Nothing was measured here;
published results are listed in those configs.
"""

import ml_collections

from vitcomp_jax.configs import common
from vitcomp_jax.cost import macs
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.plans import list_plans, load_plan

MODELS = {
  "deit_small": ("deit_small_patch16_224", "timm/deit_small_patch16_224.fb_in1k"),
  "deit_base": ("deit_base_patch16_224", "timm/deit_base_patch16_224.fb_in1k"),
  "mae_large": ("vit_large_patch16_224.mae", "mae_finetuned_vit_large.pth"),
  "mae_huge": ("vit_huge_patch14_224.mae", "mae_finetuned_vit_huge.pth"),
}


def get_config(model: str = "deit_small") -> ml_collections.ConfigDict:
  common.check_part(model, MODELS)
  plans = [name for name in list_plans() if name.startswith(f"diffrate/{model}@")]
  budgets = [load_plan(name).gmacs for name in plans]
  variant, weights = MODELS[model]
  spec = get_spec(variant)
  dense = macs.static_macs(spec, spec.dense_layers) / 1e9

  config = common.diffrate_imagenet(None, variant, weights, max(budgets))
  config.stages = ("compare",)
  config.compare.plans = tuple(plans)
  config.compare.budgets = tuple(round(gmacs / dense, 4) for gmacs in budgets)
  config.compare.methods = ("diffrate", "tome", "evit", "uniform", "uniform_merge")
  return config
