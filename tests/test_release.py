"""The wheel, made from the source archive, has all files and runs where there is no checkout."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")
SHORT = ("--config.search.steps=2", "--config.search.choose_images=0")
SHORT += ("--config.search.batch_size=4", "--config.data.eval_examples=100")
SHORT += ("--config.evaluate.baselines=()", "--config.compilation_cache=none")


def _files(folder: pathlib.Path) -> set[str]:
  return {
    file.relative_to(folder).as_posix()
    for file in folder.rglob("*")
    if file.is_file() and file.suffix != ".pyc"
  }


def _run(*command: str | pathlib.Path, cwd: pathlib.Path, **environment: str) -> str:
  variables = {**os.environ, **environment}
  result = subprocess.run(
    command, cwd=cwd, env=variables, capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stderr
  return result.stdout


@pytest.mark.slow
def test_the_wheel_of_the_source_archive_runs_without_a_checkout(tmp_path):
  checkout, dist, installed = (tmp_path / name for name in ("checkout", "dist", "installed"))
  checkout.mkdir()
  for name in SOURCES:
    shutil.copy(ROOT / name, checkout)
  for name in ("vitcomp_jax", "configs", "docs"):
    shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("*.pyc"))
  archive = "from setuptools import build_meta; build_meta.build_sdist('../dist')"
  _run(sys.executable, "-c", archive, cwd=checkout)
  (archive,) = dist.glob("*.tar.gz")
  pip = (sys.executable, "-m", "pip", "-q")
  _run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", dist, archive, cwd=tmp_path)
  (wheel,) = dist.glob("*.whl")
  packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
  expected = {f"vitcomp_jax/{name}" for name in _files(ROOT / "vitcomp_jax")}
  expected |= {f"vitcomp_jax/configs/{name}" for name in _files(ROOT / "configs")}
  assert packed == expected and "vitcomp_jax/py.typed" in packed

  _run(*pip, "install", "--no-deps", "--target", installed, wheel, cwd=tmp_path)
  empty = tmp_path / "empty"
  empty.mkdir()
  where = "import vitcomp_jax.configs as c; print(c.__file__)"
  assert str(installed) in _run(sys.executable, "-c", where, cwd=empty, PYTHONPATH=str(installed))
  command = (sys.executable, "-m", "vitcomp_jax.main", "--config", "quickstart", *SHORT)
  _run(*command, cwd=empty, PYTHONPATH=str(installed))
  assert (empty / "runs" / "quickstart" / "report.md").exists()
