"""Scans folders for image files and their classes, and counts the files that are left out."""

import collections
import dataclasses
import os

from vitcomp_jax.data import images

File = tuple[str, str]  # folder and name
# Folders with one of these suffixes are not classes.
_COMMON = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_NAMED = 5  # number of kinds of files to list in a message


@dataclasses.dataclass
class Found:
  """The image files found in the folder of a split.

  Attributes:
    classes: Images of each class, in the order of torchvision's ImageFolder.
    loose: Images outside class folders, if there are no class folders.
    left_out: Number of files that are not used, by kind.
    examples: One unused file of each kind.
  """

  classes: dict[str, list[File]] = dataclasses.field(default_factory=dict)
  loose: list[File] = dataclasses.field(default_factory=list)
  left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  examples: dict[str, str] = dataclasses.field(default_factory=dict)

  def leave_out(self, kind: str, path: str) -> None:
    """Counts a file that is not used."""
    self.left_out[kind] += 1
    self.examples[kind] = min(path, self.examples.get(kind, path))

  def told(self) -> str:
    """Describes the files that are left out, for a message; empty if there are none."""
    if not (count := self.left_out.total()):
      return ""
    kinds = sorted(self.left_out, key=lambda kind: (-self.left_out[kind], kind))
    named = [f"{kind} {self.left_out[kind]}" for kind in kinds[:_NAMED]]
    named += ["..."] * (len(kinds) > _NAMED)
    files = "file" if count == 1 else "files"
    return f"left out {count} {files} ({', '.join(named)}), such as {self.examples[kinds[0]]}"


def find(folder: str) -> Found:
  """Finds the images in `FOLDER/CLASS/` at any depth, or else in `FOLDER/`.

  Hidden files and folders are left out; links are followed.

  Args:
    folder: Folder of a split.

  Returns:
    The images by class; they are in `loose` if there are no class folders.

  Raises:
    OSError: If a folder cannot be read.
  """
  found = Found()
  inner, files = _entries(folder)
  above = frozenset([_identity(folder)])
  for entry in inner:
    like_image = os.path.splitext(entry.name)[1].lower() in _COMMON
    why = "in folders named like images" if like_image else _hidden(entry)
    below = _below(entry.path, found, why, above)
    if not why:
      found.classes[entry.name] = sorted(below)
  beside = "beside the folders of classes" if found.classes else ""
  found.loose = sorted(_images(folder, files, found, beside))
  return found


def _below(folder: str, found: Found, why: str, above: frozenset[tuple[int, int]]) -> list[File]:
  """Returns the images in a folder at any depth; leaves them out if `why` gives a reason."""
  identity = _identity(folder)
  if identity in above:  # a link to one of its own parents
    return []
  inner, files = _entries(folder)
  taken = _images(folder, files, found, why)
  for entry in inner:
    taken += _below(entry.path, found, why or _hidden(entry), above | {identity})
  return taken


def _images(folder: str, files: list[os.DirEntry[str]], found: Found, why: str) -> list[File]:
  """Returns the images among the files of one folder, and leaves out the other files."""
  taken, suffixes = [], images.suffixes()
  for entry in files:
    suffix = os.path.splitext(entry.name)[1].lower()
    is_image = suffix in suffixes and _is_file(entry)
    reason = _hidden(entry) or (why if is_image else "")
    if is_image and not reason:
      taken.append((folder, entry.name))
    else:
      found.leave_out(" ".join(filter(None, (suffix, reason))) or "no suffix", entry.path)
  return taken


def _entries(folder: str) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
  """Returns the sorted folders and the other entries, without a stat call for plain files."""
  inner: list[os.DirEntry[str]] = []
  files: list[os.DirEntry[str]] = []
  with os.scandir(folder) as entries:
    for entry in entries:
      (inner if _is_folder(entry) else files).append(entry)
  return sorted(inner, key=lambda entry: entry.name), files


def _is_folder(entry: os.DirEntry[str]) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # a link to itself
    return False


def _is_file(entry: os.DirEntry[str]) -> bool:
  """Returns whether an entry is a file, or a dangling link, which counts as a corrupt image."""
  try:
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
  except OSError:
    return True


def _hidden(entry: os.DirEntry[str]) -> str:
  return "hidden" if entry.name.startswith(".") else ""


def _identity(folder: str) -> tuple[int, int]:
  status = os.stat(folder)
  return status.st_dev, status.st_ino
