"""Sources of images and labels, accessed by index."""

import dataclasses
import functools
import importlib.resources
import logging
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import PIL.Image

from vitcomp_jax import paths
from vitcomp_jax.data import folders, labels
from vitcomp_jax.data.images import CorruptImage, decode
from vitcomp_jax.errors import UserError

EVAL_SPLITS = ("validation", "val", "test")
_NAMED = 5  # number of folders to list in a message


@dataclasses.dataclass(frozen=True)
class Example:
  """An image, PIL or uint8[h w c], and the index of its class."""

  image: PIL.Image.Image | np.ndarray
  label: int  # -1 without labels


class Source(Protocol):
  """The examples in a split of a data set.

  Attributes:
    name: Name of the data set.
    split: Name of the split.
    class_names: Class names by label; empty without labels.
    image_shape: Height and width if they are the same for all images; None otherwise.
  """

  name: str
  split: str
  class_names: tuple[str, ...]
  image_shape: tuple[int, int] | None

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example:
    """Reads an example.

    Raises:
      CorruptImage: If its image cannot be read or decoded.
    """
    ...


class ArraySource:
  """Holds images in memory."""

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
  """Generates noise images with random labels, both determined by the index."""

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
  """Reads image files in `DIR/SPLIT/CLASS/`, at any depth; classes are named after the folders.

  Without class folders, the images in `DIR/SPLIT/` have no labels.
  """

  def __init__(self, directory: str, split: str, class_order: str = "sorted") -> None:
    """Finds the files, and warns about those that are left out.

    Args:
      directory: Folder that contains the folders of the splits.
      split: Name of the split.
      class_order: Order of the classes, see `labels.sort_classes`.

    Raises:
      UserError: If there are no images, or a folder cannot be read.
    """
    self.name, self.split = pathlib.Path(directory).name, split
    self.image_shape: tuple[int, int] | None = None
    folder = directory if split == "." else os.path.join(directory, split)
    try:
      found = folders.find(folder)
    except OSError as error:
      raise UserError(f"{error.filename}: cannot be read ({error.strerror}).") from error
    self.class_names = labels.sort_classes(found.classes, class_order)
    self._files = [(file, -1) for file in found.loose]
    for label, class_name in enumerate(self.class_names):
      self._files += [(file, label) for file in found.classes[class_name]]
    if not self._files:
      what = f"images in {_named(self.class_names)}" if self.class_names else "one folder per class"
      told = f" ({found.told()})" if found.left_out else ""
      raise UserError(
        f"{folder}: expected {what}, got none{told}; see `DIR/train/CLASS/`, or put images without "
        "labels there."
      )
    if found.left_out:
      logging.warning("%s: %s", folder, found.told())
    if empty := [name for name in self.class_names if not found.classes[name]]:
      logging.warning("%s: no images in %s of %d", folder, _named(empty), len(self.class_names))

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Example:
    file, label = self._files[index]
    path = os.path.join(*file)
    try:
      content = pathlib.Path(path).read_bytes()
    except OSError as error:
      raise CorruptImage(f"{path}: {error.strerror}") from error
    return Example(decode(content, path), label)


def _named(names: Sequence[str]) -> str:
  """Returns the number of class folders, and the names of the first few."""
  some = [*names[:_NAMED], *["..."] * (len(names) > _NAMED)]
  return f"{len(names)} {'folder' if len(names) == 1 else 'folders'} of classes ({', '.join(some)})"


class TfdsSource:
  """Reads a data set that TFDS prepared as ArrayRecord, without TensorFlow."""

  def __init__(self, builder: Any, split: str) -> None:
    import tensorflow_datasets as tfds

    self.name, self.split = builder.name, split
    features = builder.info.features
    has_labels = "label" in features and hasattr(features["label"], "names")
    self.class_names = tuple(features["label"].names) if has_labels else ()
    height, width = features["image"].shape[:2]
    self.image_shape = (height, width) if height and width else None
    # Images are decoded here, not in TFDS, to detect corrupt ones and to avoid a copy.
    self._records = builder.as_data_source(
      split=split, decoders={"image": tfds.decode.SkipDecoding()}
    )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    record = self._records[int(index)]
    return self._example(record, index)

  def read(self, indices: Sequence[int]) -> list[Example | CorruptImage]:
    """Reads several examples like the function `read`, about three times faster than one by one."""
    records = self._records.__getitems__(list(indices))
    pairs = zip(records, indices, strict=True)
    return [_caught(functools.partial(self._example, *pair)) for pair in pairs]

  def _example(self, record: dict[str, Any], index: int) -> Example:
    image = decode(record["image"], f"{self.name}, split {self.split}, image {index}")
    return Example(image, int(record["label"]) if self.class_names else -1)


def read(source: Source, indices: Sequence[int]) -> list[Example | CorruptImage]:
  """Reads several examples.

  Args:
    source: The source to read from.
    indices: Indices of the examples.

  Returns:
    For each index, the example, or the error if its image is corrupt.
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
  class_order: str | None = None,
) -> Source:
  """Opens a split of a data set.

  Args:
    name: `bundled`, `folder`, `fake`, or a TFDS name.
    directory: The image folder, or TFDS's data_dir; None for TFDS's default.
    split: Name of the split; None for the first of `EVAL_SPLITS` that exists.
    fake_size: Height and width of the images of `fake`, in pixels.
    fake_classes: Number of classes of `fake`.
    class_order: Order of the classes of `folder`, see `labels.sort_classes`; None for `sorted`.

  Returns:
    The source.

  Raises:
    UserError: If the data set or the split does not exist.
  """
  if name == "bundled":
    return _bundled(split or "test")
  if name == "fake":
    return FakeSource(split or "validation", fake_size, fake_classes)
  if name == "folder":
    return _folder(directory, split, class_order or "sorted")
  return _tfds(name, directory, split)


def _known_split(name: str, split: str | None, known: tuple[str, ...]) -> str:
  """Returns `split` if it is known; for None, the first evaluation split."""
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


def _folder(directory: str | None, split: str | None, class_order: str) -> Source:
  if directory is None:
    raise UserError("config.data.dir: expected the folder that holds train/ and val/, got none.")
  path = pathlib.Path(paths.expand(directory))
  if not path.is_dir():
    raise UserError(f"config.data.dir: expected a folder with train/ and val/, got {directory!r}.")
  known = tuple(sorted(p.name for p in path.iterdir() if p.is_dir()))
  return FolderSource(str(path), _known_split(str(path), split, known), class_order)


def _tfds(name: str, directory: str | None, split: str | None) -> Source:
  directory = directory and paths.expand(directory)
  builder = _tfds_builder(name, directory)
  features = builder.info.features
  if "image" not in features:
    raise UserError(
      f"{name}: expected the feature `image`, got {', '.join(features)}; use a data set of images."
    )
  known = tuple(builder.info.splits)
  base = split and re.split(r"\W", split)[0]  # `train[:90%]` is a slice of `train`
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
  """Returns the TFDS builder for the prepared files, without network access or TensorFlow."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UserError(
      f"config.data.name: expected bundled, folder or fake, got {name!r}; to read it as a data set "
      "of TFDS, run `pip install vitcomp_jax[tfds]`."
    ) from error
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
  """Returns the first line of an error's message."""
  return str(error.args[0] if error.args else error).splitlines()[0]


def _how_to_prepare(name: str, directory: str | None) -> str:
  option = f" --data_dir {directory}" if directory else ""
  if name == "fashion_mnist":
    return f"python tools/prepare_fashion_mnist.py{option}"
  return f"tfds build {name} --file_format=array_record{option}"
