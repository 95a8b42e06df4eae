"""Weights of big_vision compute, under timm's names, what they compute under their own."""

import numpy as np
import pytest

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights import files

WIDTH, HEADS, HIDDEN, DEPTH, PATCH = 6, 2, 10, 3, 4
ATTENTION = "MultiHeadDotProductAttention_0"


def attention():
  """Shapes of an attention layer's parameters."""
  heads = (HEADS, WIDTH // HEADS)
  shapes = {f"{ATTENTION}/out/kernel": (*heads, WIDTH), f"{ATTENTION}/out/bias": (WIDTH,)}
  for part in ("query", "key", "value"):
    shapes |= {f"{ATTENTION}/{part}/kernel": (WIDTH, *heads), f"{ATTENTION}/{part}/bias": heads}
  return shapes


def mlp():
  """Shapes of an MLP's parameters."""
  kernels = {"MlpBlock_0/Dense_0/kernel": (WIDTH, HIDDEN), "MlpBlock_0/Dense_0/bias": (HIDDEN,)}
  return kernels | {
    "MlpBlock_0/Dense_1/kernel": (HIDDEN, WIDTH),
    "MlpBlock_0/Dense_1/bias": (WIDTH,),
  }


def norm(name):
  """Shapes of a norm's parameters."""
  return {f"{name}/scale": (WIDTH,), f"{name}/bias": (WIDTH,)}


@pytest.fixture
def arrays():
  """Random parameters of an image tower by its own names, with a pooling head."""
  shapes = {"embedding/kernel": (PATCH, PATCH, 3, WIDTH), "embedding/bias": (WIDTH,)}
  shapes |= {"pos_embedding": (1, 9, WIDTH), **norm("Transformer/encoder_norm")}
  for layer in range(DEPTH):
    block = attention() | mlp() | norm("LayerNorm_0") | norm("LayerNorm_1")
    shapes |= {f"Transformer/encoderblock_{layer}/{name}": shape for name, shape in block.items()}
  head = {"probe": (1, 1, WIDTH), **attention(), **mlp(), **norm("LayerNorm_0")}
  shapes |= {f"MAPHead_0/{name}": shape for name, shape in head.items()}
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def convert(tmp_path):
  """Writes parameters and reads them under timm's names."""

  def read(arrays, save=np.savez):
    save(tmp_path / "tower.npz", **arrays)
    return files.read(str(tmp_path / "tower.npz"))

  return read


def stacked(arrays):
  """Stacks all blocks, as `nn.scan` does."""
  found = {name: array for name, array in arrays.items() if "encoderblock" not in name}
  for name in arrays:
    if "encoderblock_0/" in name:
      layers = [arrays[name.replace("_0/", f"_{i}/", 1)] for i in range(DEPTH)]
      found[name.replace("encoderblock_0", "encoderblock")] = np.stack(layers)
  return found


def test_layers_compute_the_same(arrays, convert):
  state = convert({f"params/img/{name}": array for name, array in arrays.items()})
  rng = np.random.default_rng(1)
  x, hidden = rng.normal(size=(5, WIDTH)), rng.normal(size=(5, HIDDEN))
  heads = rng.normal(size=(5, HEADS, WIDTH // HEADS))
  image = rng.normal(size=(PATCH, PATCH, 3))

  def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5)

  want = np.einsum("hwc,hwcd->d", image, arrays["embedding/kernel"])
  assert_close(np.einsum("hwc,dchw->d", image, state["patch_embed.proj.weight"]), want)
  places = {f"blocks.{i}.attn": f"Transformer/encoderblock_{i}" for i in range(DEPTH)}
  for ours, theirs in (places | {"attn_pool": "MAPHead_0"}).items():
    layer = f"{theirs}/{ATTENTION}"
    fused = "kv" if ours == "attn_pool" else "qkv"
    parts = ["key", "value"] if ours == "attn_pool" else ["query", "key", "value"]
    weights = np.split(state[f"{ours}.{fused}.weight"], len(parts))
    biases = np.split(state[f"{ours}.{fused}.bias"], len(parts))
    if ours == "attn_pool":
      parts.append("query")
      weights.append(state["attn_pool.q.weight"])
      biases.append(state["attn_pool.q.bias"])
    for part, weight, bias in zip(parts, weights, biases, strict=True):
      want = np.einsum("nd,dhk->nhk", x, arrays[f"{layer}/{part}/kernel"])
      want += arrays[f"{layer}/{part}/bias"]
      assert_close(x @ weight.T + bias, want.reshape(5, WIDTH))
    want = np.einsum("nhk,hkd->nd", heads, arrays[f"{layer}/out/kernel"])
    assert_close(heads.reshape(5, WIDTH) @ state[f"{ours}.proj.weight"].T, want)
    mlp = ours.removesuffix(".attn") + ".mlp"
    kernels = [arrays[f"{theirs}/MlpBlock_0/Dense_{i}/kernel"] for i in (0, 1)]
    assert_close(x @ state[f"{mlp}.fc1.weight"].T, x @ kernels[0])
    assert_close(hidden @ state[f"{mlp}.fc2.weight"].T, hidden @ kernels[1])


def test_vectors_keep_their_values(arrays, convert):
  state = convert(arrays)
  names = {
    "pos_embed": "pos_embedding",
    "norm.weight": "Transformer/encoder_norm/scale",
    "attn_pool.latent": "MAPHead_0/probe",
    "attn_pool.norm.bias": "MAPHead_0/LayerNorm_0/bias",
    "attn_pool.proj.bias": f"MAPHead_0/{ATTENTION}/out/bias",
    "blocks.2.norm1.weight": "Transformer/encoderblock_2/LayerNorm_0/scale",
    "blocks.2.norm2.bias": "Transformer/encoderblock_2/LayerNorm_1/bias",
    "blocks.1.mlp.fc1.bias": "Transformer/encoderblock_1/MlpBlock_0/Dense_0/bias",
  }
  for ours, theirs in names.items():
    np.testing.assert_array_equal(state[ours], arrays[theirs], strict=True)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("prefix", ["params/img/", "img/", "params/", ""])
def test_all_layouts_hold_the_same(arrays, convert, prefix, save):
  want = convert(arrays)
  got = convert({prefix + name: array for name, array in stacked(arrays).items()}, save)
  assert got.keys() == want.keys()
  for name, array in want.items():
    np.testing.assert_array_equal(got[name], array, strict=True)


def test_columns_first(arrays, convert):
  want = convert(arrays)
  got = convert({name: np.asfortranarray(array) for name, array in arrays.items()})
  for name, array in want.items():
    np.testing.assert_array_equal(got[name], array, strict=True)


def test_the_text_tower_is_left_out_and_told(arrays, convert, caplog):
  caplog.set_level("INFO")
  others = {
    "params/txt/head/kernel": np.ones((2, 2)),
    "params/t": np.ones(1),
    "params/b": np.ones(1),
  }
  state = convert({f"params/img/{name}": array for name, array in arrays.items()} | others)
  assert state.keys() == convert(arrays).keys()
  assert "read what is under params/img/, not params/b, params/t, params/txt" in caplog.text


@pytest.mark.parametrize("extra", ["Transformer/encoderblock_0/gate/kernel", "MAPHead_0/gate"])
def test_unknown_names_are_refused(arrays, convert, extra):
  with pytest.raises(UserError, match=f"got {extra};"):
    convert(arrays | {extra: np.ones((2, 2))})


@pytest.mark.parametrize("block", ["Transformer/encoderblock_1", "MAPHead_0"])
def test_missing_value_projection_is_refused(arrays, convert, block):
  del arrays[f"{block}/{ATTENTION}/value/kernel"]
  with pytest.raises(UserError, match="expected .*value of the shape of .*kernel"):
    convert(arrays)
