"""The speed of ViT-H (MAE), dense and under DiffRate's published schedule of 103.4 GMACs.

  python -m vitcomp_jax.main --config configs/benchmark_mae_h.py

Random weights and generated images, as neither changes what a forward pass costs: nothing has to be
fetched. It takes 6 GB of memory and, on two CPU cores, some minutes. The figures are in
`benchmark.json` and `report.md` of the workdir. Other batch sizes:
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
