"""Compresses your own model with a folder of your own images; you need no config of your own.

    python -m vitcomp_jax.main --config compress --config.model.weights=W --config.data.dir=D \\
      --config.budget.fraction=0.65

`W` is a weights file or a hub id; `--config.model.variant=NAME` names its architecture if the
weights do not. `D` holds `train/` and `val/`, or just images; then half of them are used to search
and the other half to evaluate. Give one budget: `budget.fraction`, `budget.gmacs` or
`budget.latency_ms`. The search follows the dense model's outputs and needs no labels. The table
shows accuracies if the class folders match the model's classes; otherwise it compares the models'
outputs. DiffRate (Chen et al., ICCV 2023, arXiv 2305.17997) learns how many tokens each layer
keeps; nothing else is trained. The dense and the compressed model are then evaluated and timed in
turns on this device, the compressed model is exported to `export/` in the workdir, and one table
summarises the results.
"""

import ml_collections

from vitcomp_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
  config = default_config()
  config.stages = ("search", "evaluate", "benchmark", "export")
  config.model.variant = None
  config.model.weights = "W"  # no such file: it must be given, as random weights are of no use
  config.data.name = "folder"
  config.data.dir = "D"
  config.data.divide = True
  config.data.labels = "auto"
  config.benchmark.batch_sizes = (1, 32)
  return config
