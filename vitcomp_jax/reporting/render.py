"""Documents made of blocks, written as Markdown and as a single self-contained HTML page.

Text is plain, except for `code` in backticks.
"""

import base64
import dataclasses
import html
import pathlib
import re
from collections.abc import Sequence
from typing import Protocol


class Block(Protocol):
  """A part of a document."""

  def markdown(self) -> str: ...

  def html(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Heading:
  text: str
  level: int = 2

  def markdown(self) -> str:
    return f"{'#' * self.level} {self.text}"

  def html(self) -> str:
    return f"<h{self.level}>{_inline(self.text)}</h{self.level}>"


@dataclasses.dataclass(frozen=True)
class Text:
  text: str

  def markdown(self) -> str:
    return self.text

  def html(self) -> str:
    return f"<p>{_inline(self.text)}</p>"


@dataclasses.dataclass(frozen=True)
class Items:
  lines: Sequence[str]

  def markdown(self) -> str:
    return "\n".join(f"- {line}" for line in self.lines)

  def html(self) -> str:
    lines = "\n".join(f"<li>{_inline(line)}</li>" for line in self.lines)
    return f"<ul>\n{lines}\n</ul>"


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of formatted cells, with names in the first column and numbers in the others."""

  caption: str
  heads: Sequence[str]
  lines: Sequence[Sequence[str]]

  def markdown(self) -> str:
    """Returns a table with aligned columns; numbers are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(self.heads, *self.lines, strict=True)]
    rules = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (w - 1)}:" for w in widths[1:])]
    table = "\n".join(
      "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
      for line in [self.heads, rules, *self.lines]
    )
    return f"{self.caption}\n\n{table}"

  def html(self) -> str:
    heads = "".join(f'<th scope="col">{_inline(head)}</th>' for head in self.heads)
    lines = []
    for first, *rest in self.lines:
      cells = "".join(f"<td>{_inline(cell)}</td>" for cell in rest)
      lines.append(f'<tr><th scope="row">{_inline(first)}</th>{cells}</tr>')
    body = "\n".join(lines)
    return (
      f"<figure>\n<figcaption>{_inline(self.caption)}</figcaption>\n"
      f'<div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n'
      f"<tbody>\n{body}\n</tbody>\n</table></div>\n</figure>"
    )


@dataclasses.dataclass(frozen=True)
class Picture:
  """A plot saved as PNG and SVG.

  Attributes:
    folder: Folder of the plot, in the document's folder.
    name: Name of the two files, without suffixes.
    alt: Kind of plot, as alternative text.
    caption: Description of the content.
  """

  folder: pathlib.Path
  name: str
  alt: str
  caption: str

  def markdown(self) -> str:
    return f"![{self.alt}]({self.folder.name}/{self.name}.png)\n\n*{self.caption}*"

  def html(self) -> str:
    """Returns a figure with the embedded SVG, or the PNG if there is no SVG."""
    svg, png = (self.folder / f"{self.name}.{kind}" for kind in ("svg", "png"))
    path, kind = (svg, "svg+xml") if svg.exists() else (png, "png")
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img alt="{html.escape(self.alt)}" src="data:image/{kind};base64,{data}">'
    caption = f"<figcaption>{_inline(self.caption)}</figcaption>"
    return f'<figure>\n<div class="wide">{image}</div>\n{caption}\n</figure>'


def to_markdown(blocks: Sequence[Block]) -> str:
  """Returns the text of a Markdown file."""
  return "\n\n".join(block.markdown() for block in blocks) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
  """Returns the text of an HTML page that needs no other files."""
  body = "\n".join(block.html() for block in blocks)
  return _PAGE.replace("TITLE", html.escape(title)).replace("BODY", body)


def _inline(text: str) -> str:
  return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --text: #1b1b1b; --page: #fff; --dim: #595959; --line: #d0d0d0; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --page: #16181b; --dim: #a8a8a8; --line: #43474d; }
}
* { box-sizing: border-box; }
body {
  max-width: 64rem; margin: 0 auto; padding: 1rem; color: var(--text); background: var(--page);
  font: 1rem/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); font-size: 1.3rem; }
p, li, figcaption { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
figcaption { padding: .4rem 0; color: var(--dim); font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; white-space: nowrap; }
thead th { white-space: nowrap; border-bottom-width: 2px; }
tbody th { font-weight: 400; }
figure { margin: 1.5rem 0; break-inside: avoid; }
img { display: block; max-width: max(100%, 36rem); padding: .5rem; background: #fff; }
code { font-size: .9em; }
@media print { body { max-width: none; padding: 0; } .wide { overflow: visible; } }
</style>
</head>
<body>
<main>
BODY
</main>
</body>
</html>
"""
