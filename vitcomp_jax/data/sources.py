"""Where images and labels come from: random access, one example per index."""

import dataclasses
import functools
import importlib.resources
import io
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import PIL.Image

from vitcomp_jax import paths
from vitcomp_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
EVAL_SPLITS = ("validation", "val", "test")


@dataclasses.dataclass(frozen=True)
class Example:
  """An image, PIL or uint8[h w c], and the index of its class."""

  image: PIL.Image.Image | np.ndarray
  label: int  # -1: none


class CorruptImage(Exception):
  """An image that cannot be read or decoded; the message names it."""


class Source(Protocol):
  """A split of a data set.

  Attributes:
    name: Of the data set.
    split: Name of the split.
    class_names: By label; empty for images without labels.
    image_shape: Height and width where all images share a small one, else none.
  """

  name: str
  split: str
  class_names: tuple[str, ...]
  image_shape: tuple[int, int] | None

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example:
    """The example.

    Raises:
      CorruptImage: If its image cannot be read or decoded.
    """
    ...


class ArraySource:
  """Images that are already in memory."""

  def __init__(
    self,
    name: str,
    split: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...],
  ) -> None:
    self.name, self.split, self.class_names = name, split, class_names
    self.image_shape: tuple[int, int] | None = (images.shape[1], images.shape[2])
    self._images, self._labels = images, labels

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Example:
    return Example(self._images[index], int(self._labels[index]))


class FakeSource:
  """Noise with random labels, the same for the same index."""

  def __init__(self, split: str, size: tuple[int, int], num_classes: int) -> None:
    lengths = {"train": 1280, "validation": 256}
    self.name, self.split = "fake", _known_split("fake", split, tuple(lengths))
    self.class_names = tuple(f"class {i}" for i in range(num_classes))
    self.image_shape: tuple[int, int] | None = None
    self._length, self._size = lengths[split], size
    self._stream = tuple(lengths).index(split)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Example:
    rng = np.random.default_rng((self._stream, index))
    image = rng.integers(256, size=(*self._size, 3), dtype=np.uint8)
    return Example(image, int(rng.integers(len(self.class_names))))


class FolderSource:
  """Image files in `DIR/SPLIT/CLASS/`; the classes are the folder names in sorted order.

  Without such folders, the images in `DIR/SPLIT/` have no labels.
  """

  def __init__(self, directory: str, split: str) -> None:
    self.name, self.split = pathlib.Path(directory).name, split
    self.image_shape: tuple[int, int] | None = None
    folder = pathlib.Path(directory) / split
    self.class_names = class_folders(folder)
    self._check_same_classes(pathlib.Path(directory))
    self._files: list[tuple[pathlib.Path, int]] = []
    if not self.class_names:
      self._files = [(file, -1) for file in image_files(folder)]
    for label, class_name in enumerate(self.class_names):
      files = image_files(folder / class_name)
      if not files:
        raise UserError(
          f"{folder / class_name}: expected images ({' '.join(IMAGE_SUFFIXES)}), got none; add "
          "some or remove the folder."
        )
      self._files += [(file, label) for file in files]

  def _check_same_classes(self, directory: pathlib.Path) -> None:
    """Training and evaluation must number the classes alike, if both have labels."""
    others = EVAL_SPLITS if self.split == "train" else ("train",)
    other = next((o for o in others if o != self.split and (directory / o).is_dir()), None)
    if other is None:
      return
    others_classes = class_folders(directory / other)
    differing = sorted(set(self.class_names) ^ set(others_classes))
    if self.class_names and others_classes and differing:
      raise UserError(
        f"{directory}: expected the same classes in {self.split} and {other}, got "
        f"{len(differing)} in only one of them ({', '.join(differing[:5])}); add or remove them."
      )

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Example:
    file, label = self._files[index]
    try:
      content = file.read_bytes()
    except OSError as error:
      raise CorruptImage(f"{file}: {error.strerror}") from error
    return Example(decode(content, str(file)), label)


def class_folders(folder: pathlib.Path) -> tuple[str, ...]:
  """The sorted names of a split's class folders, hidden ones left out; none if it has no labels.

  A folder that is named like an image is no class.
  """
  names = sorted(
    path.name
    for path in folder.iterdir()
    if path.is_dir() and not path.name.startswith(".") and not _named_like_image(path.name)
  )
  if not names and not image_files(folder):
    raise UserError(
      f"{folder}: expected one folder per class, got none; see `DIR/train/CLASS/`, or put images "
      "without labels there."
    )
  return tuple(names)


def image_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The image files of a folder, sorted, hidden ones left out."""
  # Unlike `iterdir`, this tells files from folders and dangling links without a look at each.
  with os.scandir(folder) as entries:
    names = [e.name for e in entries if _named_like_image(e.name) and e.is_file()]
  return [folder / name for name in sorted(names) if not name.startswith(".")]


def _named_like_image(name: str) -> bool:
  return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def decode(content: bytes, what: str) -> PIL.Image.Image:
  """Decodes an image file.

  Args:
    content: Of the file.
    what: Names it in the error.

  Returns:
    The image, wholly decoded.

  Raises:
    CorruptImage: If it cannot be decoded.
  """
  try:
    image = PIL.Image.open(io.BytesIO(content))
    image.load()
  except PIL.UnidentifiedImageError as error:
    raise CorruptImage(f"{what}: not an image") from error
  except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
    raise CorruptImage(f"{what}: {error}") from error
  return image


class TfdsSource:
  """A data set that TFDS prepared as ArrayRecord; read without TensorFlow."""

  def __init__(self, builder: Any, split: str) -> None:
    import tensorflow_datasets as tfds

    self.name, self.split = builder.name, split
    features = builder.info.features
    has_labels = "label" in features and hasattr(features["label"], "names")
    self.class_names = tuple(features["label"].names) if has_labels else ()
    height, width = features["image"].shape[:2]
    self.image_shape = (height, width) if height and width else None
    # Decoding here, not in TFDS, tells a corrupt image and spares a copy.
    self._records = builder.as_data_source(
      split=split, decoders={"image": tfds.decode.SkipDecoding()}
    )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    record = self._records[int(index)]
    return self._example(record, index)

  def read(self, indices: Sequence[int]) -> list[Example | CorruptImage]:
    """Several examples, some three times as fast as one by one; see the function `read`."""
    records = self._records.__getitems__(list(indices))
    pairs = zip(records, indices, strict=True)
    return [_caught(functools.partial(self._example, *pair)) for pair in pairs]

  def _example(self, record: dict[str, Any], index: int) -> Example:
    image = decode(record["image"], f"{self.name}, split {self.split}, image {index}")
    return Example(image, int(record["label"]) if self.class_names else -1)


def read(source: Source, indices: Sequence[int]) -> list[Example | CorruptImage]:
  """Reads several examples; a corrupt one stands there as its error.

  Args:
    source: Where from.
    indices: Which.

  Returns:
    As many as there are indices.
  """
  if isinstance(source, TfdsSource):
    return source.read(indices)
  return [_caught(functools.partial(source.__getitem__, index)) for index in indices]


def _caught(get: Callable[[], Example]) -> Example | CorruptImage:
  try:
    return get()
  except CorruptImage as error:
    return error


def make_source(
  name: str,
  directory: str | None,
  split: str | None,
  fake_size: tuple[int, int],
  fake_classes: int,
) -> Source:
  """Opens a split of a data set.

  Args:
    name: `bundled`, `folder`, `fake`, or a TFDS name.
    directory: The image folder, or TFDS's data_dir (none: TFDS's default).
    split: Name of the split; none: the evaluation split that there is.
    fake_size: Height and width of the images of `fake`, in pixels.
    fake_classes: Number of classes of `fake`.

  Returns:
    The source.

  Raises:
    UserError: If there is no such data set or split.
  """
  if name == "bundled":
    return _bundled(split or "test")
  if name == "fake":
    return FakeSource(split or "validation", fake_size, fake_classes)
  if name == "folder":
    return _folder(directory, split)
  return _tfds(name, directory, split)


def _known_split(name: str, split: str | None, known: tuple[str, ...]) -> str:
  """`split` if it is known; for none, the first evaluation split."""
  if split is None and (first := next((s for s in EVAL_SPLITS if s in known), None)):
    return first
  if split in known:
    return split
  expected = " or ".join(EVAL_SPLITS) if split is None else repr(split)
  raise UserError(
    f"{name}: expected a split {expected}, got only {', '.join(known) or 'none'}; set "
    "config.data.train_split or config.data.eval_split to one of them."
  )


def _bundled(split: str) -> Source:
  split = _known_split("bundled", split, ("train", "test"))
  file = importlib.resources.files("vitcomp_jax.data") / "bundled" / "fashion_mnist.npz"
  with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
    class_names = tuple(str(name) for name in arrays["class_names"])
    images, labels = arrays[f"{split}_image"], arrays[f"{split}_label"]
  return ArraySource("bundled", split, images, labels, class_names)


def _folder(directory: str | None, split: str | None) -> Source:
  if directory is None:
    raise UserError("config.data.dir: expected the folder that holds train/ and val/, got none.")
  path = pathlib.Path(paths.expand(directory))
  if not path.is_dir():
    raise UserError(f"config.data.dir: expected a folder with train/ and val/, got {directory!r}.")
  known = tuple(sorted(p.name for p in path.iterdir() if p.is_dir()))
  return FolderSource(str(path), _known_split(str(path), split, known))


def _tfds(name: str, directory: str | None, split: str | None) -> Source:
  directory = directory and paths.expand(directory)
  builder = _tfds_builder(name, directory)
  features = builder.info.features
  if "image" not in features:
    raise UserError(
      f"{name}: expected the feature `image`, got {', '.join(features)}; use a data set of images."
    )
  known = tuple(builder.info.splits)
  base = split and re.split(r"\W", split)[0]  # `train[:90%]` is a slice of `train`.
  chosen = _known_split(name, base, known)
  try:
    return TfdsSource(builder, split or chosen)
  except NotImplementedError:
    raise UserError(
      f"{name}: expected array_record files in {builder.data_dir}, got "
      f"{builder.info.file_format.value}; run `{_how_to_prepare(name, 'OTHER_DIR')}` and set "
      "config.data.dir=OTHER_DIR."
    ) from None
  except (ValueError, KeyError) as error:
    why = _first_line(error)
    raise UserError(f"{name}: expected a split like `train[:90%]`, got {split!r}: {why}") from error


def _tfds_builder(name: str, directory: str | None) -> Any:
  """TFDS's builder, made from the prepared files alone: no network, no TensorFlow."""
  import tensorflow_datasets as tfds

  try:
    builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=directory)
    if builder.info.splits:
      return builder
  except tfds.core.registered.DatasetNotFoundError:
    pass
  except (ValueError, OSError) as error:
    raise UserError(
      f"config.data.name: expected a data set that can be read, got {name!r}: {_first_line(error)}"
    ) from error
  where = directory or tfds.core.constants.DATA_DIR
  if re.split(r"[/:]", name)[0] in tfds.list_builders(with_community_datasets=False):
    raise UserError(
      f"{name}: expected the prepared data set in {where}, got none; run "
      f"`{_how_to_prepare(name, directory)}`, or set config.data.dir."
    )
  raise UserError(
    f"config.data.name: expected bundled, folder, fake or a TFDS name, got {name!r}, which TFDS "
    f"does not know and which is not prepared in {where}."
  )


def _first_line(error: Exception) -> str:
  """What an error says, without the help that follows."""
  return str(error.args[0] if error.args else error).splitlines()[0]


def _how_to_prepare(name: str, directory: str | None) -> str:
  option = f" --data_dir {directory}" if directory else ""
  if name == "fashion_mnist":
    return f"python tools/prepare_fashion_mnist.py{option}"
  return f"tfds build {name} --file_format=array_record{option}"
