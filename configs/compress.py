"""Compresses a model you have, on a folder of images you have; no config of your own is needed.

    python -m vitcomp_jax.main --config compress --config.model.weights=W --config.data.dir=D \\
      --config.budget.fraction=0.65

`W` is a weights file or a hub id; `--config.model.variant=NAME` names its architecture where the
weights do not. `D` holds `train/` and `val/`, or just images: then half of them are searched on and
the others judge. One of `budget.fraction`, `budget.gmacs` and `budget.latency_ms` is the budget.
The search follows the dense model's outputs and needs no labels. The table has accuracies where
the class folders match the model's classes; otherwise it compares outputs too. DiffRate (Chen et
al., ICCV 2023, arXiv 2305.17997) learns how many tokens each layer keeps; nothing is trained but
that. The dense and the compressed model are then evaluated and timed in turns on this device, the
compressed one is exported to `export/` of the workdir, and one table says what it all came to.
"""

import ml_collections

from vitcomp_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
  config = default_config()
  config.stages = ("search", "evaluate", "benchmark", "export")
  config.model.variant = None
  config.model.weights = "W"  # not there unless given: a random model is nothing to compress
  config.data.name = "folder"
  config.data.dir = "D"
  config.data.divide = True
  config.data.labels = "auto"
  config.benchmark.batch_sizes = (1, 32)
  return config
