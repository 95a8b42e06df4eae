"""The figures are valid and show what they should; the report has what was measured, once."""

import base64
import dataclasses
import html.parser
import pathlib
import re
import xml.etree.ElementTree

import numpy as np
import PIL.Image
import pytest

from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.plans import Plan, PlanLayer
from vitcomp_jax.reporting import plots, render, report
from vitcomp_jax.reporting.plots import labels, style, tokens
from vitcomp_jax.reporting.report import Findings
from vitcomp_jax.results import Result, Row, SearchResult

PLAN = [(17, 17), (16, 14), (13, 10), (9, 6)]
ROWS = (
  Row(method="dense", top1=91.2, top5=99.8, loss=0.31, gmacs=4.0, params_m=22.05),
  Row(method="diffrate", top1=90.5, top5=99.7, loss=0.33, gmacs=2.9, params_m=22.05),
  Row(method="uniform", top1=88.25, top5=99.1, loss=0.41, gmacs=2.9, params_m=22.05),
)
RESULT = Result("fashion_mnist", "test", 1000, "1 x cpu", {"jax": "0.9", "flax": "0.12"}, ROWS)
SEARCH = SearchResult(
  plan="diffrate",
  steps=300,
  images=19200,
  minutes=3.25,
  chosen_step=300,
  budget_gmacs=2.8,
  raw_gmacs=2.91,
  gmacs=2.795,
  offset=-1.0,
  raw_counts=((17, 17), (16, 15), (14, 11), (10, 7)),
  counts=tuple(PLAN),
)
LAYERS = (PlanLayer(), *(PlanLayer(reduce=PruneMerge(*counts)) for counts in PLAN[1:]))
FOUND = Findings(plan=Plan("vit_x", 17, LAYERS, 2.795), counts=PLAN)
SEARCHED = dataclasses.replace(FOUND, search=SEARCH)


def check(figure, folder: pathlib.Path) -> None:
  """It can be saved as both kinds of file, and nothing else stays."""
  plots.save(figure, folder / "figures", "x")
  names = ["x.png", "x.svg"]
  with PIL.Image.open(folder / "figures/x.png") as image:
    assert image.format == "PNG"
    assert min(image.size) > 300
    colors = image.convert("RGB").getcolors(maxcolors=image.width * image.height)
  assert colors is not None and len(colors) > 8
  assert xml.etree.ElementTree.parse(folder / "figures/x.svg").getroot().tag.endswith("svg")
  assert sorted(p.name for p in (folder / "figures").iterdir()) == names


def some_images(n: int, side: int) -> np.ndarray:
  return np.random.default_rng(0).integers(256, size=(n, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("num_plans", [1, 3])
def test_schedule(tmp_path, num_plans):
  check(plots.schedules({f"plan {i}": PLAN for i in range(num_plans)}, 17), tmp_path)


def test_equal_figures_are_equal_files(tmp_path):
  for folder in ("a", "b"):
    plots.save(plots.kept_widths({"hidden units": [0.5, 0.25]}), tmp_path / folder, "x")
  for kind in ("png", "svg"):
    first, second = ((tmp_path / folder / f"x.{kind}").read_bytes() for folder in ("a", "b"))
    assert first == second and b"Date" not in first and b"date" not in first


@pytest.mark.parametrize("loss", [0.5, 50.0])  # on a linear and on a logarithmic scale
def test_search_curves(tmp_path, loss):
  records = [
    {"step": s, "loss": loss / s, "task_loss": 0.3, "gmacs": 4 - 0.1 * s, "tokens": [17, 9]}
    for s in range(1, 11)
  ]
  figure = plots.search_curves(records, [2.9] * 6 + [2.5] * 4)
  check(figure, tmp_path)
  plan, budget = figure.axes[1].lines
  assert list(plan.get_ydata()) == [r["gmacs"] for r in records]
  assert figure.axes[1].get_ylabel() == "GMACs per image"
  assert list(budget.get_ydata()) == [2.9] * 6 + [2.5] * 4


def test_accuracy_against_gmacs(tmp_path):
  unmeasured = Row(method="random", gmacs=2.9)
  figure = plots.accuracy_against_gmacs([*ROWS, unmeasured])
  check(figure, tmp_path)
  again = plots.accuracy_against_gmacs([row.to_json() for row in ROWS])
  points, same = ([line.get_xydata().tolist() for line in f.axes[0].lines] for f in (figure, again))
  assert points == same and len(points) >= len(ROWS)


def test_published_points_stand_beside_measured_ones():
  published = {"dense (a README)": [(4.1, 91.3)], "ToMe (a paper)": [(3.5, 90.0), (2.5, 89.0)]}
  axes = plots.accuracy_against_gmacs(ROWS, published=published).axes[0]
  faces = {line.get_label(): line.get_markerfacecolor() for line in axes.lines}
  assert {name for name, face in faces.items() if face == "none"} == set(published)
  assert {"dense, measured", "diffrate, measured", "uniform, measured"} < set(faces)
  marks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}
  assert len(marks) == len(axes.lines)


def test_labels_of_near_points_do_not_overlap():
  figure, axes = style.subplots(width=7.0, height=4.6)
  points = [(2.9 + 0.01 * i, 79 + 0.02 * (i % 2), f"method{i}@2.9", "#000000") for i in range(8)]
  axes.plot([2, 4], [70, 80])
  labels.label_points(figure, axes, points)
  boxes = [text.get_window_extent() for text in axes.texts]
  assert len(boxes) == 8
  assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize("side", [12, 224])
def test_token_maps(tmp_path, side):
  whole, merged = np.tile(np.arange(16) + 1, (2, 1)), np.tile(np.arange(16) % 5 - 1, (2, 1))
  sources = {"layer 1": whole, "layer 3": merged}
  titles = ["boot", "a shirt with a very long name"]
  figure = plots.token_maps(some_images(2, side), sources, 1, (4, 4), titles)
  check(figure, tmp_path)
  texts = [text.get_text() for text in figure.texts]
  heads = ["layer 1: 17 tokens", "layer 3: 5 tokens"]
  assert texts[:3] == ["boot", *heads] and texts[4:6] == heads
  assert texts[3].startswith("a shirt with a very l") and texts[3].endswith("…")


def test_attention_maps(tmp_path):
  share = np.linspace(0, 0.2, 16, dtype=np.float32)
  share[5] = -1
  image = some_images(1, 12)
  shares = {f"layer {i}": share[None] for i in range(6)}
  check(plots.cls_attention(image, shares, (4, 4), ["a"]), tmp_path)
  picture = plots.attention_map(image[0], share, (4, 4))
  cells = picture[30::60, 30::60].reshape(16, 3).astype(int)
  brightness = cells.sum(axis=1)
  assert (np.diff(np.delete(brightness, 5)) >= 0).all()
  pruned = picture[60:120, 60:120].reshape(-1, 3)
  assert len(np.unique(pruned, axis=0)) == 2 and pruned.max() < 80


def test_kept_units(tmp_path):
  rng = np.random.default_rng(0)
  figure = plots.kept_units(rng.random((3, 2, 8)) < 0.5, np.ones((3, 32), bool))
  check(figure, tmp_path)
  assert "100.0 % kept" in figure.axes[1].get_xlabel()


def test_paint_groups_equals_the_plain_loop():
  image, grid, patch = some_images(1, 12)[0], (4, 3), (3, 4)
  source = np.array([1, 2, 2, -1, 5, 1, 1, 2, -1, 7, 7, 2])
  painted = plots.paint_groups(image, source, grid)
  cells = {
    p: (slice(3 * (p // 3), 3 * (p // 3) + 3), slice(4 * (p % 3), 4 * (p % 3) + 4))
    for p in range(12)
  }
  for token in (1, 2, 7):
    members = [p for p in range(12) if source[p] == token]
    total = np.zeros(3)
    for p in members:
      for y in range(patch[0]):
        for x in range(patch[1]):
          total += image[cells[p]][y, x]
    mean = np.rint(total / (len(members) * patch[0] * patch[1]))
    for p in members:
      assert (painted[cells[p]] == mean).all()
  assert (painted[cells[4]] == image[cells[4]]).all()  # a token of its own
  for p in (3, 8):
    assert painted[cells[p]].max() <= 51  # pruned
  assert painted.dtype == np.uint8


def test_token_map_outlines_merged_groups_only():
  image = np.full((4, 4, 3), 200, np.uint8)
  alone = plots.token_map(image, np.array([1, 2, 3, 4]), (2, 2))
  merged = plots.token_map(image, np.array([1, 1, 3, 4]), (2, 2))
  orange = np.array(tokens._OUTLINE)
  assert alone.shape == (240, 240, 3)
  assert not (alone == orange).all(-1).any()
  outlined = (merged == orange).all(-1)
  assert outlined[119:121].all() and not outlined[:115, 115:125].any()
  assert not outlined[125:].any()


def test_tokens_left_never_grow():
  assert plots.tokens_left([(20, 17), (12, 14), (13, 9)], 17) == [(17, 17), (12, 12), (12, 9)]
  assert plots.tokens_left([(16, 15), (20, 20)]) == [(16, 15), (15, 15)]


def test_report_has_each_row_once_and_all_that_was_measured(tmp_path):
  rows = list(ROWS)
  rows[1] = dataclasses.replace(rows[1], images_per_second={"32": 88.0, "1": 40.06})
  (tmp_path / "figures").mkdir()
  for name in ("schedule.png", "schedule.svg", "own_drawing.png"):
    (tmp_path / "figures" / name).write_text(name)
  report.write_report(tmp_path, dataclasses.replace(RESULT, rows=tuple(rows)), SEARCHED)
  text = (tmp_path / "report.md").read_text(encoding="utf-8")
  lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
  for row in rows:
    assert sum(cells[:1] == [row.name] for cells in lines) == 1
  speeds = ["40.1", "88.0"]
  expected = ["diffrate", "90.50", "99.70", "0.3300", "2.900", "72.5 %", "22.05", *speeds]
  assert expected in lines
  assert ["2", "16", "15", "16", "14"] in lines
  for part in (
    "1,000 examples",
    "1 x cpu",
    "Budget: 2.800 GMACs",
    "-1",
    "19,200",
    "jax 0.9",
  ):
    assert part in text
  assert "figures/schedule.png" in text and "figures/own_drawing.png" in text
  assert sorted(p.name for p in tmp_path.iterdir()) == ["figures", "report.html", "report.md"]


def test_report_leaves_out_what_is_not_there(tmp_path):
  rows = (Row(method="diffrate", top1=90.5, loss=0.3, gmacs=0.0359),)
  report.write_report(tmp_path, dataclasses.replace(RESULT, rows=rows), Findings())
  text = (tmp_path / "report.md").read_text(encoding="utf-8")
  for absent in ("figures/", "Search", "Plan", "top-5", "of dense", "images/s", "params", "None"):
    assert absent not in text
  assert "0.03590" in text


def test_report_of_a_given_plan(tmp_path):
  report.write_report(tmp_path, RESULT, FOUND)
  text = (tmp_path / "report.md").read_text(encoding="utf-8")
  lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
  assert [lines[i] for i in range(len(lines)) if lines[i][:1] in (["1"], ["2"], ["3"])] == [
    ["1", "17", "17"],
    ["2", "16", "14"],
    ["3", "13", "10"],
  ]
  assert "learnt" not in text


def test_report_of_a_search_without_an_offset(tmp_path):
  search = dataclasses.replace(SEARCH, offset=None)
  report.write_report(tmp_path, RESULT, dataclasses.replace(FOUND, search=search))
  text = (tmp_path / "report.md").read_text(encoding="utf-8")
  assert "adjusted to the budget: 2.795 GMACs\n" in text and "offset" not in text


class _Page(html.parser.HTMLParser):
  """The cells, the pictures and the addresses of a page; refuses tags that do not match."""

  def __init__(self, text: str) -> None:
    super().__init__()
    self.open: list[str] = []
    self.rows: list[list[str]] = []
    self.images: list[dict[str, str | None]] = []
    self.addresses: list[str | None] = []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    found = dict(attrs)
    self.addresses += [found[key] for key in ("src", "href") if key in found]
    assert tag not in ("script", "link", "iframe")
    if tag in ("meta", "img"):
      self.images += [found] if tag == "img" else []
      return
    self.open.append(tag)
    if tag == "tr":
      self.rows.append([])
    elif tag in ("td", "th"):
      self.rows[-1].append("")

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] in ("td", "th"):
      self.rows[-1][-1] += data


def test_the_html_report_is_the_other_one_in_one_file(tmp_path):
  rows = tuple(dataclasses.replace(row, method=f"{row.method} <&>") for row in ROWS)
  (tmp_path / "figures").mkdir()
  for name in ("schedule.png", "schedule.svg", "own_drawing.png"):
    (tmp_path / "figures" / name).write_text(name)
  result = dataclasses.replace(RESULT, rows=rows)
  report.write_report(tmp_path, result, SEARCHED, complete=True)
  text = (tmp_path / "report.html").read_text(encoding="utf-8")
  page = _Page(text)
  markdown = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
  lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown if "|" in line]
  assert page.rows == [line for line in lines if not line[0].startswith(":-")]
  kinds = {"image/svg+xml": b"schedule.svg", "image/png": b"own_drawing.png"}
  assert page.addresses == [
    f"data:{kind};base64,{base64.b64encode(data).decode()}" for kind, data in kinds.items()
  ]
  assert all(image["alt"] for image in page.images)
  assert "http" not in re.sub(r"base64,[^\"]*", "", text) and "url(" not in text
  assert "Widths and masks: no plan" in text and "Search curves: this run" in text
  assert "Schedules and token maps" not in text
  assert "<code>compare</code>" in text


def test_a_report_of_nothing(tmp_path):
  result = dataclasses.replace(RESULT, rows=())
  report.write_report(tmp_path, result, Findings(), complete=True)
  for name in ("report.md", "report.html"):
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert "No model was measured" in text and "no model of this run removes tokens" in text
  _Page(text)


def test_blocks_say_the_same_twice():
  blocks = [render.Heading("A & B", 1), render.Items(["x `y < z`", "w"])]
  assert render.to_markdown(blocks) == "# A & B\n\n- x `y < z`\n- w\n"
  page = render.to_html("A & B", blocks)
  assert "<title>A &amp; B</title>" in page
  assert "<h1>A &amp; B</h1>\n<ul>\n<li>x <code>y &lt; z</code></li>\n<li>w</li>\n</ul>" in page


def test_what_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "report.md").mkdir()
  with pytest.raises(UserError, match=r"report\.md: expected a file that can be written, got none"):
    report.write_report(tmp_path, RESULT, FOUND)
