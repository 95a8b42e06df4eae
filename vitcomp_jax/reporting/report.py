"""The report of a run, `report.md` and `report.html`.

Its tables and text show only what was measured in the run.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from vitcomp_jax import multihost
from vitcomp_jax.atomic import write_text
from vitcomp_jax.errors import UserError
from vitcomp_jax.plans import Plan
from vitcomp_jax.reporting import render
from vitcomp_jax.reporting.captions import ABSENT, CAPTIONS
from vitcomp_jax.reporting.findings import plan_blocks, search_blocks, slim_items
from vitcomp_jax.reporting.render import Block, Heading, Items, Picture, Text
from vitcomp_jax.reporting.tables import comparison_blocks, rows_table, speed_blocks
from vitcomp_jax.results import BenchmarkResult, Result, SearchResult, SlimResult


@dataclasses.dataclass(frozen=True)
class Findings:
  """Results of a run's stages so far, apart from the table.

  Attributes:
    plan: Current plan; None: dense.
    counts: Tokens after pruning and after merging in each layer of the plan.
    search: Result of this run's search, if any.
    slim: Result of this run's slimming, if any.
    benchmark: Result of this run's benchmark, if any.
  """

  plan: Plan | None = None
  counts: Sequence[tuple[int, int]] = ()
  search: SearchResult | None = None
  slim: SlimResult | None = None
  benchmark: BenchmarkResult | None = None


def write_report(
  workdir: pathlib.Path, result: Result, found: Findings, complete: bool = False
) -> None:
  """Writes `report.md` and `report.html`.

  Args:
    workdir: Folder for the report, which may hold `figures/`.
    result: Content of `result.json`.
    found: Other results to report.
    complete: Whether all plots have been drawn, so that missing ones are explained.

  Raises:
    UserError: If the files cannot be written.
  """
  blocks: list[Block] = [rows_table(result.rows)]
  if found.slim is not None:
    blocks += [Heading("Slimming"), slim_items(found.slim)]
  if found.search is not None:
    blocks += [Heading("Search"), *search_blocks(found.search)]
  if found.plan is not None or found.search is not None:
    blocks += [Heading("Plan"), *plan_blocks(found.plan, found.counts, found.search)]
  if found.benchmark is not None:
    blocks += [Heading("Speed"), *speed_blocks(found.benchmark)]
  _write(workdir, result, blocks, complete)


def write_comparison(workdir: pathlib.Path, result: Result, complete: bool = False) -> None:
  """Writes the report of a comparison; arguments and errors as for `write_report`."""
  _write(workdir, result, comparison_blocks(result), complete)


def _write(workdir: pathlib.Path, result: Result, blocks: Sequence[Block], complete: bool) -> None:
  """Adds the parts that all reports share, and writes both files."""
  title, pictures = f"Results on {result.dataset}", _pictures(workdir)
  about = f"Split `{result.split}`, {result.examples:,} examples, on {result.device}."
  whole: list[Block] = [Heading(title, 1), Text(about), *blocks]
  if pictures:
    whole += [Heading("Figures"), *pictures]
  names = {picture.name for picture in pictures}
  reasons = [reason for name, reason in ABSENT.items() if name not in names]
  if complete and reasons:
    whole += [Heading("Not in this report"), Items(reasons)]
  versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
  whole += [Heading("Versions"), Text(versions)]
  if multihost.is_first():  # other processes have no plots
    _write_file(workdir / "report.md", render.to_markdown(whole))
    _write_file(workdir / "report.html", render.to_html(title, whole))


def _write_file(path: pathlib.Path, text: str) -> None:
  try:
    write_text(path, text)
  except OSError as error:
    raise UserError(
      f"{path}: expected a file that can be written, got none ({error.strerror}); move away what "
      "stands in its place."
    ) from error


def _pictures(workdir: pathlib.Path) -> list[Picture]:
  """Returns the existing plots with their captions."""
  folder = workdir / "figures"
  names = {path.stem for path in folder.glob("*.png")}
  known = [(name, *CAPTIONS[name]) for name in CAPTIONS if name in names]
  others = [(name, name.replace("_", " ").capitalize()) for name in sorted(names - set(CAPTIONS))]
  known += [(name, words, f"{words}.") for name, words in others]
  return [Picture(folder, *about) for about in known]
