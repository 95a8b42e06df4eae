"""Prints the size of each dependency on disk, as Markdown tables for docs/install.md.

    python -m tools.dependency_sizes

Sizes are those of the files installed in this environment, without bytecode, in 1e6 bytes.
"""

import functools
import importlib.metadata
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@functools.cache
def required(name: str, extra: str = "") -> frozenset[tuple[str, str]]:
  """Returns the requirements of a package here, each with one of its extras or none."""
  found = set()
  for text in importlib.metadata.requires(name) or ():
    wanted = Requirement(text)
    in_extra = wanted.marker and "extra" in str(wanted.marker)
    if bool(extra) != bool(in_extra):
      continue
    if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
      found |= {(canonicalize_name(wanted.name), part) for part in ("", *sorted(wanted.extras))}
  return frozenset(found)


def installed(roots: Iterable[tuple[str, str]]) -> set[str]:
  """Returns the given packages and all packages that are installed with them."""
  seen, left = set(), list(roots)
  while left:
    each = left.pop()
    if each not in seen:
      seen.add(each)
      left += required(*each)
  return {name for name, _ in seen}


@functools.cache
def megabytes(name: str) -> float:
  """Returns the size of a package's files; 0 if it is not installed."""
  try:
    files = importlib.metadata.files(name) or ()
  except importlib.metadata.PackageNotFoundError:
    return 0.0
  paths = [file.locate() for file in files if file.suffix != ".pyc"]
  return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def table(extra: str, base: set[str]) -> str:
  """Returns table rows for the requirements of the library or an extra, largest first.

  Args:
    extra: The extra; empty for what is always installed.
    base: Packages that are installed in any case.
  """
  roots = required("vitcomp_jax", extra)
  names = {name for name, _ in roots} - base
  everything = installed(roots) - base
  shared = everything - names
  rows = [(_total(everything), "together", "")]
  for name in names:
    mine = installed(root for root in roots if root[0] == name)
    brings = mine - installed(root for root in roots if root[0] != name) - base - {name}
    shared -= brings
    rows.append((_total({name, *brings}), f"`{name}`", _listed(brings)))
  if shared:
    rows.append((_total(shared), "what several of them bring", _listed(shared)))
  rows.sort(key=lambda row: (-row[0], row[1] != "together"))
  return "\n".join(f"| {what} | {size:.1f} | {brings} |" for size, what, brings in rows)


def _total(names: Iterable[str]) -> float:
  return sum(map(megabytes, names))


def _listed(names: Iterable[str]) -> str:
  """Returns names and sizes of packages from one megabyte up, and the number of smaller ones."""
  ordered = sorted(names, key=megabytes, reverse=True)
  large = [f"{name} {megabytes(name):.1f}" for name in ordered if megabytes(name) >= 1]
  small = len(ordered) - len(large)
  return ", ".join([*large, *([f"{small} smaller"] if small else [])])


def main() -> None:
  always = installed(required("vitcomp_jax")) | {"vitcomp-jax"}
  for extra in ("", "onnx", "tfds"):
    print(f"\n{extra or 'always'}\n\n| package | MB | of which others that only it brings |")
    print(f"|---|--:|---|\n{table(extra, always if extra else set())}")


if __name__ == "__main__":
  main()
