"""x"""

from vitcomp_jax.config import default_config


def get_config():
  c = default_config()
  c.stages = ("pretrain", "evaluate")
  c.model.variant = "vit_mini_patch3_30"
  c.data.name = "fashion_mnist"
  c.data.pad = 1
  c.data.augment = "none"
  c.pretrain.epochs = 3.0
  c.pretrain.batch_size = 64
  c.pretrain.learning_rate = 1e-3
  c.pretrain.warmup_epochs = 0.5
  c.pretrain.label_smoothing = 0.0
  c.pretrain.log_every = 50
  c.pretrain.checkpoint_every = 250
  return c
