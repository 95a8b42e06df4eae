"""The notebooks: their addresses, what is stored in them, and that they run from start to end."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob("colabs/*.ipynb"))
REPOSITORY = re.search(r'^REPOSITORY = "(.*)"$', (ROOT / "setup.py").read_text(), re.M)[1]
_KINDS = {"stream", "display_data", "execute_result"}  # of outputs; errors are not among them


def _cells(path: pathlib.Path, kind: str) -> list[dict]:
  return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> pathlib.Path:
  return request.param


def test_there_are_three():
  assert [path.stem for path in NOTEBOOKS] == ["compress_your_vit", "quickstart", "token_maps"]


def test_addresses_are_those_of_setup_py(notebook):
  owner = REPOSITORY.removeprefix("https://github.com/")
  address = f"https://colab.research.google.com/github/{owner}/blob/main/colabs/{notebook.name}"
  assert f"]({address})" in "".join(_cells(notebook, "markdown")[0]["source"])
  assert f"]: {address}\n" in (ROOT / "README.md").read_text()
  install = "".join(_cells(notebook, "code")[0]["source"])
  assert install.endswith(f"--constraint constraints.txt git+{REPOSITORY}")
  addresses = re.findall(r"github(?:\.com)?/([\w.-]+/[\w.-]+)", notebook.read_text())
  assert set(addresses) == {owner}


def test_all_install_alike():
  firsts = {"".join(_cells(path, "code")[0]["source"]) for path in NOTEBOOKS}
  assert len(firsts) == 1


def test_outputs_are_stored(notebook):
  cells = _cells(notebook, "code")
  assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
  assert not cells[0]["outputs"]  # Nothing was installed.
  outputs = [output for cell in cells for output in cell["outputs"]]
  assert {output["output_type"] for output in outputs} <= {
    "stream",
    "display_data",
    "execute_result",
  }
  assert not any(output.get("name") == "stderr" for output in outputs)
  pictures = [output for output in outputs if "image/png" in output.get("data", {})]
  assert len(pictures) >= 2


@pytest.mark.slow
def test_a_notebook_runs(notebook, tmp_path):
  """From start to end, in a folder of its own, and without installing anything."""
  import nbclient
  import nbformat

  stored = nbformat.read(notebook, as_version=4)
  resources = {"metadata": {"path": tmp_path}}
  ran = nbclient.NotebookClient(stored, timeout=300, resources=resources).execute()
  assert not (tmp_path / "constraints.txt").exists()
  for cell in ran.cells:
    kinds = {output.output_type for output in cell.get("outputs", ())}
    assert kinds <= _KINDS
