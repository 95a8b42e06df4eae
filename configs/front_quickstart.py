"""A front from one search: plans for 90 to 50 % of a small ViT's MACs, on the bundled images.

    python -m vitcomp_jax.main --config configs/front_quickstart.py

The model, the data and the rest of the search are those of `configs/quickstart.py`. The budget
walks down; each search goes on from the rates of the one before, and all together take half as
many steps again as one alone. `plans/` gets a plan for each budget, `plan.json` is the last one.
The report has them all, beside flat merging of the same MACs. What a search of its own finds at one
of the budgets, to hold a plan of the front against it:

    python -m vitcomp_jax.main --config configs/quickstart.py --workdir runs/alone \\
      --config.budget.fraction=0.8
"""

import ml_collections

from vitcomp_jax.configs import quickstart


def get_config() -> ml_collections.ConfigDict:
  config = quickstart.get_config()
  config.budget.fraction = None
  config.budget.fractions = (0.9, 0.8, 0.65, 0.5)
  # A third of the steps of a search alone: which of its plans is kept matters more.
  config.search.choose_images = 3072
  config.evaluate.baselines = ("uniform_merge",)
  return config
