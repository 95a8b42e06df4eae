"""Measures the speed of ViT-H (MAE), dense and under DiffRate's published plan of 103.4 GMACs.

  python -m vitcomp_jax.main --config configs/benchmark_mae_h.py

The weights are random and the images are generated, which does not affect the speed, so nothing has
to be downloaded. The run takes 6 GB of memory and a few minutes on two CPU cores. The results are
in `benchmark.json` and `report.md` in the workdir. To set other batch sizes:
`--config.benchmark.batch_sizes="(1,8)"`.
"""

import ml_collections

from vitcomp_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
  config = default_config()
  config.stages = ("benchmark",)
  config.model.variant = "vit_huge_patch14_224.mae"
  config.model.plan = "diffrate/mae_huge@103.4"
  config.data.name = "fake"
  config.benchmark.batch_sizes = (2,)
  config.benchmark.rounds = 2
  return config
