"""What a cut leaves out can be left out: the extracted network equals the masked one."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcomp_jax as vc
from tests.cost.test_macs import embed, traced
from tests.models import forward, random_images, random_params, small_spec
from vitcomp_jax.config import ViTSlimOptions
from vitcomp_jax.cost import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.vit_slim.authors import authors_cost, from_authors, to_authors
from vitcomp_jax.methods.vit_slim.search import (
  Masks,
  ViTSlim,
  deploy,
  fold,
  masked_layers,
)
from vitcomp_jax.models.slicing import slice_params
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.plans import load_plan, make_plan, parse_plan, save_plan
from vitcomp_jax.weights import files
from vitcomp_jax.weights.loading import save_params

KINDS = ("dims", "heads", "uniform")


def random_arch(method, spec, seed, patches=True):
  """Masks as a search may leave them; patches all open if asked."""
  rng = np.random.default_rng(seed)
  arch = jax.tree.map(lambda z: jnp.asarray(rng.normal(0.5, 0.5, z.shape), z.dtype), method.init())
  if not patches:
    for block in arch.values():
      block["token_gate"]["zeta"] = jnp.full_like(block["token_gate"]["zeta"], 3.0)
  return arch


_CUTS = dict(
  kind=st.sampled_from(KINDS),
  heads=st.sampled_from((1, 2, 4)),
  budgets=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)),
  tile=st.sampled_from((1, 8)),
  seed=st.integers(0, 2**16),
)


@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
@hypothesis.given(**_CUTS)
def test_extracted_equals_masked(kind, heads, budgets, tile, seed):
  _check_extracted(kind, heads, budgets, tile, seed)


@pytest.mark.slow
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(**_CUTS)
def test_extracted_equals_masked_in_more_cases(kind, heads, budgets, tile, seed):
  _check_extracted(kind, heads, budgets, tile, seed)


def _check_extracted(kind, heads, budgets, tile, seed):
  spec = small_spec(num_heads=heads, depth=2)
  method = ViTSlim(spec, ViTSlimOptions(attn=kind))
  arch = random_arch(method, spec, seed, patches=False)
  masks = method.cut(arch, (*budgets, 1.0), min_units=2)
  params, images = random_params(spec, seed), random_images(spec, 3, seed)
  masked = forward(spec, masked_layers(spec, masks), {"params": params}, images)
  layers, indices = deploy(spec, masks, tile)
  slimmed_params = slice_params(params, indices)
  slimmed = forward(spec, layers, {"params": slimmed_params}, images)
  np.testing.assert_allclose(slimmed.logits, masked.logits, rtol=0, atol=1e-5)
  cost = vc.count_cost(ViT(spec, layers))
  assert traced(spec, layers) + embed(spec) == macs.static_macs(spec, layers) == cost.gmacs * 1e9
  assert sum(leaf.size for leaf in jax.tree.leaves(slimmed_params)) == cost.params


@pytest.mark.parametrize("kind", KINDS)
def test_folded_weights_do_what_the_soft_masks_did(kind):
  spec = small_spec(depth=2)
  method = ViTSlim(spec, ViTSlimOptions(attn=kind))
  arch = random_arch(method, spec, 0)
  for block in arch.values():
    block["token_gate"]["zeta"] = jnp.full_like(block["token_gate"]["zeta"], 20.0)  # tanh: 1
  params, images = random_params(spec), random_images(spec, 2)
  soft = forward(spec, method.layers(), {"params": params, "arch": arch}, images)
  folded = forward(spec, spec.dense_layers, {"params": fold(spec, params, arch)}, images)
  np.testing.assert_allclose(folded.logits, soft.logits, rtol=0, atol=1e-5)


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(budget=st.floats(0.1, 1), prefix=st.integers(0, 2), seed=st.integers(0, 2**16))
def test_removed_patches_cost_nothing(budget, prefix, seed):
  spec = small_spec(num_registers=prefix, depth=3)
  method = ViTSlim(spec)
  masks = method.cut(random_arch(method, spec, seed), (1.0, 1.0, budget), min_units=prefix + 2)
  layers, indices = deploy(spec, masks)
  assert traced(spec, layers) + embed(spec) == macs.static_macs(spec, layers)
  kept = masks.patch[:, spec.num_prefix :].sum(axis=1) + spec.num_prefix
  assert macs.static_counts(spec, layers) == [(n, n) for n in kept.tolist()]


def test_the_masks_of_the_authors_names_come_back(tmp_path):
  spec = small_spec()
  method = ViTSlim(spec)
  arch = random_arch(method, spec, 0)
  files.write(to_authors(arch), str(tmp_path / "masks.safetensors"))
  state = files.read(str(tmp_path / "masks.safetensors"))
  assert state["blocks.3.attn.zeta"].shape == (1, 1, 2, 1, 16)
  jax.tree.map(np.testing.assert_array_equal, from_authors(state), arch)


def test_removed_patches_are_gone():
  spec = small_spec(pool="size_mean")
  method = ViTSlim(spec)
  masks = method.cut(random_arch(method, spec, 0), (1.0, 1.0, 0.5))
  assert not masks.patch[-1].all()
  layers, indices = deploy(spec, masks)
  params = slice_params(random_params(spec), indices)
  out = forward(spec, layers, {"params": params}, random_images(spec, 2))
  kept = masks.patch[:, 1:].sum(axis=1) + 1
  assert [t.x.shape[1] for t in out.layers] == kept.tolist()
  assert macs.static_counts(spec, layers) == [(n, n) for n in kept.tolist()]
  held = np.asarray(out.tokens.source[0]) >= 0
  np.testing.assert_array_equal(held, masks.patch[-1, 1:])


def test_a_patch_dropped_once_stays_dropped():
  spec = small_spec()
  method = ViTSlim(spec)
  masks = method.cut(random_arch(method, spec, 1), (1.0, 1.0, 0.4))
  assert (masks.patch[:-1] >= masks.patch[1:]).all()


def test_equal_masks_are_all_kept():
  """What was never searched is not cut, whatever its budget."""
  spec = small_spec()
  method = ViTSlim(spec)
  masks = method.cut(method.init(), (0.3, 0.3, 0.3))
  assert all(getattr(masks, kind).all() for kind in ("attn", "mlp", "patch"))


def test_an_empty_layer_is_refused_by_name():
  spec = small_spec()
  method = ViTSlim(spec)
  arch = random_arch(method, spec, 0)
  gate = arch["blocks_2"]["hidden_gate"]
  gate["zeta"] = jnp.full_like(gate["zeta"], -9.0)
  with pytest.raises(UserError, match="hidden unit in every layer, got none in layer 2"):
    method.cut(arch, (1.0, 0.5, 1.0))
  masks = method.cut(arch, (1.0, 0.5, 1.0), min_units=3)
  assert masks.mlp[2].sum() == 3


def test_a_slimmed_plan_loads_from_either_weights(tmp_path):
  variant = "vit_mini_patch3_30"
  dense, params = vc.load(variant, "bundled")
  method = ViTSlim(dense.spec)
  arch = random_arch(method, dense.spec, 0, patches=True)
  masks = method.cut(arch, (0.5, 0.5, 0.7), min_units=2)
  layers, indices = deploy(dense.spec, masks)
  save_plan(make_plan(dense.spec, layers, {"method": "vit_slim"}, indices), tmp_path / "plan.json")
  save_params(dense.spec, slice_params(params, indices), tmp_path / "slim.safetensors")
  plan = load_plan(str(tmp_path / "plan.json"))
  assert plan.layers_for(dense.spec) == layers and plan.indices == indices
  cut, cut_params = vc.load(variant, "bundled", plan)
  slim, slim_params = vc.load(variant, tmp_path / "slim.safetensors", plan)
  assert cut == slim
  jax.tree.map(np.testing.assert_array_equal, cut_params, slim_params)
  cost = vc.count_cost(slim)
  assert cost.params < vc.count_cost(dense).params and cost.gmacs == pytest.approx(
    plan.gmacs, abs=1e-6
  )


def test_positions_must_hold_the_prefix():
  values = make_plan(small_spec(), small_spec().dense_layers, {}).to_json()
  values["variant"], values["num_tokens"] = "vit_mini_patch3_30", 101
  del values["architecture"]
  values["layers"] = [{"select": {"type": "keep_positions", "positions": [1, 2]}}] * 8
  with pytest.raises(UserError, match="begin with all 1 prefix"):
    parse_plan(values)


def test_authors_cost_of_everything_is_the_dense_models():
  spec = small_spec()
  everything = Masks(
    np.ones((spec.depth, spec.num_heads, 16), bool),
    np.ones((spec.depth, spec.mlp_dim), bool),
    np.ones((spec.depth, spec.num_tokens), bool),
  )
  params = authors_cost(spec, everything)[0]
  assert params == sum(leaf.size for leaf in jax.tree.leaves(random_params(spec)))
