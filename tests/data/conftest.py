"""A place on the path for `tiny`, and the data sets it makes."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import tiny


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """TFDS's data_dir with the sets of `tiny` as ArrayRecord; not to be changed."""
  directory = tmp_path_factory.mktemp("tfds")
  tiny.prepare(directory)
  return directory


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  """An image folder: two splits of two classes of three images."""
  tiny.folder(tmp_path)
  return tmp_path
