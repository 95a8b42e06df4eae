"""Names, layouts, and fitting weights to another model."""

import jax
import numpy as np
import pytest

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights.dialects import authors
from vitcomp_jax.weights.positions import resample_positions
from vitcomp_jax.weights.timm import check, port
from vitcomp_jax.weights.timm_names import timm_name, timm_shapes, to_flax, to_timm

D, CLASSES = 6, 3


def linear(name, out, into):
  return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name):
  return {f"{name}.weight": (D,), f"{name}.bias": (D,)}


def block(i, layer_scale=False):
  name = f"blocks.{i}"
  shapes = norm(f"{name}.norm1") | linear(f"{name}.attn.qkv", 3 * D, D)
  shapes |= linear(f"{name}.attn.proj", D, D) | norm(f"{name}.norm2")
  shapes |= linear(f"{name}.mlp.fc1", 2 * D, D) | linear(f"{name}.mlp.fc2", D, 2 * D)
  if layer_scale:
    shapes |= {f"{name}.ls1.gamma": (D,), f"{name}.ls2.gamma": (D,)}
  return shapes


def vit(rows=5, heads=("head",), last="norm", classes=CLASSES, depth=2, **more):
  shapes = {"cls_token": (1, 1, D), "pos_embed": (1, rows, D)}
  shapes |= {"patch_embed.proj.weight": (D, 3, 2, 4), "patch_embed.proj.bias": (D,)}
  for i in range(depth):
    shapes |= block(i, **more)
  shapes |= norm(last)
  for head in heads:
    shapes |= linear(head, classes, D)
  return shapes


def attention_pool():
  shapes = {"attn_pool.latent": (1, 1, D)} | norm("attn_pool.norm")
  for name, out, into in (("q", D, D), ("kv", 2 * D, D), ("proj", D, D)):
    shapes |= linear(f"attn_pool.{name}", out, into)
  return shapes | linear("attn_pool.mlp.fc1", 2 * D, D) | linear("attn_pool.mlp.fc2", D, 2 * D)


def draw(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def expect(shapes):
  """The model's Flax tree of shapes."""
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), to_flax(draw(shapes)))


def assert_same(got, want):
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def fit(state, shapes, grid=(2, 2), prefix_positions=1, **options):
  """`port`, its result under timm's names again."""
  params = port(state, expect(shapes), grid=grid, prefix_positions=prefix_positions, **options)
  return to_timm(params)


FAMILIES = {
  "deit": vit(),
  "distilled": vit(6, ("head", "head_dist")) | {"dist_token": (1, 1, D)},
  "mae": vit(last="fc_norm"),
  "dinov2_reg4": vit(4, (), layer_scale=True) | {"reg_token": (1, 4, D)},
  "clip": vit() | norm("norm_pre"),
  "siglip": vit(4) | attention_pool(),
  "caformer": {
    "stem.conv.weight": (D, 3, 7, 7),
    "stages.1.blocks.11.token_mixer.act1.scale": (1,),
    "stages.1.blocks.11.token_mixer.act1.bias": (1,),
    "stages.1.blocks.11.norm1.weight": (D,),
    "stages.1.blocks.11.res_scale1.scale": (D,),
  },
  "predictor": {"blocks.3.select.in_conv.0.weight": (D,), "blocks.3.select.in_conv.1.bias": (D,)},
}


@pytest.mark.parametrize("shapes", FAMILIES.values(), ids=FAMILIES)
def test_round_trip_is_exact(shapes):
  state = draw(shapes)
  params = to_flax(state)
  assert_same(to_timm(params), state)
  assert timm_shapes(params) == shapes


def test_layouts():
  state = draw(FAMILIES["siglip"] | {"blocks.0.ls1.gamma": (D,)})
  params = to_flax(state)
  qkv, convolution = state["blocks.1.attn.qkv.weight"], state["patch_embed.proj.weight"]
  np.testing.assert_array_equal(params["blocks_1"]["attn"]["qkv"]["kernel"], qkv.T)
  for o, i, y, x in np.ndindex(convolution.shape):
    assert params["patch_embed"]["proj"]["kernel"][y, x, i, o] == convolution[o, i, y, x]
  np.testing.assert_array_equal(params["norm"]["scale"], state["norm.weight"])
  np.testing.assert_array_equal(params["norm"]["bias"], state["norm.bias"])
  np.testing.assert_array_equal(params["blocks_0"]["ls1"]["gamma"], state["blocks.0.ls1.gamma"])
  np.testing.assert_array_equal(params["attn_pool"]["latent"], state["attn_pool.latent"])
  fc1 = state["attn_pool.mlp.fc1.weight"]
  np.testing.assert_array_equal(params["attn_pool"]["mlp"]["fc1"]["kernel"], fc1.T)
  assert all(array.flags.c_contiguous for array in jax.tree.leaves(params))


def test_names():
  assert timm_name(("blocks_10", "mlp", "fc1", "kernel")) == "blocks.10.mlp.fc1.weight"
  assert timm_name(("stages_1", "blocks_2", "norm1", "scale")) == "stages.1.blocks.2.norm1.weight"
  assert timm_name(("cls_token",)) == "cls_token"


def test_to_timm_takes_jax_arrays_and_keeps_values():
  state = to_timm({"head": {"kernel": jax.numpy.arange(6.0).reshape(2, 3)}})
  np.testing.assert_array_equal(state["head.weight"], np.arange(6.0).reshape(2, 3).T)


def test_check_lists_every_kind():
  found = draw(vit())
  del found["blocks.1.attn.proj.bias"]
  found["blocks.0.mlp.fc1.weight"] = np.ones((11, D), np.float32)
  found["dist_token"] = np.ones((1, 1, D), np.float32)
  with pytest.raises(UserError) as info:
    check(to_flax(found), expect(vit()))
  assert str(info.value) == (
    "weights do not fit the model: 1 missing: blocks.1.attn.proj.bias (6,); "
    "1 unexpected: dist_token (1, 1, 6); "
    "1 misshapen: blocks.0.mlp.fc1.weight (expected (12, 6), got (11, 6)). "
    "Give weights of this variant, or the variant of these weights."
  )


def test_check_caps_long_lists():
  with pytest.raises(UserError, match=r"24 missing: blocks\.2\..* and 14 more\."):
    check(to_flax(draw(vit())), expect(vit(depth=4)))


def test_check_accepts_what_fits():
  check(to_flax(draw(vit())), expect(vit()))


@pytest.mark.parametrize("name", ["deit", "distilled", "mae", "clip"])
def test_port_of_fitting_weights_changes_nothing(name):
  state, shapes = draw(FAMILIES[name]), FAMILIES[name]
  prefix = 2 if name == "distilled" else 1
  assert_same(fit(state, shapes, prefix_positions=prefix), state)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("prefix", "grid"), [(1, (3, 3)), (0, (5, 2)), (2, (1, 4))])
def test_port_resamples_positions(prefix, grid, antialias):
  state = draw(vit(prefix + 4))
  rows = prefix + grid[0] * grid[1]
  # As many patches on another grid are told by their grid alone.
  old_grid = (2, 2) if grid == (1, 4) else None
  got = fit(state, vit(rows), grid, prefix, antialias=antialias, old_grid=old_grid)
  want = resample_positions(state["pos_embed"], prefix, (2, 2), grid, antialias)
  assert_same(got, state | {"pos_embed": want})


def test_port_resamples_from_a_non_square_grid_that_is_named():
  state = draw(vit(7))
  got = fit(state, vit(5), old_grid=(2, 3))
  want = resample_positions(state["pos_embed"], 1, (2, 3), (2, 2), True)
  np.testing.assert_array_equal(got["pos_embed"], want)


def test_port_keeps_positions_whose_count_fits_unless_their_grid_is_known(caplog):
  caplog.set_level("INFO")
  state = draw(vit(5))
  assert_same(fit(state, vit(5), (1, 4)), state)
  assert not caplog.records
  got = fit(state, vit(5), (1, 4), old_grid=(4, 1))
  want = resample_positions(state["pos_embed"], 1, (4, 1), (1, 4), True)
  np.testing.assert_array_equal(got["pos_embed"], want)
  assert "of 4 x 1 patches resampled to 1 x 4" in caplog.text


def test_port_keeps_non_square_positions_of_the_same_grid():
  state = draw(vit(7))
  assert_same(fit(state, vit(7), (2, 3)), state)


def test_port_reports_positions_of_no_known_grid():
  with pytest.raises(UserError, match=r"pos_embed \(expected \(1, 5, 6\), got \(1, 7, 6\)\)"):
    fit(draw(vit(7)), vit(5))


@pytest.mark.parametrize("heads", [("head",), ("head", "head_dist")])
def test_model_without_classifier_drops_it(heads):
  state = draw(vit(heads=heads))
  want = {name: array for name, array in state.items() if not name.startswith("head")}
  assert_same(fit(state, vit(heads=())), want)


@pytest.mark.parametrize("heads", [("head",), ("head", "head_dist")])
@pytest.mark.parametrize("held", [True, False])
def test_fresh_classifier(heads, held):
  state = draw(vit(heads=heads if held else ()))
  shapes = vit(heads=heads, classes=7)
  fresh = draw(shapes, seed=1)
  got = fit(state, shapes, initial=lambda: to_flax(fresh))
  want = {name: (fresh if name.startswith("head") else state)[name] for name in shapes}
  assert_same(got, want)


def test_fitting_classifier_is_kept_although_a_fresh_one_is_there():
  state = draw(vit())
  assert_same(fit(state, vit(), initial=lambda: to_flax(draw(vit(), seed=1))), state)


def test_other_number_of_classes_is_refused_unless_fresh_is_allowed():
  with pytest.raises(UserError, match="they know 3 classes, the model has 7"):
    fit(draw(vit()), vit(classes=7))


def test_half_a_classifier_is_a_damaged_file():
  state = draw(vit())
  del state["head.bias"]
  with pytest.raises(UserError, match=r"1 missing: head\.bias"):
    fit(state, vit(), initial=lambda: to_flax(draw(vit(), seed=1)))


def test_distilled_weights_do_not_fit_the_plain_model():
  state = draw(FAMILIES["distilled"])
  with pytest.raises(UserError, match=r"unexpected: .*head_dist\.weight.*dist_token.*pos_embed"):
    fit(state, vit())


MAE_DECODER = {
  "mask_token": (1, 1, 4),
  "decoder_pos_embed": (1, 5, 4),
  "decoder_embed.weight": (4, D),
  "decoder_blocks.0.norm1.weight": (4,),
  "decoder_norm.weight": (4,),
  "decoder_pred.bias": (9,),
}


def test_mae_pretraining_weights_with_fresh_classifier():
  state = authors.to_timm(draw(vit(heads=()) | MAE_DECODER))
  shapes = vit(last="fc_norm")
  fresh = draw(shapes, seed=1)
  got = fit(state, shapes, initial=lambda: to_flax(fresh))
  new = ("head", "fc_norm")
  assert_same(got, {n: (fresh if n.startswith(new) else state)[n] for n in shapes})


@pytest.mark.parametrize("heads", [("head",), ()])
def test_mae_pretraining_weights_without_fresh_classifier(heads):
  with pytest.raises(UserError, match=r"pre-training: expected fc_norm.weight .* got norm.weight"):
    fit(draw(vit(heads=())), vit(last="fc_norm", heads=heads))


def test_mae_pretraining_weights_need_a_classifier_to_train():
  with pytest.raises(UserError, match="pre-training"):
    fit(draw(vit(heads=())), vit(last="fc_norm", heads=()), initial=dict)


def test_pre_logits_are_left_out():
  state = draw(vit())
  assert_same(fit(state | draw(linear("pre_logits.fc", D, D)), vit()), state)


@pytest.mark.parametrize("name", ["decoder.weight", "mask_tokens", "momentum.weight"])
def test_nothing_else_is_left_out(name):
  with pytest.raises(UserError, match=f"1 unexpected: {name}"):
    fit(draw(vit() | {name: (2, 2)}), vit())


def test_what_stands_for_masked_patches_is_left_out():
  state = draw(vit())
  assert_same(fit(state | {"mask_token": np.zeros((1, D))}, vit()), state)


def test_port_does_not_change_its_input():
  state = draw(vit(heads=()) | {"mask_token": (1, D)})
  before = {name: array.copy() for name, array in state.items()}
  fit(state, vit(), initial=lambda: to_flax(draw(vit(), seed=1)))
  assert_same(state, before)
