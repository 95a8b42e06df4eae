"""Compares the input pipeline with a bare decoding loop, from JPEG to 224 pixels.

  python benchmarks/input_pipeline.py [--images 256] [--workers 2] [--json FILE]

The images are generated: 500 x 375 pixels, the usual size in ImageNet, with the spectrum of
photographs, so that decoding takes as long. The bare loop decodes and resizes them with Pillow in
the same number of threads. All variants are timed in turn, several times; medians are shown.
"""

import argparse
import concurrent.futures
import itertools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import PIL.Image

from vitcomp_jax.atomic import write_json
from vitcomp_jax.config import DataConfig
from vitcomp_jax.data import loader, transforms
from vitcomp_jax.errors import UserError
from vitcomp_jax.paths import expand

SIZE, BATCH, ROUNDS = 224, 32, 5
PRE = transforms.Preprocess(
  (SIZE, SIZE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.9, "bicubic"
)


def write_images(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
  """Writes images with the spectrum of photographs, in two classes."""
  paths = []
  for i in range(count):
    rng = np.random.default_rng(i)
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.fftfreq(500)[None])
    spectrum = np.fft.fft2(rng.standard_normal((3, 375, 500))) / np.maximum(frequency, 1 / 500)
    image = np.fft.ifft2(spectrum).real
    image = 128 + 50 * image / image.std()
    path = folder / "train" / str(i % 2) / f"{i}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(image, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    PIL.Image.fromarray(pixels).save(path, quality=90)
    paths.append(path)
  return paths


def bare_loop(paths: list[pathlib.Path], workers: int) -> None:
  def one(path: pathlib.Path) -> None:
    image = PIL.Image.open(path).convert("RGB")
    image.resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC)

  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    list(pool.map(one, paths))


def pipeline(
  folder: pathlib.Path, workers: int, count: int, split: str, **augmentation
) -> Callable:
  config = DataConfig(
    name="folder", dir=str(folder), eval_split="train", workers=workers, **augmentation
  )
  data = loader.load(config, split, PRE, 0)

  def run() -> None:
    batches = data.train_batches(BATCH) if split == "train" else data.eval_batches(BATCH)
    for _ in itertools.islice(batches, count // BATCH):
      pass

  return run


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", type=int, default=256)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--json", type=pathlib.Path)
  known = parser.parse_args()
  try:
    file = known.json and pathlib.Path(expand(known.json))
  except UserError as error:
    parser.error(str(error))
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    paths = write_images(folder, known.images)
    deit = dict(augment="rand_augment", erase=0.25, mixup=0.8, cutmix=1.0, repeats=3)
    options = folder, known.workers, known.images
    ways = {
      "bare loop: decode, resize": lambda: bare_loop(paths, known.workers),
      "evaluation": pipeline(*options, "eval"),
      "crops and flips": pipeline(*options, "train", augment="crop_flip"),
      "DeiT's augmentation": pipeline(*options, "train", **deit),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
      for name, run in ways.items():
        begin = time.perf_counter()
        run()
        rates[name].append(known.images / (time.perf_counter() - begin))
  bare = rates["bare loop: decode, resize"]
  result = {}
  for name, found in rates.items():
    share = statistics.median(a / b for a, b in zip(found, bare, strict=True))
    rate = statistics.median(found)
    result[name] = {"images_per_second": rate, "of_bare_loop": share}
    per_core = rate / known.workers
    print(f"{name:28} {rate:7.1f} images/s {per_core:7.1f} per core {100 * share:6.1f} %")
  if file:
    write_json(file, result)


if __name__ == "__main__":
  main()
