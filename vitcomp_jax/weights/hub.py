"""Finds weights on the Hugging Face hub: in the local cache, or over the network."""

import re
from pathlib import Path

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights import folders, formats
from vitcomp_jax.weights.unreadable import line

PREFIX = "hf-hub:"


def is_id(weights: str) -> bool:
  """Returns whether `weights` is a Hugging Face id; an existing file or folder takes precedence."""
  if weights.startswith(PREFIX):
    return True
  looks_alike = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", weights)
  is_file = weights.endswith(formats.SUFFIXES) or Path(weights).exists()
  return bool(looks_alike) and not is_file


def find(weights: str, cache_dir: str | None = None) -> Path:
  """Returns the local file of a repository's weights, after downloading it if necessary.

  Cached weights are used without network access. Otherwise the weights are downloaded, with all
  their shards and the repository's configs.

  Args:
    weights: `OWNER/NAME` or `hf-hub:OWNER/NAME`, either with or without `@REVISION`.
    cache_dir: Cache folder of the hub; None for the default.

  Returns:
    The file, or the index of its shards, in a folder that also holds its configs.

  Raises:
    UserError: If the file is not in the cache and cannot be downloaded, or several files are
      possible.
  """
  import huggingface_hub.constants  # slow to import, and rarely needed

  hub_id, _, revision = weights.removeprefix(PREFIX).partition("@")
  cache = Path(cache_dir or huggingface_hub.constants.HF_HUB_CACHE)
  try:
    path = _cached(cache, hub_id, revision or "main")
    return path or _downloaded(hub_id, revision or None, cache_dir)
  except UserError:
    raise
  # The hub client and the HTTP client below it raise errors of many unrelated types.
  except Exception as error:
    raise UserError(
      f"weights {hub_id}: none of {', '.join(folders.WEIGHTS)} is in the local hub cache {cache}, "
      f"and they could not be fetched ({line(error)}); check the id and the network, or give a "
      "file or a folder."
    ) from error


def _cached(cache: Path, hub_id: str, revision: str) -> Path | None:
  """Returns the weights in the cache; None if they, or some of their shards, are missing."""
  repository = cache / f"models--{hub_id.replace('/', '--')}"
  reference = repository / "refs" / revision
  commit = reference.read_text().strip() if reference.is_file() else revision
  snapshot = repository / "snapshots" / commit
  # An interrupted download leaves broken links in a snapshot.
  names = [path.name for path in snapshot.glob("*") if path.is_file()]
  name = folders.choose(names, hub_id)
  if name is None or not set(_shards(snapshot / name)) <= set(names):
    return None
  return snapshot / name


def _downloaded(hub_id: str, revision: str | None, cache_dir: str | None) -> Path:
  """Downloads weights, all their shards and the configs beside them."""
  import huggingface_hub

  def fetch(name: str) -> Path:
    path = huggingface_hub.hf_hub_download(hub_id, name, revision=revision, cache_dir=cache_dir)
    return Path(path)

  # Unlike `list_repo_files`, this fails at once if there is no network.
  about = huggingface_hub.HfApi().model_info(hub_id, revision=revision)
  names = [file.rfilename for file in about.siblings or []]
  name = folders.choose([name for name in names if "/" not in name], hub_id)
  if name is None:
    raise FileNotFoundError("the repository has no weights")
  path = fetch(name)
  for other in (*_shards(path), *(config for config in folders.CONFIGS if config in names)):
    fetch(other)
  return path


def _shards(path: Path) -> list[str]:
  """Returns the shards listed in an index; empty for other files."""
  return sorted(set(folders.shards(path).values())) if path.name.endswith(folders.INDEX) else []
