"""Compresses the image tower of CLIP ViT-B/16 to half of its MACs with 300 photos, on a CPU.

  python -m vitcomp_jax.main --config configs/clip_photos.py --config.data.dir=DIR
  python tools/linear_probe.py runs/clip_photos

`DIR` holds the photos as a TFDS data set, `imagenette224`: Imagenette's ten classes of ImageNet, at
224 pixels. The search does not use the labels, but follows the dense model's embedding; the second
command classifies the embeddings of all models. The weights are OpenAI's, from the Hugging Face
hub. There are fewer steps and images than usual, because a step of this model takes 14 times as
long as one of DeiT-Ti.
"""

import ml_collections

from vitcomp_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
  config = default_config()
  config.stages = ("search", "evaluate")
  config.model.variant = "vit_base_patch16_clip_quickgelu_224"
  config.model.weights = "timm/vit_base_patch16_clip_quickgelu_224.openai"
  config.model.projection = True
  config.data.name = "imagenette224"
  config.data.crop_pct = 1.0
  config.data.train_examples, config.data.eval_examples = 300, 200
  config.budget.fraction = 0.5
  config.search.what = "both"
  config.search.steps, config.search.batch_size, config.search.choose_images = 30, 8, 32
  config.evaluate.baselines = ("tome",)
  config.evaluate.batch_size = 25
  return config
