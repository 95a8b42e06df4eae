"""The tables of README and docs are what the stored results say."""

import pytest

from tools import results_tables


def test_every_table_is_what_its_results_say(capsys):
  assert results_tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_has_its_place():
  texts = [(results_tables.ROOT / name).read_text("utf-8") for name in results_tables.DOCUMENTS]
  for name in results_tables.TABLES:
    assert sum(f"<!-- table {name} -->\n" in text for text in texts) == 1, name


@pytest.mark.parametrize("change", [("84.9 / 0.858", "84.9 / 0.857"), ("34.9 %", "33.9 %")])
def test_another_figure_is_found(change, tmp_path, monkeypatch, capsys):
  text = (results_tables.ROOT / "docs/results.md").read_text("utf-8")
  assert change[0] in text
  (tmp_path / "docs").mkdir()
  (tmp_path / "docs/results.md").write_text(text.replace(*change, 1), "utf-8")
  (tmp_path / "docs/results").symlink_to(results_tables.ROOT / "docs/results")
  monkeypatch.setattr(results_tables, "ROOT", tmp_path)
  monkeypatch.setattr(results_tables, "DOCUMENTS", ("docs/results.md",))
  assert results_tables.main(["--check"]) == 1
  assert "docs/results.md: differs" in capsys.readouterr().out
  assert results_tables.main([]) == 0
  assert (tmp_path / "docs/results.md").read_text("utf-8") == text


def test_a_column_for_each_cost():
  rows = [
    {"name": "dense", "gmacs": 1.2, "loss": 0.5},
    {"name": "tome@0.5", "gmacs": 0.6551, "loss": 1.0},
    {"name": "evit@0.5", "gmacs": 0.6549, "loss": 1.1},
    {"name": "tome@0.4", "gmacs": 0.5, "loss": 2.0},
  ]
  assert results_tables.pivot(rows, results_tables.plain("loss", ".1f")).splitlines() == [
    "| GMACs | 1.200 | 0.655 | 0.500 |",
    "|---|--:|--:|--:|",
    "| dense | 0.5 | – | – |",
    "| ToMe | – | 1.0 | 2.0 |",
    "| EViT | – | 1.1 | – |",
  ]
