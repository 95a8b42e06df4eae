"""Replays every golden fixture: numbers from the authors' code and from timm.

`pytest tests/test_golden.py [--golden DIR]`. A fixture is `NAME.npz` with `NAME.json`; the method
is the name's stem, what it fixes comes from the method, all else from the JSON. After the method,
tags may tell fixtures of it apart, as in `diffrate_eval_hidden_s7`. The quick run replays some
cases in float32; `--all` replays all in both precisions, and so does a folder that is given.
"""

import dataclasses
import functools
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import golden_dir
from vitcomp_jax import methods
from vitcomp_jax.config import DiffRateOptions, ViTSlimOptions
from vitcomp_jax.cost import macs
from vitcomp_jax.methods import dynamicvit
from vitcomp_jax.methods.diffrate.counts import _rank_mask, candidates, keep_probability
from vitcomp_jax.methods.diffrate.reducer import PruneMerge
from vitcomp_jax.methods.diffrate.search import DiffRate, search_counts
from vitcomp_jax.methods.vit_slim.authors import authors_cost
from vitcomp_jax.methods.vit_slim.search import ViTSlim, masked_layers, thresholds
from vitcomp_jax.models.build import build
from vitcomp_jax.models.caformer import caformer
from vitcomp_jax.models.importance import IMPORTANCES
from vitcomp_jax.models.layer_trees import of_layer, to_tree
from vitcomp_jax.models.reducers import keep_all
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.ops import select
from vitcomp_jax.ops.losses import cross_entropy
from vitcomp_jax.weights.dialects import translate
from vitcomp_jax.weights.loading import abstract_params
from vitcomp_jax.weights.positions import resample_positions
from vitcomp_jax.weights.timm import port
from vitcomp_jax.weights.timm_names import to_timm

F32, F64, HIDDEN = 2e-5, 1e-9, 5e-5


@dataclasses.dataclass(frozen=True)
class Fixture:
  """One fixture; `arrays` are as they are on disk."""

  name: str
  info: dict[str, Any]
  arrays: dict[str, np.ndarray]

  def weights(self, dtype: str) -> dict[str, np.ndarray]:
    items = self.arrays.items()
    return {k[2:]: v.astype(dtype) for k, v in items if k.startswith("w/")}

  def case(self, name: str) -> dict[str, np.ndarray]:
    items = self.arrays.items()
    return {k[len(name) + 1 :]: v for k, v in items if k.startswith(f"{name}/")}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
  if "path" not in metafunc.fixturenames:
    return
  folder = golden_dir(metafunc.config)
  # Not `stem` and `with_suffix`: a name may have dots.
  names = sorted(path.name.removesuffix(".npz") for path in folder.glob("*.npz"))
  assert names, f"no fixtures in {folder}"
  of_others = metafunc.config.getoption("--golden")
  slow = [name in _SLOW and not of_others for name in names]
  marks = [pytest.mark.slow if is_slow else () for is_slow in slow]
  paths = [pytest.param(folder / n, marks=m) for n, m in zip(names, marks, strict=True)]
  metafunc.parametrize("path", paths, ids=names)


def test_fixture(path: pathlib.Path, request: pytest.FixtureRequest, monkeypatch) -> None:
  whole = request.config.getoption("--all") or request.config.getoption("--golden")
  monkeypatch.setattr(sys.modules[__name__], "_REPLAYS_FLOAT64", bool(whole))
  replay = REPLAYS[_method(path.name)]
  info = json.loads(path.with_name(f"{path.name}.json").read_text())
  if not whole:
    _keep_few(path.name, info)
  with np.load(path.with_name(f"{path.name}.npz"), allow_pickle=False) as file:
    fixture = Fixture(path.name, info, dict(file))
  replay(fixture)


# Searches on other backbones than that of `diffrate_search`.
_SLOW = ("diffrate_caformer_search", "diffrate_mae_search")

# Of fixtures with many cases, those that are replayed at once; the others with `--all`.
_AT_ONCE = {
  "diffrate_caformer_eval": ("all",),
  "diffrate_eval": ("both", "nonmono"),
  "diffrate_mae_eval": ("both",),
  "diffrate_search": ("g1", "traj_zeros_g4"),
  "evit": ("k07_fuse", "tokens_fuse"),
  "tome": ("rdec", "r4_noprop", "mae_r7_prop"),
  "vit_slim": ("default/search", "default/compress1"),
}


def _keep_few(name: str, info: dict[str, Any]) -> None:
  for key in info.keys() & {"cases", "trajectories"}:
    info[key] = {case: about for case, about in info[key].items() if case in _AT_ONCE[name]}


# What may follow a method's name: words for a split, numbers (`2`, `s7`, `seed602`, `96px`) and
# sizes, which the JSON gives. Any other word makes the name that of a method we do not know.
_TAG = re.compile(
  r"[._-]((public|private|hidden|extra|new|other|train|val|test|split|set|part|fold|seed|run)\d*"
  r"|[a-z]?\d*|\d+[a-z]*|tiny|small|base|large|huge|wide|deep)"
)
_ANY_TAG = re.compile(r"[._-].*")


def _method(name: str) -> str:
  """The longest known method that the name is, or starts with before its tags."""

  def fits(method: str) -> bool:
    # These resample another model's positions each, which the JSON names too.
    tags = _ANY_TAG if method == "timm_posembed" else re.compile(f"({_TAG.pattern})*")
    return name.startswith(method) and tags.fullmatch(name[len(method) :]) is not None

  methods = sorted(filter(fits, REPLAYS), key=len)
  assert methods, f"{name}: the method is not known; known are {sorted(REPLAYS)}"
  return methods[-1]


@pytest.mark.parametrize(
  ("name", "method"),
  [
    ("diffrate_eval", "diffrate_eval"),
    ("diffrate_eval.s7", "diffrate_eval"),
    ("diffrate_eval_2", "diffrate_eval"),
    ("diffrate_eval_b", "diffrate_eval"),
    ("diffrate_eval_hidden", "diffrate_eval"),
    ("diffrate_eval_hidden-seed602", "diffrate_eval"),
    ("diffrate_mae_search_private2", "diffrate_mae_search"),
    ("timm_deit_large_v2", "timm_deit"),
    ("timm_deit_distilled_96px", "timm_deit_distilled"),
    ("timm_dinov2_reg4.hidden", "timm_dinov2_reg4"),
    ("timm_posembed_any", "timm_posembed"),
  ],
)
def test_the_method_of_a_name(name: str, method: str) -> None:
  assert _method(name) == method


@pytest.mark.parametrize(
  "name",
  ["timm_deit3", "timm_deit_xyz", "timm_dinov2_reg8", "timm_posembedding", "diffrate_eval2d", "x"],
)
def test_a_method_that_is_not_known(name: str) -> None:
  with pytest.raises(AssertionError, match=f"{name}: the method is not known"):
    _method(name)


_REPLAYS_FLOAT64 = True


# Both precisions: float32 as people run it, float64 to see effects of 1e-7, with `--all` or
# fixtures of another folder.
def _precisions() -> Iterator[tuple[str, float]]:
  yield "float32", F32
  if not _REPLAYS_FLOAT64:
    return
  # Strict promotion refuses even to ask for the wider of float64 and float32.
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    yield "float64", F64


def _spec(model: dict[str, Any], pool: str) -> ViTSpec:
  return ViTSpec(
    name="golden",
    image_size=(model["img_size"], model["img_size"]),
    patch_size=model["patch_size"],
    width=model["embed_dim"],
    depth=model["depth"],
    num_heads=model["num_heads"],
    mlp_dim=int(model["embed_dim"] * model["mlp_ratio"]),
    num_classes=model["num_classes"],
    pool=pool,
    final_norm=pool != "size_mean",
    fc_norm=pool == "size_mean",
  )


def _caformer_spec(model: dict[str, Any]) -> ViTSpec:
  side = (model["img"], model["img"])
  sizes = tuple(model["depths"]), tuple(model["dims"])
  return caformer("golden", side, *sizes, num_classes=model["num_classes"])


def _images(x: np.ndarray, dtype: str) -> np.ndarray:
  return np.moveaxis(x, -3, -1).astype(dtype)


@functools.cache
def _abstract_params(model: ViT) -> dict[str, Any]:
  with jax.enable_x64(False):
    return abstract_params(model)


def _params(fixture: Fixture, model: ViT, dtype: str, antialias: bool = True) -> dict[str, Any]:
  spec = model.spec
  # What a layer does with its tokens behind attention has no weights.
  layers = tuple(dataclasses.replace(layer, reduce=keep_all) for layer in model.layers)
  expected = _abstract_params(build(spec, layers))
  weights = dict(translate(fixture.weights(dtype), {})[0])
  if spec.pool == "size_mean" and "fc_norm.weight" not in weights:
    weights |= {f"fc_norm.{part}": weights.pop(f"norm.{part}") for part in ("weight", "bias")}
  return port(
    weights,
    expected,
    grid=spec.grid,
    prefix_positions=spec.pos_prefix,
    antialias=antialias,
  )


def _close(found: Any, expected: np.ndarray, atol: float, what: str) -> None:
  np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=atol, err_msg=what)


def _source_matrix(source: np.ndarray, num_tokens: int) -> np.ndarray:
  """Ours, [b p] token of each patch, as the authors' 0/1 [b n p+1] with CLS in front."""
  matrix = np.zeros((source.shape[0], num_tokens, source.shape[1] + 1))
  matrix[:, 0, 0] = 1
  for b, p in np.argwhere(source >= 0):
    matrix[b, source[b, p], p + 1] = 1
  return matrix


def _sizes(size: Any, shape: tuple[int, int]) -> np.ndarray:
  return np.ones(shape) if size is None else np.asarray(size)


def _static_layers(spec: ViTSpec, prune: np.ndarray, merge: np.ndarray) -> tuple[LayerSpec, ...]:
  """The layers that the authors run where tokens are removed and not masked."""
  return tuple(
    dataclasses.replace(layer, reduce=_Sorted(int(p), int(m), signed_similarity=True))
    for layer, p, m in zip(spec.dense_layers, prune, merge, strict=True)
  )


class _Sorted(PruneMerge):
  """Sorts the tokens even where none is removed, as the authors do; nothing else differs."""

  def __call__(self, tokens, stats):
    n = tokens.x.shape[1]
    if self.count(n) < n:
      return super().__call__(tokens, stats)
    importance = IMPORTANCES[self.importance](stats, tokens)
    order = select.importance_order(importance, tokens.num_prefix, n)
    return tokens.take(order)


def replay_diffrate_eval(fixture: Fixture, pool: str = "cls") -> None:
  spec = _spec(fixture.info["model"], pool)
  for name in fixture.info["cases"]:
    case = fixture.case(name)
    layers = _static_layers(spec, case["prune_kept"], case["merge_kept"])
    assert macs.static_macs(spec, layers) == case["flops"], name
    for dtype, tolerance in _precisions():
      _check_eval(fixture, ViT(spec, layers), case, dtype, tolerance, name)


def _check_eval(
  fixture: Fixture, model: ViT, case: dict, dtype: str, tolerance: float, name: str
) -> None:
  params = _params(fixture, model, dtype)
  out = jax.jit(lambda p, x: model.apply({"params": p}, x, method="forward"))(
    params, _images(case["x"], dtype)
  )
  _close(out.logits, case["logits_f64"], tolerance, name)
  last = out.layers[-1]
  _close(_sizes(last.size, last.x.shape[:2]), case["size"][..., 0], F32, name)
  _check_hidden(out.layers, case, name)
  sizes = [_sizes(t.size, t.x.shape[:2]) for t in out.layers]
  _close(np.concatenate(sizes, axis=1), case["size_per_block"], F32, name)
  if "source" in case:
    matrix = _source_matrix(np.asarray(last.source), last.x.shape[1])
    np.testing.assert_array_equal(matrix, case["source"], err_msg=name)


def _check_hidden(layers: tuple, case: dict[str, np.ndarray], name: str) -> None:
  """The tokens after those layers of which the fixture has them."""
  for key in (k for k in case if k.startswith("hidden/")):
    _close(layers[int(key[7:])].x, case[key], HIDDEN, f"{name} {key}")


def replay_diffrate_caformer_eval(fixture: Fixture) -> None:
  spec = _caformer_spec(fixture.info["model"])
  for name, info in fixture.info["cases"].items():
    case = fixture.case(name)
    layers = _caformer_layers(spec, case["merge_kept"])
    assert macs.static_macs(spec, layers) == case["flops"], name
    assert [n for _, n in macs.static_counts(spec, layers)] == info["tokens_after_block"], name
    for dtype, tolerance in _precisions():
      model = build(spec, layers)
      params = _params(fixture, model, dtype)
      out = _forward(model, params, _images(case["x"], dtype))
      _close(out.logits, case["logits_f64"], tolerance, name)
      _close(out.layers[-1].x, case["final_tokens"], HIDDEN, name)
      sizes = [_sizes(t.size, t.x.shape[:2]) for t in out.layers]
      _close(np.concatenate(sizes, axis=1), case["size_per_block"], F32, name)
      last = spec.depths[2] - 1
      source = np.asarray(out.layers[last].source)
      np.testing.assert_array_equal(source, case["source_end_of_stage2_argmax"], err_msg=name)
      _check_restored(model, params, out.layers[last], case, name)


def _caformer_layers(spec: ViTSpec, merge: np.ndarray) -> tuple[LayerSpec, ...]:
  """What the authors run where tokens are removed."""
  options = dict(whole_sizes=True, first_receives=False)
  return tuple(
    dataclasses.replace(
      layer,
      reduce=_Sorted(spec.tokens_at(i), int(m), importance="mean_attention", **options),
    )
    for i, (layer, m) in enumerate(zip(spec.dense_layers, merge, strict=True))
  )


def _check_restored(model: ViT, params: dict, tokens: Any, case: dict, name: str) -> None:
  """The grid between the stages."""
  restored = jax.jit(lambda p, t: model.apply({"params": p}, t, method="restore"))(params, tokens)
  _close(np.moveaxis(restored, -1, 1), case["stage2_uncompressed"], HIDDEN, name)


def replay_tome(fixture: Fixture) -> None:
  for name, info in fixture.info["cases"].items():
    spec = _spec(fixture.info["model"], "size_mean" if info["patch"] == "mae" else "cls")
    case = fixture.case(name)
    asked = info["r"]["tuple"] if isinstance(info["r"], dict) else info["r"]
    r = tuple(asked) if isinstance(info["r"], dict) else asked
    assert list(methods.tome.tome_counts(r, spec.depth)) == case["r_list"].tolist(), name
    layers = methods.tome.layers(spec, r, info["prop_attn"])
    assert [n for _, n in macs.static_counts(spec, layers)] == info["tokens_after_block"], name
    for dtype, tolerance in _precisions():
      model = ViT(spec, layers)
      params = _params(fixture, model, dtype)
      out = _forward(model, params, _images(case["x"], dtype))
      _close(out.logits, case["logits_f64"], tolerance, name)
      last = out.layers[-1]
      _close(_sizes(last.size, last.x.shape[:2]), case["size"][..., 0], F32, name)
      _check_hidden(out.layers, case, name)
      matrix = _source_matrix(np.asarray(last.source), last.x.shape[1])
      np.testing.assert_array_equal(matrix, case["source"], err_msg=name)


def replay_evit(fixture: Fixture) -> None:
  spec = _spec(fixture.info["model"], "cls")
  for name, info in fixture.info["cases"].items():
    case = fixture.case(name)
    rates = info["keep_rate"] * (spec.depth if len(info["keep_rate"]) == 1 else 1)
    override = info["forward_keep_rate"] or rates
    # A rate that the forward pass is given counts only where the constructor's is below 1.
    rates = [given if rate < 1 else 1 for rate, given in zip(rates, override, strict=True)]
    layers = methods.evit.layers(spec, rates, info["fuse_token"], info["forward_tokens"])
    assert [n for _, n in macs.static_counts(spec, layers)] == info["tokens_after_block"], name
    for dtype, tolerance in _precisions():
      model = ViT(spec, layers)
      out = _forward(model, _params(fixture, model, dtype), _images(case["x"], dtype))
      _close(out.logits, case["logits_f64"], tolerance, name)
      _check_hidden(out.layers, case, name)


def replay_dynamicvit(fixture: Fixture) -> None:
  spec, info = _spec(fixture.info["model"], "cls"), fixture.info
  layers = methods.dynamicvit.layers(spec, info["pruning_loc"], info["token_ratio"])
  assert [n for _, n in macs.static_counts(spec, layers)] == info["infer"]["tokens_after_block"]
  for dtype, tolerance in _precisions():
    model = ViT(spec, layers)
    params = _params(fixture, model, dtype)
    case = fixture.case("infer")
    out = _forward(model, params, _images(case["x"], dtype))
    _close(out.logits, case["logits_f64"], tolerance, "infer")
    _check_hidden(out.layers, case, "infer")
    _check_dynamicvit_training(spec, layers, params, fixture.case("train"), dtype, tolerance)


def _check_dynamicvit_training(
  spec: ViTSpec, layers: tuple, params: dict, case: dict, dtype: str, tolerance: float
) -> None:
  places = dynamicvit.places(layers)
  model = ViT(spec, dynamicvit.training_layers(layers, mask_eps=1e-6))
  labels = jnp.asarray(case["y"], jnp.int32)
  images = jnp.asarray(_images(case["x"], dtype))
  noise = iter([jnp.asarray(case[f"gumbel/{i}"], dtype) for i in range(len(places))])

  def loss_fn(params):
    rngs = {"gumbel": jax.random.key(0)}
    out = model.apply({"params": params}, images, method="forward", rngs=rngs)
    ratio = dynamicvit.ratio_loss(spec, layers, out)
    task = cross_entropy(out.logits, labels)
    return task + dynamicvit.RATIO_WEIGHT / len(places) * ratio, (out, task, ratio)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.random, "gumbel", lambda *_: next(noise))
    grads, (out, task, ratio) = jax.jit(jax.grad(loss_fn, has_aux=True))(params)
  _close(out.logits, case["logits_f64"], tolerance, "train")
  _close(task, case["ce_f64"], tolerance, "train")
  _close(ratio, case["ratio_loss_f64"], tolerance, "train")
  _close(out.tokens.x[:, 1:], case["features"], HIDDEN, "train")
  for i, place in enumerate(places):
    keep = np.asarray(out.layers[place].keep)[:, 1:]
    np.testing.assert_array_equal(keep, case[f"decision/{i}"])
    found = to_timm(grads[f"blocks_{place}"]["select"])
    prefix = f"grad_f64/score_predictor.{i}."
    stored = {k.removeprefix(prefix): v for k, v in case.items() if k.startswith(prefix)}
    assert set(stored) == set(found)
    for name, expected in stored.items():
      _close(found[name], expected, 1e-7 if tolerance == F64 else 1e-4 * 0.1, name)


def _forward(model: ViT, params: dict[str, Any], images: np.ndarray) -> Any:
  return jax.jit(lambda p, x: model.apply({"params": p}, x, method="forward"))(params, images)


def replay_diffrate_search(fixture: Fixture, pool: str = "cls") -> None:
  spec = _spec(fixture.info["model"], pool)
  for name, settings in fixture.info["cases"].items():
    method = _authors(spec, settings)
    for dtype, tolerance in _precisions():
      _check_search(fixture, spec, method, fixture.case(name), dtype, tolerance, name)
    _check_deployed(fixture, spec, method, fixture.case(name), name)
  for name, settings in fixture.info.get("trajectories", {}).items():
    # Optax raises a float to an integer step, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
      _check_trajectory(fixture, spec, settings, fixture.case(name), name)


# The fixtures' models are so small that their budget term counts in 1e6 MACs, squared.
_PER_GMACS = 1e6


def _authors(spec: ViTSpec, settings: dict[str, Any], **options: Any) -> DiffRate:
  options = DiffRateOptions(
    recipe="paper",
    granularity=settings["granularity"],
    budget_weight=_PER_GMACS * settings.get("lam", 5.0),
    **options,
  )
  return DiffRate(spec, settings["target_mflops"] / 1e3, options)


def _arch(case: dict[str, np.ndarray], kind: str, depth: int, dtype: str) -> dict[str, Any]:
  return {
    f"blocks_{i}": {
      "reduce": {
        f"{k}_logits": jnp.asarray(case[f"{kind}/{k}/{i}"], dtype) for k in ("prune", "merge")
      }
    }
    for i in range(depth)
  }


def _by_key(arch: dict[str, Any], kind: str) -> dict[str, np.ndarray]:
  return {
    f"{kind}/{k}/{name.removeprefix('blocks_')}": np.asarray(v["reduce"][f"{k}_logits"])
    for name, v in arch.items()
    for k in ("prune", "merge")
  }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _searched(
  model: ViT, method: DiffRate, arch: Any, params: Any, images: jax.Array, labels: jax.Array
) -> Any:
  """The task's loss and the budget's, what they are made of, and the gradients of both.

  The weights are arguments, since XLA would spend minutes on computing with constants.
  """
  spec = model.spec

  def terms(arch):
    out = model.apply({"params": params, "arch": arch}, images, method="forward")
    penalty = method.penalty(arch, out, jnp.asarray(0))[0] / method.options.budget_weight
    penalty = _PER_GMACS * penalty
    flops = macs.macs(spec, spec.dense_layers, search_counts(spec, out))
    return (cross_entropy(out.logits, labels), penalty), (out, flops)

  found, pull, more = jax.vjp(terms, arch, has_aux=True)
  one, zero = (jnp.asarray(value, found[0].dtype) for value in (1, 0))
  return found, more, pull((one, zero))[0], pull((zero, one))[0]


def _check_search(
  fixture: Fixture,
  spec: ViTSpec,
  method: DiffRate,
  case: dict[str, np.ndarray],
  dtype: str,
  tolerance: float,
  name: str,
) -> None:
  model = ViT(spec, method.layers())
  params = _params(fixture, model, dtype)
  arch = _arch(case, "selected_probability", spec.depth, dtype)
  images, labels = jnp.asarray(_images(case["x"], dtype)), jnp.asarray(case["y"], jnp.int32)

  found = _searched(model, method, arch, params, images, labels)
  (loss, spent), (out, flops), task_grads, budget_grads = found
  _close(out.logits, case["logits_f64"], tolerance, name)
  _close(loss, case["loss_ce"], F32, name)
  _close(spent, case["loss_flops"], F32 * max(1, float(case["loss_flops"])), name)
  _close(flops, case["flops"], 1e-6 * float(case["flops"]), f"{name} flops")
  counts = [int(tokens.num_kept) for tokens in out.layers]
  kept = np.minimum(case["prune_kept_num"], case["merge_kept_num"])
  np.testing.assert_array_equal(counts, np.minimum.accumulate(kept))
  found = np.stack([np.asarray(t.keep) for t in out.layers])
  np.testing.assert_array_equal(np.round(found), np.round(case["mask"]))
  _close(found, case["mask"], 1e-6, f"{name} mask")
  dropped = case["mask"] < 0.5
  sizes = np.stack([_sizes(t.size, t.x.shape[:2]) for t in out.layers])
  _close(np.where(dropped, 0, sizes), np.where(dropped, 0, case["size"]), F32, f"{name} size")
  for key, layer in (("hidden_2", 2), ("hidden_last", -1)):
    if key in case:
      gone = dropped[layer][..., None]
      x = np.where(gone, 0, np.asarray(out.layers[layer].x))
      _close(x, np.where(gone, 0, case[key]), HIDDEN, f"{name} {key}")
  _check_gradients(_by_key(task_grads, "grad_ce_f64"), case, 1e-4 if dtype == "float32" else 1e-5)
  _check_gradients(_by_key(budget_grads, "grad_flops"), case, 1e-4)
  _check_modules(spec, method, arch, case)


def replay_diffrate_caformer_search(fixture: Fixture) -> None:
  spec = _caformer_spec(fixture.info["model"])
  for name, settings in fixture.info["cases"].items():
    case = fixture.case(name)
    method = _authors(spec, settings, actions="merge", importance="mean_attention_of_all")
    for dtype, tolerance in _precisions():
      _check_caformer_search(fixture, spec, method, case, settings, dtype, tolerance, name)
    learnt = _learnt(method, _merge_arch(spec, method, case, "float32"))
    layers = _caformer_layers(spec, case["merge_kept_num"])
    assert [l.reduce.merge_keep for l in learnt] == [l.reduce.merge_keep for l in layers], name
    assert macs.static_macs(spec, learnt) == macs.static_macs(spec, layers) == case["flops"], name
    model = build(spec, layers)
    params = _params(fixture, model, "float32")
    out = _forward(model, params, _images(case["x"], "float32"))
    _close(out.logits, case["eval_logits"], F32, f"{name} eval_logits")


def _learnt(method: DiffRate, arch: dict[str, Any]) -> tuple[LayerSpec, ...]:
  """The layers that keep what was learnt, not adjusted to the budget."""
  return method.static_layers(method.expected_counts(arch))


def _merge_arch(spec: ViTSpec, method: DiffRate, case: dict, dtype: str) -> dict[str, Any]:
  """The authors' logits; there is nothing to choose in pruning."""
  start = method.init()
  layers = [of_layer(spec, start, i)["reduce"] for i in range(spec.depth)]
  logits = [case[f"selected_probability/{i}"] for i in range(spec.depth)]
  kept = jax.tree.map(lambda x: jnp.asarray(x, dtype), layers)
  return to_tree(
    spec,
    [
      {"reduce": layer | {"merge_logits": jnp.asarray(x, dtype)}}
      for layer, x in zip(kept, logits, strict=True)
    ],
  )


def _check_caformer_search(
  fixture: Fixture,
  spec: ViTSpec,
  method: DiffRate,
  case: dict[str, np.ndarray],
  settings: dict[str, Any],
  dtype: str,
  tolerance: float,
  name: str,
) -> None:
  model = build(spec, method.layers())
  params, arch = _params(fixture, model, dtype), _merge_arch(spec, method, case, dtype)
  images, labels = jnp.asarray(_images(case["x"], dtype)), jnp.asarray(case["y"], jnp.int32)
  found = _searched(model, method, arch, params, images, labels)
  (loss, spent), (out, flops), task_grads, budget_grads = found
  _close(out.logits, case["logits_f64"], tolerance, name)
  _close(loss, case["loss_ce"], F32, name)
  _close(spent, case["loss_flops"], F32, name)
  _close(flops, case["flops"], 1e-6 * float(case["flops"]), f"{name} flops")
  entered = [0, *(int(tokens.num_kept) for tokens in out.layers)]
  entered = [spec.starts.get(i, n) for i, n in enumerate(entered[:-1])]
  assert entered == settings["valid"], name
  for i, tokens in enumerate(out.layers):
    keep = np.asarray(tokens.keep)
    _close(keep, case[f"mask/{i}"], 1e-6, f"{name} mask {i}")
    _close(keep * tokens.sizes, keep * case[f"size/{i}"], F32, f"{name} size {i}")
  _check_restored(model, params, out.layers[spec.depths[2] - 1], case, name)
  for grads, kind in ((task_grads, "grad_ce_f64"), (budget_grads, "grad_flops")):
    found = {
      f"{kind}/{i}": np.asarray(of_layer(spec, grads, i)["reduce"]["merge_logits"])
      for i in range(spec.depth)
    }
    _check_gradients(found, case, 1e-4)


def _check_gradients(found: dict[str, np.ndarray], case: dict, relative: float) -> None:
  largest = max(float(np.abs(case[key]).max()) for key in found)
  for key, gradient in found.items():
    _close(gradient, case[key], relative * largest, key)


def _check_modules(spec: ViTSpec, method: DiffRate, arch: dict, case: dict) -> None:
  """What each layer chooses among, and what the authors' modules make of it."""
  layers = method.layers()
  options = [candidates(spec.num_patches, layer.reduce.counts.granularity[0]) for layer in layers]
  for key in (k for k in case if k.startswith("candidates/")):
    np.testing.assert_array_equal(options[int(key.split("/")[2])], case[key], err_msg=key)
  for key in (k for k in case if k.startswith("module_block")):
    module, what = key.split("/")
    block, which = module.removeprefix("module_block").split("_")
    logits = arch[f"blocks_{block}"]["reduce"][f"{which}_logits"]
    probability = keep_probability(logits, options[int(block)], spec.num_prefix, spec.num_tokens)
    kept = case[f"{which}_kept_num"][int(block)]
    # Ranks past the second number are an earlier mask's to drop; the authors asked for kept + 6.
    stops = {
      "token_mask": spec.num_tokens,
      "token_mask_with_token_number": min(spec.num_tokens, kept + 6),
    }
    found = probability
    if what != "token_probability":
      count, stop = (jnp.asarray(n, probability.dtype) for n in (kept, stops[what]))
      found = _rank_mask(probability, count, stop)
    _close(found, case[key], 1e-6, key)


def _check_deployed(
  fixture: Fixture, spec: ViTSpec, method: DiffRate, case: dict[str, np.ndarray], name: str
) -> None:
  """The same counts with tokens removed; the authors' masks clamp sizes, their removal does not."""
  layers = _static_layers(spec, case["prune_kept_num"], case["merge_kept_num"])
  learnt = _learnt(method, _arch(case, "selected_probability", spec.depth, "float32"))
  found = [(layer.reduce.prune_keep, layer.reduce.merge_keep) for layer in learnt]
  expected = [(layer.reduce.prune_keep, layer.reduce.merge_keep) for layer in layers]
  assert found == expected, name
  assert macs.static_macs(spec, layers) == case["flops"], name
  if "eval_flops" in case:
    assert macs.static_macs(spec, layers) == case["eval_flops"], name
  if "eval_logits" not in case:
    return
  model = ViT(spec, layers)
  params, images = _params(fixture, model, "float32"), _images(case["x"], "float32")
  logits = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images)
  _close(logits, case["eval_logits"], F32, f"{name} eval_logits")


def _check_trajectory(
  fixture: Fixture, spec: ViTSpec, settings: dict, case: dict[str, np.ndarray], name: str
) -> None:
  """The authors' AdamW on the rates, step by step."""
  method = _authors(spec, settings)
  model = ViT(spec, method.layers())
  params = _params(fixture, model, "float32")
  tx = optax.adamw(
    settings["lr"], *settings["betas"], eps=settings["eps"], weight_decay=settings["weight_decay"]
  )
  arch = _arch(case, "init", spec.depth, "float32")
  state = tx.init(arch)

  @jax.jit
  def step(arch, state, params, images, labels):
    def loss_fn(arch):
      out = model.apply({"params": params, "arch": arch}, images, method="forward")
      penalty, figures = method.penalty(arch, out, jnp.asarray(0))
      return cross_entropy(out.logits, labels) + penalty, figures

    (loss, figures), grads = jax.value_and_grad(loss_fn, has_aux=True)(arch)
    updates, state = tx.update(grads, state, arch)
    return optax.apply_updates(arch, updates), state, loss, figures

  images = jnp.asarray(_images(case["x"], "float32"))
  labels = jnp.asarray(case["y"], jnp.int32)
  for i in range(settings["steps"]):
    batch = i % len(images)
    expected = np.ceil(np.round(method.expected_counts(arch), 5)) + spec.num_prefix
    np.testing.assert_array_equal(expected[:, 0], case["prune_kept_num"][i], f"{name} {i}")
    np.testing.assert_array_equal(expected[:, 1], case["merge_kept_num"][i], f"{name} {i}")
    arch, state, loss, figures = step(arch, state, params, images[batch], labels[batch])
    kept = np.minimum(case["prune_kept_num"][i], case["merge_kept_num"][i])
    np.testing.assert_array_equal(figures["tokens"], np.minimum.accumulate(kept), f"{name} {i}")
    flops = float(case["flops"][i])
    _close(1e9 * float(figures["gmacs"]), flops, 1e-6 * flops, f"{name} {i} flops")
    _close(loss, case["loss"][i], 1e-4, f"{name} {i}")
  for key, found in _by_key(arch, "final").items():
    _close(found, case[key], 2e-4, f"{name} {key}")


def _timm_spec(info: dict[str, Any]) -> ViTSpec:
  """The variant's own spec at the fixture's size: the family's rules come from our code."""
  spec = get_spec(info["entrypoint"])
  size = info["geometry"]
  return dataclasses.replace(
    spec,
    image_size=(size["img"], size["img"]),
    patch_size=size["patch"],
    width=size["dim"],
    depth=size["depth"],
    num_heads=size["heads"],
    mlp_dim=int(info["constructor_options_all"]["mlp_ratio"] * size["dim"]),
    num_classes=info["create_model_kwargs"]["num_classes"],
  )


def _run_timm(fixture: Fixture, spec: ViTSpec, dtype: str, antialias: bool = True) -> Any:
  model = ViT(spec, spec.dense_layers)
  images = jnp.asarray(_images(fixture.arrays["x"], dtype))
  params = _params(fixture, model, dtype, antialias)
  return jax.jit(lambda p, x: model.apply({"params": p}, x, method="forward"))(params, images)


def replay_timm(fixture: Fixture) -> None:
  spec = _timm_spec(fixture.info)
  assert (spec.norm_eps, spec.activation) == (fixture.info["norm_eps"], fixture.info["activation"])
  assert spec.num_prefix == fixture.info["num_prefix_tokens"]
  for dtype, tolerance in _precisions():
    out = _run_timm(fixture, spec, dtype)
    if "logits_f64" in fixture.arrays:
      _close(out.logits, fixture.arrays["logits_f64"], tolerance, fixture.name)
    if "logits_gelu_tanh_f64" in fixture.arrays:
      tanh = _run_timm(fixture, dataclasses.replace(spec, activation="gelu_tanh"), dtype)
      _close(tanh.logits, fixture.arrays["logits_gelu_tanh_f64"], tolerance, fixture.name)
    features = fixture.arrays["features_f64"]
    per_token = features.ndim == 3 and features.shape[1] == spec.num_tokens
    _close(out.tokens.x if per_token else out.features, features, tolerance, fixture.name)


def replay_timm_posembed(fixture: Fixture) -> None:
  spec, arrays = _timm_spec(fixture.info), fixture.arrays
  for rule, antialias in (("aa", True), ("noaa", False)):
    for key in (k for k in arrays if k.startswith(f"pos_{rule}_")):
      double = key.endswith("_f64")
      table = fixture.weights("float64" if double else "float32")["pos_embed"][..., :8]
      rows, columns = map(int, key.split("_")[2].split("x"))
      old = tuple(fixture.info["pos_embed_old_grid"])
      found = resample_positions(table, spec.pos_prefix, old, (rows, columns), antialias)
      _close(found, arrays[key], 1e-12 if double else 1e-6, key)
    for dtype, tolerance in _precisions():
      out = _run_timm(fixture, spec, dtype, antialias)
      if f"logits_{rule}_f64" in arrays:
        _close(out.logits, arrays[f"logits_{rule}_f64"], tolerance, rule)
      features, expected = out.features, arrays[f"features_{rule}_f64"]
      if "feature_token_index" in arrays:
        features = out.tokens.x[:, arrays["feature_token_index"]]
      _close(features, expected, tolerance, rule)


# The authors' names: of the variants, and of the masks.
_ATTN_MASKS = {"default": "dims", "head": "heads", "uniform": "uniform"}
_GATES = {"attn.zeta": "head_gate", "mlp.zeta": "hidden_gate", "attn.patch_zeta": "token_gate"}


def replay_vit_slim(fixture: Fixture) -> None:
  spec, info = _spec(fixture.info["model"], "cls"), fixture.info
  cases = [name for name in info["cases"] if "/compress" in name]
  for kind in sorted({name.split("/")[0] for name in info["cases"]}):
    weights = dict(w_attn=info["w1"], w_mlp=info["w2"], w_patch=info["w3"])
    method = ViTSlim(spec, ViTSlimOptions(attn=_ATTN_MASKS[kind], **weights))
    for dtype, tolerance in _precisions():
      arch = _zetas(fixture.case(f"{kind}/zeta"), spec.depth, dtype)
      params = _params(fixture, ViT(spec, spec.dense_layers), dtype)
      images = jnp.asarray(_images(fixture.arrays["x"], dtype))
      _check_slim_search(spec, method, fixture, kind, (params, arch, images), tolerance)
      for name in (name for name in cases if name.startswith(f"{kind}/")):
        _check_cut(spec, method, fixture.case(name), (params, arch, images), tolerance)


def _zetas(arrays: dict[str, np.ndarray], depth: int, dtype: str) -> dict[str, Any]:
  return {
    f"blocks_{i}": {
      gate: {"zeta": jnp.asarray(arrays[f"blocks.{i}.{key}"], dtype)}
      for key, gate in _GATES.items()
    }
    for i in range(depth)
  }


def _check_slim_search(
  spec: ViTSpec,
  method: ViTSlim,
  fixture: Fixture,
  kind: str,
  inputs: tuple[Any, Any, jax.Array],
  tolerance: float,
) -> None:
  params, arch, images = inputs
  case = fixture.case(f"{kind}/search")
  labels = jnp.asarray(fixture.arrays["y"], jnp.int32)
  model = ViT(spec, method.layers())

  def loss_fn(arch, params, images):
    out = model.apply({"params": params, "arch": arch}, images, method="forward")
    task = cross_entropy(out.logits, labels)
    penalty, norms = method.penalty(arch, out, jnp.asarray(0))
    return task + penalty, (out.logits, task, norms)

  step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  (loss, (logits, task, norms)), grads = step(arch, params, images)
  _close(logits, case["logits_f64"], tolerance, kind)
  _close(task, case["ce_f64"], tolerance, kind)
  _close(loss, case["loss_f64"], tolerance, kind)
  found = [norms[f"l1_{what}"] for what in ("attn", "mlp", "patch")]
  np.testing.assert_allclose(found, case["sparsity_loss_f64"], rtol=tolerance)
  stored = _zetas(
    {k[9:]: v for k, v in case.items() if k.startswith("grad_f64/")},
    spec.depth,
    "float64" if tolerance == F64 else "float32",
  )
  largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(stored))
  relative = 1e-4 if tolerance == F32 else 1e-8
  jax.tree.map(lambda a, b: _close(a, np.asarray(b), relative * largest, kind), grads, stored)


def _check_cut(
  spec: ViTSpec,
  method: ViTSlim,
  case: dict[str, np.ndarray],
  inputs: tuple[Any, Any, jax.Array],
  tolerance: float,
) -> None:
  params, arch, images = inputs
  budgets = tuple(case["budgets"].tolist())
  np.testing.assert_allclose(thresholds(arch, budgets), case["thresholds"], rtol=1e-6)
  masks = method.cut(arch, budgets, refuse_empty=False)
  for i in range(spec.depth):
    for kept, key in ((masks.attn, "attn"), (masks.mlp, "mlp"), (masks.patch, "patch")):
      np.testing.assert_array_equal(kept[i].ravel(), case[f"mask_{key}/{i}"].ravel() > 0)
  logits = jax.jit(ViT(spec, masked_layers(spec, masks)).apply)({"params": params}, images)
  _close(logits, case["logits_f64"], tolerance, "cut")
  assert list(authors_cost(spec, masks)) == [case["params"][1], case["flops"][1]]


REPLAYS: dict[str, Callable[[Fixture], None]] = {
  "diffrate_caformer_eval": replay_diffrate_caformer_eval,
  "diffrate_caformer_search": replay_diffrate_caformer_search,
  "diffrate_eval": replay_diffrate_eval,
  "diffrate_search": replay_diffrate_search,
  "diffrate_mae_eval": lambda fixture: replay_diffrate_eval(fixture, "size_mean"),
  "diffrate_mae_search": lambda fixture: replay_diffrate_search(fixture, "size_mean"),
  "tome": replay_tome,
  "evit": replay_evit,
  "dynamicvit": replay_dynamicvit,
  "timm_augreg": replay_timm,
  "timm_clip_gelu": replay_timm,
  "timm_clip_quickgelu": replay_timm,
  "timm_deit": replay_timm,
  "timm_deit_distilled": replay_timm,
  "timm_dinov2": replay_timm,
  "timm_dinov2_reg4": replay_timm,
  "timm_mae_ft": replay_timm,
  "timm_posembed": replay_timm_posembed,
  "timm_siglip": replay_timm,
  "vit_slim": replay_vit_slim,
}
