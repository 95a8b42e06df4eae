"""Searches for plans at 90 to 50 % of a small ViT's MACs in one run, on the bundled images.

    python -m vitcomp_jax.main --config configs/front_quickstart.py

The model, the data and the rest of the search are those of `configs/quickstart.py`. The budget
decreases; each search starts from the rates of the previous one, and together they take 1.5 times
`search.steps`. `plans/` has a plan for each budget, and `plan.json` is the last plan. The report
compares them with uniform merging at the same MACs. To compare with a separate search for one of
the budgets:

    python -m vitcomp_jax.main --config configs/quickstart.py --workdir runs/alone \\
      --config.budget.fraction=0.8
"""

import ml_collections

from vitcomp_jax.configs import quickstart


def get_config() -> ml_collections.ConfigDict:
  config = quickstart.get_config()
  config.budget.fraction = None
  config.budget.fractions = (0.9, 0.8, 0.65, 0.5)
  config.search.steps = 120
  # With fewer steps per budget, the choice among the plans matters more.
  config.search.choose_images = 1024
  config.evaluate.baselines = ("uniform_merge",)
  return config
