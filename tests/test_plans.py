"""Plans: the published ones, the round trip through JSON, and every refusal."""

import dataclasses
import json

import pytest

from vitcomp_jax import api
from vitcomp_jax.cost import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.models.reducers import KeepAll
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.plans import list_plans, load_plan, make_plan, parse_plan, save_plan
from vitcomp_jax.weights import loading

MINI = "vit_mini_patch3_30"


def plan_json(**changes):
  values = {
    "format": "vitcomp-plan",
    "version": 1,
    "variant": MINI,
    "num_tokens": 101,
    "made_by": {"method": "diffrate"},
    "layers": [
      {
        "num_heads": 2,
        "head_dim": 32,
        "mlp_dim": 256,
        "select": {"type": "keep_all"},
        "reduce": {"type": "prune_merge", "prune_keep": 100 - 5 * i, "merge_keep": 98 - 5 * i},
      }
      for i in range(8)
    ],
  }
  return values | changes


def with_layer(index, layer):
  values = plan_json()
  values["layers"][index] = layer
  return values


def test_there_are_31_published_plans():
  names = list_plans()
  assert len(names) == 31
  assert "diffrate/deit_small@2.9" in names


@pytest.mark.parametrize("name", list_plans())
def test_a_published_plan(name):
  plan = load_plan(name)
  assert plan.made_by["source"] == "DiffRate, arXiv 2305.17997"
  spec = get_spec(plan.variant)
  assert macs.static_macs(spec, plan.layers_for(spec)) / 1e9 == pytest.approx(plan.gmacs, abs=1e-6)


def test_the_authors_accuracy_stands_with_its_origin():
  published = load_plan("diffrate/deit_small@2.9").made_by["published"]
  assert published == {"top1": 79.538, "top5": 94.828, "by": "the authors"}
  published = load_plan("diffrate/deit_small@2.3").made_by["published"]
  assert published == {"top1": 78.75, "by": "re-measured by others (READMEs of ToaSt and MaMe)"}
  assert "published" not in load_plan("diffrate/deit_small@3.1").made_by


def test_a_plan_for_a_model_that_is_not_here():
  with pytest.raises(UserError, match="caformer_s36"):
    load_plan("diffrate/caformer_s36@5.6").layers_for(get_spec("deit_small_patch16_224"))


@pytest.mark.parametrize("name", list_plans())
def test_json_round_trip_of_a_published_plan(name):
  plan = load_plan(name)
  again = parse_plan(json.loads(json.dumps(plan.to_json())))
  assert again.gmacs == pytest.approx(plan.gmacs, abs=1e-6)
  assert (again.variant, again.num_tokens, again.layers) == (
    plan.variant,
    plan.num_tokens,
    plan.layers,
  )
  assert again.made_by == plan.made_by


def test_file_round_trip(tmp_path):
  spec = get_spec(MINI)
  layers = parse_plan(plan_json()).layers_for(spec)
  plan = make_plan(spec, layers, {"method": "diffrate", "steps": 3})
  save_plan(plan, tmp_path / "plan.json")
  again = load_plan(str(tmp_path / "plan.json"))
  assert again.layers == plan.layers
  assert again.layers_for(spec) == layers
  assert again.made_by == plan.made_by
  assert again.gmacs == round(plan.gmacs, 6)
  assert again.to_json() == plan.to_json()


def test_options_of_a_reducer_survive():
  reduce = {"type": "prune_merge", "prune_keep": 50, "merge_keep": 40, "signed_similarity": True}
  plan = parse_plan(with_layer(3, {"reduce": reduce}))
  assert plan.layers[3].reduce == PruneMerge(50, 40, signed_similarity=True)
  assert plan.to_json()["layers"][3]["reduce"] == reduce


def test_the_short_form_is_the_long_form():
  short = plan_json(
    layers=[{"prune_keep": 100 - 5 * i, "merge_keep": 98 - 5 * i} for i in range(8)]
  )
  spec = get_spec(MINI)
  a, b = parse_plan(short), parse_plan(plan_json())
  assert a.layers_for(spec) == b.layers_for(spec)
  assert a.gmacs == b.gmacs


def test_an_empty_layer_keeps_all():
  plan = parse_plan(plan_json(layers=[{}] * 8))
  spec = get_spec(MINI)
  assert isinstance(plan.layers[0].reduce, KeepAll)
  assert plan.layers_for(spec) == spec.dense_layers
  assert plan.gmacs == macs.static_macs(spec, spec.dense_layers) / 1e9


def test_counts_may_rise():
  keeps = [101, 60, 80, 70, 90, 40, 50, 30]
  plan = parse_plan(
    plan_json(
      layers=[{"prune_keep": k, "merge_keep": k + 5} for k in keeps[1:]]
      + [{"prune_keep": 20, "merge_keep": 20}]
    )
  )
  spec = get_spec(MINI)
  counts = [n for _, n in macs.static_counts(spec, plan.layers_for(spec))]
  assert counts == [60, 60, 60, 60, 40, 40, 30, 20]


def test_the_files_own_gmacs_count_if_its_layers_cost_that():
  spec = get_spec(MINI)
  for_100_classes = get_spec(MINI, num_classes=100)
  plan = make_plan(for_100_classes, parse_plan(plan_json()).layers_for(spec), {})
  again = parse_plan(plan.to_json())
  assert again.gmacs == pytest.approx(plan.gmacs, abs=1e-6)
  assert again.gmacs - parse_plan(plan_json()).gmacs == pytest.approx(64 * 90 / 1e9, abs=1e-6)


@pytest.mark.parametrize("gmacs", [0.0, 0.05, float("nan"), 10**400, True, None, "0.03"])
def test_gmacs_that_the_layers_do_not_cost_are_counted_again(gmacs):
  assert parse_plan(plan_json(gmacs=gmacs)).gmacs == parse_plan(plan_json()).gmacs


def test_gmacs_are_those_of_the_plans_own_image_size():
  layers = [{"prune_keep": 60, "merge_keep": 50}] * 8
  plan = parse_plan(plan_json(num_tokens=145, layers=layers))  # 12 by 12 patches
  spec = get_spec(MINI, image_size=36)
  assert plan.gmacs == pytest.approx(macs.static_macs(spec, plan.layers_for(spec)) / 1e9, rel=1e-12)


REDUCER = {"type": "prune_merge", "prune_keep": 50, "merge_keep": 40}
COUNT = "expected a whole number from 1 to 2147483647 for"


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ([], r'expected a JSON object with "format": "vitcomp-plan", got \[\]'),
    ([plan_json()], r"expected a JSON object .* got \[\{"),
    (None, "expected a JSON object .* got None"),
    (plan_json(format="other"), 'expected a JSON object with "format": "vitcomp-plan"'),
    (plan_json(version=2), "expected version 1, got 2"),
    (plan_json(version=[1]), r"expected version 1, got \[1\]"),
    (plan_json(variant=None), "expected variant to be a string, got None"),
    (plan_json(variant="vit_minni"), "variant 'vit_minni' is not known; near it are"),
    (plan_json(num_tokens="101"), f"{COUNT} num_tokens, got '101'"),
    (plan_json(num_tokens=0), f"{COUNT} num_tokens, got 0"),
    (plan_json(num_tokens=-101), f"{COUNT} num_tokens, got -101"),
    (plan_json(num_tokens=True), f"{COUNT} num_tokens, got True"),
    (plan_json(num_tokens=101.0), f"{COUNT} num_tokens, got 101.0"),
    (plan_json(num_tokens=10**400), f"{COUNT} num_tokens, got 1000.*000"),
    (plan_json(num_tokens=1), "expected num_tokens above the 1 prefix tokens .* got 1"),
    (plan_json(layers={}), "expected layers to be a list, got {}"),
    (plan_json(layers=None), "expected layers to be a list, got None"),
    (plan_json(layers=[{}] * 7), "expected 8 layers for vit_mini_patch3_30, got 7"),
    (
      plan_json(layer=[], gmac=1),
      "expected keys among format, .*, made_by, layers, got 'layer', 'gmac'.",
    ),
    (plan_json(made_by=None), "expected made_by to be an object, got None"),
    (plan_json(made_by="me"), "expected made_by to be an object, got 'me'"),
    (plan_json(made_by=[]), r"expected made_by to be an object, got \[\]"),
  ],
)
def test_a_plan_that_is_not_one(values, message):
  with pytest.raises(UserError, match=f"^p.json: {message}"):
    parse_plan(values, "p.json")


@pytest.mark.parametrize(
  ("layer", "message"),
  [
    (5, "expected an object, got 5"),
    (None, "expected an object, got None"),
    ([], r"expected an object, got \[\]"),
    ({"prune": 5}, "expected keys among num_heads, .*, got 'prune'"),
    ({"prune_keep": 5, "reduce": REDUCER}, "expected `reduce` or kept counts, got both"),
    ({"prune_keep": 5}, "prune_merge needs prune_keep, merge_keep, got prune_keep"),
    ({"prune_keep": 5, "merge_keep": 0}, f"{COUNT} merge_keep, got 0"),
    ({"prune_keep": 5.5, "merge_keep": 5}, f"{COUNT} prune_keep, got 5.5"),
    ({"prune_keep": True, "merge_keep": 5}, f"{COUNT} prune_keep, got True"),
    ({"prune_keep": 10**400, "merge_keep": 5}, f"{COUNT} prune_keep, got 1000.*000"),
    ({"prune_keep": 102, "merge_keep": 50}, "expected prune_keep from 2 to 101, got 102"),
    ({"prune_keep": 50, "merge_keep": 1}, "expected merge_keep from 2 to 101, got 1"),
    ({"mlp_dim": "256"}, f"{COUNT} mlp_dim, got '256'"),
    ({"mlp_dim": None}, f"{COUNT} mlp_dim, got None"),
    ({"num_heads": 10**400}, f"{COUNT} num_heads, got 1000.*000"),
    (
      {"reduce": "keep_all"},
      'reduce: expected an object such as {"type": "keep_all"}, got \'keep_',
    ),
    ({"reduce": ["keep_all"]}, r"reduce: expected an object such as .* got \['keep_all'\]"),
    ({"reduce": None}, "reduce: expected an object such as .* got None"),
    ({"reduce": {}}, "reduce: expected a type among keep_all, .*, got nothing"),
    ({"reduce": {"type": []}}, r"reduce: expected a type among .*, got \[\]"),
    ({"reduce": {"type": {}}}, "reduce: expected a type among .*, got {}"),
    ({"reduce": {"type": "tome"}}, "reduce: expected a type among .*, got 'tome'"),
    ({"reduce": {"type": "keep_all", "r": 1}}, r"reduce: .* keep_all \(none\), got 'r'"),
    ({"reduce": {**REDUCER, "r": 1}}, r"options of prune_merge \(prune_keep, .*\), got 'r'"),
    ({"reduce": {**REDUCER, "prune_keep": "5"}}, f"reduce: {COUNT} prune_keep, got '5'"),
    ({"reduce": {**REDUCER, "merge_keep": 102}}, "expected merge_keep from 2 to 101, got 102"),
    ({"reduce": {"type": "prune_merge"}}, "prune_merge needs prune_keep, merge_keep, got none"),
    (
      {"reduce": {**REDUCER, "signed_similarity": [1]}},
      r"reduce: expected true or false for signed_similarity, got \[1\]",
    ),
    ({"reduce": {**REDUCER, "whole_sizes": 1}}, "expected true or false for whole_sizes, got 1"),
    ({"select": "keep"}, "select: expected an object such as .* got 'keep'"),
    (
      {"select": REDUCER},
      "select: expected a type among keep_all, keep_positions, predictor_select, got 'prune_merge'",
    ),
  ],
)
def test_a_layer_that_is_not_one(layer, message):
  with pytest.raises(UserError, match=f"^p.json: layer 2: .*{message}"):
    parse_plan(with_layer(2, layer), "p.json")


def test_a_file_that_is_not_json(tmp_path):
  path = tmp_path / "plan.json"
  for text in ("", "{", "[" * 100_000, '{"gmacs": 1' + "0" * 5000 + "}"):
    path.write_text(text)
    with pytest.raises(UserError, match="plan.json: expected JSON"):
      load_plan(str(path))


@pytest.mark.parametrize(
  ("before", "after", "said"),
  [
    ('"version": 1', '"version": 1, "version": 1', "'version' more than once"),
    ('"prune_keep": 60', '"prune_keep": 60, "prune_keep": 5', "'prune_keep' more than once"),
    ('"made_by": {}', '"made_by": {"loss": NaN}', "NaN, which is no finite number"),
    ('"made_by": {}', '"made_by": {"loss": -Infinity}', "-Infinity, which"),
    ('"made_by": {}', '"made_by": {"loss": 1e999}', "1e999, which"),
  ],
)
def test_what_python_reads_over_is_refused(before, after, said, tmp_path):
  layers = [{"prune_keep": 60, "merge_keep": 50}] * 8
  text = json.dumps(plan_json(layers=layers, made_by={}))
  assert before in text
  path = tmp_path / "plan.json"
  path.write_text(text.replace(before, after, 1))
  with pytest.raises(UserError, match=f"plan.json: expected JSON with finite .* else: {said}"):
    load_plan(str(path))


def test_an_error_names_the_file(tmp_path):
  path = tmp_path / "mine.json"
  path.write_text(json.dumps(with_layer(2, {"reduce": "keep_all"})))
  with pytest.raises(UserError, match="mine.json: layer 2: reduce: expected an object"):
    load_plan(str(path))


def test_a_plan_that_is_not_there_names_near_ones():
  with pytest.raises(UserError, match="near it: .*diffrate/deit_small@2.9"):
    load_plan("diffrate/deit_small@2.8")


@pytest.mark.parametrize(
  ("variant", "image_size", "message"),
  [
    ("vit_large_patch16_224", None, "expected 24 layers .* got 12"),
    ("deit_small_patch16_224", 256, "expected 257 tokens .* at 256 pixels, got 197"),
    ("deit_base_patch16_224", None, "expected 768 channels .* got 384"),
    ("deit_small_distilled_patch16_224", None, "expected 198 tokens .* got 197"),
  ],
)
def test_a_plan_for_another_model(variant, image_size, message):
  with pytest.raises(UserError, match=message):
    load_plan("diffrate/deit_small@2.9").layers_for(get_spec(variant, image_size=image_size))


def test_a_count_out_of_range():
  plan = parse_plan(plan_json())
  layers = list(plan.layers)
  layers[4] = dataclasses.replace(layers[4], reduce=PruneMerge(50, 1))
  plan = dataclasses.replace(plan, layers=tuple(layers))
  with pytest.raises(UserError, match="layer 4: expected merge_keep from 2 to 101, got 1"):
    plan.layers_for(get_spec(MINI))


@pytest.mark.parametrize(
  ("layer", "message"),
  [
    ({"num_heads": 4, "head_dim": 16}, "num_heads 2, got 4; attn_index and mlp_index say which"),
    ({"num_heads": 1}, "expected num_heads 2, got 1; attn_index and mlp_index say which heads"),
    ({"head_dim": 33}, "expected head_dim from 1 to 32, got 33"),
    ({"head_dim": 8, "value_dim": 40}, "expected value_dim from 1 to 32, got 40"),
    ({"mlp_dim": 257}, "expected mlp_dim from 1 to 256, got 257"),
    ({"mlp_dim": 0}, "expected a whole number from 1 to .* for mlp_dim, got 0"),
    ({"value_dim": 8.0}, "expected a whole number from 1 to .* for value_dim, got 8.0"),
    ({"head_dim": "8"}, "expected a whole number from 1 to .* for head_dim, got '8'"),
    ({"rotated": [[0, 1], [16, 17]]}, "expected rotated to hold nothing, got"),
    ({"rotated": [[0, 1.0]]}, "expected rotated to be a list of lists of whole numbers, got"),
    ({"attn_index": [[0, 1]]}, "expected mlp_index to hold places below 256, .*, got nothing"),
    ({"mlp_index": [0]}, "expected attn_index to be a list of equally long lists, got nothing"),
    ({"attn_index": [[0, 1], [2]], "mlp_index": [0]}, "a list of equally long lists, got"),
    ({"attn_index": [5], "mlp_index": [0]}, "attn_index to hold places below 64, each once"),
    ({"attn_index": [[0, 64]], "mlp_index": [0]}, "attn_index to hold places below 64, each once"),
    ({"attn_index": [[0, 0]], "mlp_index": [0]}, "attn_index to hold places below 64, each once"),
    ({"attn_index": [[0, 1]], "mlp_index": [-2]}, "mlp_index to hold places below 256, each once"),
    ({"attn_index": [[0, 1]], "mlp_index": [-1]}, "mlp_index to hold places below 256, each once"),
    ({"attn_index": [[0, True]], "mlp_index": [0]}, "attn_index to hold places below 64"),
    ({"attn_index": [[0, 1]], "mlp_index": [0], "head_dim": 3}, "expected head_dim 2, got 3"),
    ({"attn_index": [[0, 1]], "mlp_index": [0], "value_dim": 3}, "expected value_dim 2, got 3"),
    (
      {"attn_index": [[0, 1]], "mlp_index": [0], "rotated": [[0]]},
      "expected indices, or widths of their own, got both",
    ),
    (
      {"select": {"type": "keep_positions", "positions": [0, 5, 3]}},
      "expected ascending positions",
    ),
    ({"select": {"type": "keep_positions", "positions": [0, 101]}}, "expected positions below 101"),
    ({"select": {"type": "keep_positions"}}, "keep_positions needs positions, got none"),
  ],
)
def test_slimmed_layers_that_are_none(layer, message):
  with pytest.raises(UserError, match=f"layer 4: .*{message}"):
    parse_plan(with_layer(4, layer))


def test_slimmed_layers_are_all_or_none():
  with pytest.raises(UserError, match="attn_index and mlp_index in every layer or in none"):
    parse_plan(with_layer(4, {"attn_index": [[0, 1]], "mlp_index": [0, 3, -1]}))


def test_load_takes_plans_by_value_and_by_name(monkeypatch):
  monkeypatch.setattr(loading, "load_params", lambda *_, **__: {})  # to make them takes seconds
  plan = load_plan("diffrate/deit_tiny@0.9")
  model, _ = api.load("deit_tiny_patch16_224", plan=plan)
  assert model.layers == plan.layers_for(model.spec)
  assert api.count_cost(model).gmacs == pytest.approx(0.902145, abs=1e-6)
