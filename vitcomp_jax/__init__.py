"""vitcomp_jax: makes a Vision Transformer smaller and faster at a budget you choose.

`import vitcomp_jax as vc`, then `vc.load`, `vc.apply`, `vc.load_plan`, `vc.count_cost`; the stages
of a run are `vc.pretrain`, `vc.slim`, `vc.search`, `vc.finetune`, `vc.evaluate`, `vc.benchmark`,
`vc.compare`, `vc.visualize` and `vc.export`, whose artefacts `vc.load_exported` runs.
`vc.methods` makes the layers of ToMe, EViT, DynamicViT and hand-made schedules, `vc.make_plan` a
plan of them, and `vc.unmerge` brings tokens back to the grid of patches. `vc.model_plots` draws
what plans and models do, `vc.plots` metrics of a run, `vc.published_accuracies` gives what others
measured.
"""

import functools
import importlib.metadata

from vitcomp_jax import methods
from vitcomp_jax.api import Cost, apply, count_cost, load
from vitcomp_jax.config import default_config
from vitcomp_jax.errors import UserError
from vitcomp_jax.exported import Exported, load_exported
from vitcomp_jax.models.tokens import unmerge
from vitcomp_jax.models.variants import get_spec, list_variants
from vitcomp_jax.plans import Plan, list_plans, load_plan, make_plan
from vitcomp_jax.reporting import model_plots, plots
from vitcomp_jax.reporting.published import accuracies as published_accuracies
from vitcomp_jax.stages import run_stage

__version__ = importlib.metadata.version("vitcomp_jax")

pretrain = functools.partial(run_stage, "pretrain")
slim = functools.partial(run_stage, "slim")
search = functools.partial(run_stage, "search")
finetune = functools.partial(run_stage, "finetune")
benchmark = functools.partial(run_stage, "benchmark")
compare = functools.partial(run_stage, "compare")
evaluate = functools.partial(run_stage, "evaluate")
visualize = functools.partial(run_stage, "visualize")
export = functools.partial(run_stage, "export")

__all__ = [
  "Cost",
  "Exported",
  "Plan",
  "UserError",
  "apply",
  "benchmark",
  "compare",
  "count_cost",
  "default_config",
  "evaluate",
  "export",
  "model_plots",
  "finetune",
  "get_spec",
  "list_plans",
  "list_variants",
  "load",
  "load_exported",
  "load_plan",
  "make_plan",
  "methods",
  "plots",
  "pretrain",
  "published_accuracies",
  "search",
  "slim",
  "unmerge",
  "visualize",
]
