"""A search, then a fine-tuning with all that is random, on a tiny model: 20 steps each."""

import ml_collections

from tests.tiny_main import TINY
from vitcomp_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
  config = default_config()
  config.stages = ("search",)
  config.compilation_cache = None  # the tests have one of their own
  config.model.variant, config.data.pad = TINY, 1
  config.data.train_examples, config.data.eval_examples = 320, 30
  config.budget.fraction = 0.75
  config.evaluate.batch_size, config.evaluate.token_maps = 20, 0
  search = config.search
  search.steps, search.batch_size, search.choose_images = 20, 16, 0
  search.log_every, search.checkpoint_every = 1, 5
  training = config.finetune
  training.epochs, training.batch_size, training.warmup_epochs = 1.0, 16, 0.0
  training.log_every, training.checkpoint_every = 1, 5
  training.ema = 0.9
  return config
