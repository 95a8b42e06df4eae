"""The public names and where they are defined; `__init__.py` imports each on first use."""

from vitcomp_jax import methods as methods
from vitcomp_jax.api import Cost as Cost
from vitcomp_jax.api import apply as apply
from vitcomp_jax.api import compress as compress
from vitcomp_jax.api import count_cost as count_cost
from vitcomp_jax.api import load as load
from vitcomp_jax.api import preprocess as preprocess
from vitcomp_jax.config import default_config as default_config
from vitcomp_jax.errors import UserError as UserError
from vitcomp_jax.exported import Exported as Exported
from vitcomp_jax.exported import load_exported as load_exported
from vitcomp_jax.exporting import export as export
from vitcomp_jax.models.tokens import unmerge as unmerge
from vitcomp_jax.models.variants import get_spec as get_spec
from vitcomp_jax.models.variants import list_variants as list_variants
from vitcomp_jax.plans import Plan as Plan
from vitcomp_jax.plans import list_plans as list_plans
from vitcomp_jax.plans import load_plan as load_plan
from vitcomp_jax.plans import make_plan as make_plan
from vitcomp_jax.reporting import model_plots as model_plots
from vitcomp_jax.reporting import plots as plots
from vitcomp_jax.reporting.published import published_accuracies as published_accuracies
from vitcomp_jax.saved import save as save
from vitcomp_jax.schedules import dynamicvit as dynamicvit
from vitcomp_jax.schedules import evit as evit
from vitcomp_jax.schedules import linear as linear
from vitcomp_jax.schedules import random as random
from vitcomp_jax.schedules import tome as tome
from vitcomp_jax.schedules import uniform as uniform
from vitcomp_jax.searching import search as search
from vitcomp_jax.stages import run as run
from vitcomp_jax.stages import run_stage as run_stage

__version__: str
