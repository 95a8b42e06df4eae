"""Which output a class is: by its name, or by its place."""

import pathlib

import pytest

from vitcomp_jax.data import class_names, labels
from vitcomp_jax.errors import UserError

ANIMALS = ("cat", "dog", "eel")


@pytest.mark.parametrize(
  ("names", "in_order", "natural"),
  [
    (["2", "10", "1"], ("1", "10", "2"), ("1", "2", "10")),
    (["b", "A", "c"], ("A", "b", "c"), ("A", "b", "c")),
    (["a", "B"], ("B", "a"), ("a", "B")),
    (["class_10", "class_9"], ("class_10", "class_9"), ("class_9", "class_10")),
    (["x²", "x1"], ("x1", "x²"), ("x1", "x²")),
  ],
)
def test_orders_of_folders(names, in_order, natural):
  assert labels.sort_classes(names) == in_order
  assert labels.sort_classes(names, "natural") == natural


def test_names_are_found_in_any_order():
  assert labels.match(["eel", "cat"], ANIMALS, "data") == (2, 0)
  with pytest.raises(
    UserError, match=r"among the model's 3 \(cat, dog, eel\), got 1 others \(fox\)"
  ):
    labels.match(["fox", "cat"], ANIMALS, "data")


@pytest.mark.parametrize("names", [ANIMALS, ("dog",), ("eel", "dog", "cat")])
def test_known_names_are_the_outputs(names, caplog):
  assert labels.name_outputs(names, 3, ANIMALS, "data") == ANIMALS
  assert not caplog.records


def test_wordnet_ids_are_imagenets_numbers(caplog):
  ids = class_names.imagenet_ids()
  assert (len(ids), ids[0], ids[217], ids[569]) == (1000, "n01440764", "n02102040", "n03417042")
  some = ("n02102040", "n03417042")
  assert labels.name_outputs(some, 1000, (), "data") == ids
  assert labels.name_outputs(some, 1000, class_names.readable(ids), "data") == ids
  assert labels.match(some, ids, "data") == (217, 569)
  assert not caplog.records
  with pytest.raises(UserError, match="expected 12 classes"):
    labels.name_outputs(some, 12, (), "data")
  with pytest.raises(UserError, match="got 2 others"):
    labels.name_outputs(some, 1000, tuple(f"other {i}" for i in range(1000)), "data")


def test_other_names_are_refused():
  with pytest.raises(UserError, match=r"got 1 others \(fox\); rename"):
    labels.name_outputs(("cat", "dog", "fox"), 3, ANIMALS, "data")


@pytest.mark.parametrize("known", [(), ANIMALS])
def test_places_are_taken_on_trust_with_a_warning(known, caplog):
  assert labels.name_outputs(("0", "1", "2"), 3, known, "data") == ("0", "1", "2")
  (record,) = caplog.records
  assert "numbered by their order (0 is 0, 1 is 1, 2 is 2)" in record.getMessage()


def test_numbers_that_the_weights_know_are_names():
  known = ("0", "1", "2")
  assert labels.name_outputs(("2", "0"), 3, known, "data") == known
  with pytest.raises(UserError, match=r"got 1 others \(3\)"):
    labels.name_outputs(("1", "2", "3"), 3, known, "data")


def test_outputs_of_a_head_that_is_trained():
  assert labels.name_trained_outputs(("eel", "cat"), 3, ANIMALS, "data") == ANIMALS
  assert labels.name_trained_outputs(("a", "b"), 4, ANIMALS, "data") == (
    *("a", "b", "unused 2", "unused 3"),
  )
  ids = class_names.imagenet_ids()
  assert labels.name_trained_outputs(ids[3:5], 1000, (), "data") == ids
  with pytest.raises(UserError, match="expected at least the 3 of data, got 2"):
    labels.name_trained_outputs(ANIMALS, 2, (), "data")


def test_numbers_are_places_in_an_order_of_other_names(caplog):
  known = tuple(f"c{i}" for i in range(10))
  numbers = tuple(str(i) for i in range(1, 11))
  in_text = labels.sort_classes(numbers)
  assert labels.name_outputs(in_text, 10, known, "data") == numbers != in_text
  assert len(caplog.records) == 1
  assert labels.name_outputs(in_text, 10, known, "data", "sorted") == in_text


@pytest.mark.parametrize("known", [(), ANIMALS])
def test_a_part_of_classes_without_names_is_refused(known):
  with pytest.raises(UserError, match=r"expected 3 classes, .* got 2 \(0, 2\); name the outputs"):
    labels.name_outputs(("0", "2"), 3, known, "data")


@pytest.mark.parametrize("order", [None, "sorted", "natural"])
def test_two_possible_orders_are_told_unless_one_is_asked_for(order, caplog):
  names = labels.sort_classes([str(i) for i in range(1, 11)], order or "sorted")
  assert labels.name_outputs(names, 10, (), "data", order) == names
  told = [r.getMessage() for r in caplog.records if "natural order" in r.getMessage()]
  assert len(told) == (order is None)
  if told:
    assert (
      "class 1 is 10 in sorted order (torchvision's, which is taken), and 2 in natural" in told[0]
    )


def test_names_are_read_from_a_file(tmp_path: pathlib.Path):
  path = tmp_path / "names.txt"
  path.write_text("cat\ndog \neel\n\n", encoding="utf-8")
  assert labels.read_names(str(path)) == ANIMALS
  path.write_text("\ufeffcat\r\ndog\r\neel", encoding="utf-8")
  assert labels.read_names(str(path)) == ANIMALS
  assert labels.read_names("imagenet1k") == class_names.imagenet_ids()


@pytest.mark.parametrize(
  ("content", "said"),
  [
    ("cat\ndog\ncat\n", "got 'cat' 2 times"),
    ("cat\n\ndog", "got an empty line"),
    ("", "got none"),
    (b"\xff\xfe\x00", "expected imagenet1k, or a text file"),
    (None, "expected imagenet1k, or a text file"),
  ],
)
def test_names_that_cannot_be_read_are_refused(content, said, tmp_path: pathlib.Path):
  path = tmp_path / "names.txt"
  if content is not None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
  with pytest.raises(UserError, match=said) as info:
    labels.read_names(str(path))
  assert "\n" not in str(info.value)
