"""vitcomp_jax: makes a Vision Transformer smaller and faster at a budget you choose.

With `import vitcomp_jax as vc`, `vc.load` gives a model and its parameters, `vc.preprocess` its
input, `vc.apply` its logits. `vc.load_plan` knows the published plans; `vc.tome`, `vc.evit`,
`vc.dynamicvit`, `vc.uniform`, `vc.linear` and `vc.random` make plans without a search, and
`vc.search` learns one for a model, its weights and some images.
`vc.compress` puts a model under a plan, and `vc.count_cost` tells what it costs. `vc.save` writes a
folder that `vc.load` reads, `vc.export` a file that runs without this library and that
`vc.load_exported` runs. `vc.unmerge` brings tokens back to the grid of patches, and
`vc.model_plots` draws what plans and models do.

`vc.run` runs the stages of a config in a workdir, `vc.run_stage` one of them. `vc.plots` draws
metrics of a run, `vc.published_accuracies` gives what others measured. `vc.methods` has the methods
themselves, for training loops of one's own.
"""

import importlib.metadata

from vitcomp_jax import methods
from vitcomp_jax.api import Cost, apply, compress, count_cost, load, preprocess
from vitcomp_jax.config import default_config
from vitcomp_jax.errors import UserError
from vitcomp_jax.exported import Exported, load_exported
from vitcomp_jax.exporting import export
from vitcomp_jax.models.tokens import unmerge
from vitcomp_jax.models.variants import get_spec, list_variants
from vitcomp_jax.plans import Plan, list_plans, load_plan, make_plan
from vitcomp_jax.reporting import model_plots, plots
from vitcomp_jax.reporting.published import accuracies as published_accuracies
from vitcomp_jax.saved import save
from vitcomp_jax.schedules import dynamicvit, evit, linear, random, tome, uniform
from vitcomp_jax.searching import search
from vitcomp_jax.stages import run, run_stage

__version__ = importlib.metadata.version("vitcomp_jax")

__all__ = [
  "Cost",
  "Exported",
  "Plan",
  "UserError",
  "apply",
  "compress",
  "count_cost",
  "default_config",
  "dynamicvit",
  "evit",
  "export",
  "get_spec",
  "linear",
  "list_plans",
  "list_variants",
  "load",
  "load_exported",
  "load_plan",
  "make_plan",
  "methods",
  "model_plots",
  "plots",
  "preprocess",
  "published_accuracies",
  "random",
  "run",
  "run_stage",
  "save",
  "search",
  "tome",
  "uniform",
  "unmerge",
]
