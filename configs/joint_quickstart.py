"""Slims a network and then searches its token counts, to 40 % of the dense model's MACs.

    python -m vitcomp_jax.main --config configs/joint_quickstart.py

The network is slimmed as in `configs/vitslim_quickstart.py`, but to 60 % of its head dimensions and
hidden units; DiffRate then searches how many tokens its layers keep, and the result is trained
again. The report compares the dense model, each method alone, and both together.
"""

import ml_collections

from vitcomp_jax.configs import vitslim_quickstart


def get_config() -> ml_collections.ConfigDict:
  config = vitslim_quickstart.get_config()
  config.stages = ("slim", "search", "finetune", "evaluate", "visualize")
  config.slim.budgets = (0.6, 0.6, 1.0)
  config.budget.fraction = 0.4
  return config
