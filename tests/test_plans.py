"""Plans: the published ones, the round trip through JSON, and every refusal."""

import json

import pytest

from vitcomp_jax import api, macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.reducers import KeepAll, PruneMerge
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.plans import list_plans, load_plan, make_plan, parse_plan, save_plan

MINI = "vit_mini_patch3_30"


def plan_json(**changes):
  values = {
    "format": "vitcomp-plan",
    "version": 1,
    "variant": MINI,
    "num_tokens": 101,
    "gmacs": 0.0,
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
  if plan.variant == "caformer_s36":
    assert len(plan.layers) == 21
    assert all(layer.reduce.prune_keep >= layer.reduce.merge_keep for layer in plan.layers)
    return
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


@pytest.mark.parametrize("name", [n for n in list_plans() if "caformer" not in n])
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
  assert again.gmacs == pytest.approx(plan.gmacs)
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


def test_gmacs_are_those_of_the_plans_own_image_size():
  layers = [{"prune_keep": 60, "merge_keep": 50}] * 8
  plan = parse_plan(plan_json(num_tokens=145, layers=layers))  # 12 by 12 patches
  spec = get_spec(MINI, image_size=36)
  assert plan.gmacs == pytest.approx(macs.static_macs(spec, plan.layers_for(spec)) / 1e9, rel=1e-12)


REDUCER = {"type": "prune_merge", "prune_keep": 50, "merge_keep": 40}


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ([], "expected a JSON object"),
    (plan_json(format="other"), 'expected a JSON object with "format": "vitcomp-plan"'),
    (plan_json(version=2), "expected version 1, got 2"),
    (plan_json(variant=None), r"expected variant \(str\), got None"),
    (plan_json(variant="vit_minni"), "variant 'vit_minni' is not known; near it are"),
    (plan_json(num_tokens="101"), r"expected num_tokens \(int\), got '101'"),
    (plan_json(layers={}), r"expected layers \(list\)"),
    (plan_json(layers=[{}] * 7), "expected 8 layers for vit_mini_patch3_30, got 7"),
    (with_layer(2, 5), "layer 2: expected an object, got 5"),
    (with_layer(2, {"prune": 5}), "layer 2: 'prune' is not a key of a layer"),
    (with_layer(2, {"prune_keep": 5, "reduce": REDUCER}), "expected `reduce` or kept counts"),
    (with_layer(2, {"prune_keep": 5}), "prune_merge needs merge_keep"),
    (with_layer(2, {"prune_keep": 5, "merge_keep": 0}), "above 0 for merge_keep, got 0"),
    (with_layer(2, {"prune_keep": 5.5, "merge_keep": 5}), "above 0 for prune_keep, got 5.5"),
    (with_layer(2, {"prune_keep": True, "merge_keep": 5}), "above 0 for prune_keep, got True"),
    (with_layer(2, {"mlp_dim": "256"}), "above 0 for mlp_dim, got '256'"),
    (
      with_layer(2, {"reduce": {"type": "tome"}}),
      "reducer among keep_all, prune_merge, got 'tome'",
    ),
    (with_layer(2, {"select": "keep"}), "reducer among keep_all, prune_merge, got 'keep'"),
    (with_layer(2, {"reduce": {**REDUCER, "r": 1}}), "'r' is not an option of prune_merge"),
    (with_layer(2, {"reduce": {**REDUCER, "prune_keep": "5"}}), "above 0 for prune_keep, got '5'"),
    (with_layer(2, {"reduce": {"type": "prune_merge"}}), "needs prune_keep, merge_keep"),
  ],
)
def test_a_plan_that_is_not_one(values, message):
  with pytest.raises(UserError, match=message):
    parse_plan(values)


def test_a_file_that_is_not_json(tmp_path):
  path = tmp_path / "plan.json"
  path.write_text("{")
  with pytest.raises(UserError, match="expected JSON"):
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


@pytest.mark.parametrize(
  ("layer", "message"),
  [
    ({"prune_keep": 102, "merge_keep": 50}, "layer 4: expected prune_keep from 2 to 101, got 102"),
    ({"prune_keep": 50, "merge_keep": 1}, "layer 4: expected merge_keep from 2 to 101, got 1"),
  ],
)
def test_a_count_out_of_range(layer, message):
  plan = parse_plan(with_layer(4, layer))
  with pytest.raises(UserError, match=message):
    plan.layers_for(get_spec(MINI))


def test_load_takes_plans_by_value_and_by_name():
  plan = load_plan("diffrate/deit_tiny@0.9")
  model, _ = api.load("deit_tiny_patch16_224", plan=plan)
  assert model.layers == plan.layers_for(model.spec)
  assert api.count_cost(model).gmacs == pytest.approx(0.902145, abs=1e-6)
