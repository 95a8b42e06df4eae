"""Prepares Fashion-MNIST for TFDS, without network access or TensorFlow.

  apt install dataset-fashion-mnist && pip install "vitcomp_jax[tfds]"
  python tools/prepare_fashion_mnist.py

converts the four gzipped IDX files of that Debian package to the TFDS data set `fashion_mnist` in
ArrayRecord format. With `--bundle FILE`, it instead writes the balanced subset that this package
bundles.
"""

import argparse
import gzip
import pathlib
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image

from vitcomp_jax.errors import UserError
from vitcomp_jax.paths import expand

try:
  import tensorflow_datasets as tfds
except ImportError:
  print('expected tensorflow_datasets; run `pip install "vitcomp_jax[tfds]"`.', file=sys.stderr)
  sys.exit(2)

CLASS_NAMES = (
  "T-shirt/top",
  "Trouser",
  "Pullover",
  "Dress",
  "Coat",
  "Sandal",
  "Shirt",
  "Sneaker",
  "Bag",
  "Ankle boot",
)
PREFIXES = {"train": "train", "test": "t10k"}
BUNDLED_PER_CLASS = {"train": 500, "test": 100}
BUNDLE_SEED = 0


def read_idx(path: pathlib.Path) -> np.ndarray:
  """Reads a gzipped IDX file of unsigned bytes.

  Args:
    path: The file.

  Returns:
    uint8 array of the shape in the header.

  Raises:
    ValueError: If the file has another format, or is truncated.
  """
  with gzip.open(path, "rb") as file:
    content = file.read()
  zeros, kind, ndim = struct.unpack(">HBB", content[:4])
  if zeros != 0 or kind != 8:
    raise ValueError(f"{path}: expected an IDX file of unsigned bytes.")
  shape = struct.unpack(f">{ndim}I", content[4 : 4 + 4 * ndim])
  return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def read_split(source: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
  """Reads one split.

  Args:
    source: Folder with the IDX files.
    split: `train` or `test`.

  Returns:
    Images, uint8[n 28 28], and labels, uint8[n].
  """
  prefix = PREFIXES[split]
  images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
  labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
  if len(images) != len(labels):
    raise ValueError(f"{source}: {len(images)} {split} images but {len(labels)} labels.")
  return images, labels


def missing_files(source: pathlib.Path) -> list[str]:
  """Returns the names of the IDX files missing from `source`."""
  names = []
  for prefix in PREFIXES.values():
    names += [f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"]
  return [name for name in names if not (source / name).is_file()]


# TFDS registers its own FashionMnist, which downloads the data; this has the same name and content.
with tfds.core.registered.skip_registration():

  class FashionMnist(tfds.core.GeneratorBasedBuilder):
    """Builds Fashion-MNIST from local IDX files."""

    VERSION = tfds.core.Version("3.0.1")

    def __init__(self, *, source: pathlib.Path, **kwargs: object) -> None:
      self._source = source
      super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
      return tfds.core.DatasetInfo(
        builder=self,
        description="Fashion-MNIST: 70,000 grayscale images of Zalando's articles, 10 classes.",
        features=tfds.features.FeaturesDict(
          {
            "image": tfds.features.Image(shape=(28, 28, 1)),
            "label": tfds.features.ClassLabel(names=CLASS_NAMES),
          }
        ),
        supervised_keys=("image", "label"),
        homepage="https://github.com/zalandoresearch/fashion-mnist",
      )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[Any]]:
      return {split: self._generate_examples(split) for split in PREFIXES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
      images, labels = read_split(self._source, split)
      for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        # A PIL image, because TFDS would encode an array with TensorFlow.
        yield i, {"image": PIL.Image.fromarray(image), "label": int(label)}


def prepare(source: pathlib.Path, data_dir: pathlib.Path) -> pathlib.Path:
  """Writes the TFDS data set, unless it exists already.

  Args:
    source: Folder with the IDX files.
    data_dir: TFDS's data_dir.

  Returns:
    The folder of the data set.
  """
  builder = FashionMnist(source=source, data_dir=data_dir, file_format="array_record")
  builder.download_and_prepare()
  return pathlib.Path(builder.data_dir)


def bundle(source: pathlib.Path, file: pathlib.Path) -> None:
  """Writes the first images of each class of each split, shuffled, as a compressed npz.

  Args:
    source: Folder with the IDX files.
    file: The npz file to write.
  """
  arrays: dict[str, Any] = {"class_names": np.array(CLASS_NAMES)}
  for split, per_class in BUNDLED_PER_CLASS.items():
    images, labels = read_split(source, split)
    firsts = [np.flatnonzero(labels == c)[:per_class] for c in range(len(CLASS_NAMES))]
    order = np.random.default_rng(BUNDLE_SEED).permutation(np.concatenate(firsts))
    arrays[f"{split}_image"], arrays[f"{split}_label"] = images[order], labels[order]
  file.parent.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(file, **arrays)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns its exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  default_source = pathlib.Path("/usr/share/datasets/fashion-mnist")
  default_data_dir = pathlib.Path("~/tensorflow_datasets")
  parser.add_argument("--source", type=pathlib.Path, default=default_source, metavar="DIR")
  parser.add_argument("--data_dir", type=pathlib.Path, default=default_data_dir, metavar="DIR")
  parser.add_argument("--bundle", type=pathlib.Path, metavar="FILE")
  args = parser.parse_args(argv)
  try:
    source, data_dir = (pathlib.Path(expand(path)) for path in (args.source, args.data_dir))
    file = args.bundle and pathlib.Path(expand(args.bundle))
  except UserError as error:
    print(error, file=sys.stderr)
    return 2
  missing = missing_files(source)
  if missing:
    print(
      f"{source}: expected Fashion-MNIST's IDX files, missing {', '.join(missing)}; run "
      "`apt install dataset-fashion-mnist`, or name their folder with --source.",
      file=sys.stderr,
    )
    return 2
  if file:
    bundle(source, file)
    print(f"Wrote {file} ({file.stat().st_size / 1e6:.2f} MB).")
  else:
    print(f"Prepared {prepare(source, data_dir)}.")
  return 0


if __name__ == "__main__":
  sys.exit(main())
