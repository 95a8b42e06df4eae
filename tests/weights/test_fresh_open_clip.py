"""Models that OpenCLIP makes now, at other sizes than those that are stored."""

import json

import numpy as np
import pytest

from tests.models import forward
from vitcomp_jax.weights.loading import load_params, spec_for

TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
TOWERS = {
  "oblong": {"image_size": [20, 15], "patch_size": 5, "mlp_ratio": 4.5},
  "uncovered pixels": {"image_size": 23, "patch_size": 6, "ls_init_value": 1e-4},
  "mean": {"image_size": 16, "patch_size": 4, "pool_type": "avg"},
  "pooled norm": {"image_size": 16, "patch_size": 8, "final_ln_after_pool": True},
  "tanh": {"image_size": 16, "patch_size": 8, "act_kwargs": {"approximate": "tanh"}},
  "inner norms": {
    "image_size": 16,
    "patch_size": 4,
    **{"block_type": "custom", "qk_norm": True, "scale_attn_inner": True, "scale_fc": True},
  },
}


@pytest.mark.parametrize("name", TOWERS)
def test_equal_to_open_clip(name, tmp_path):
  why = "not compared with fresh models of OpenCLIP without the extra [peers]"
  open_clip = pytest.importorskip("open_clip", reason=why)
  torch = pytest.importorskip("torch", reason=why)
  tower = {"layers": 3, "width": 24, "head_width": 8, **TOWERS[name]}
  config = {"embed_dim": 10, "vision_cfg": tower, "text_cfg": TEXT}
  torch.manual_seed(0)
  model = open_clip.CLIP(**config).eval()
  for parameter in model.parameters():
    parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape)
  torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
  (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
  spec = spec_for(None, str(tmp_path))
  params = load_params(spec, spec.dense_layers, str(tmp_path))
  images = np.random.default_rng(0).normal(size=(2, *spec.image_size, 3)).astype(np.float32)
  with torch.no_grad():
    wanted = model.encode_image(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
  got = forward(spec, spec.dense_layers, {"params": params}, images).logits
  assert np.abs(got - wanted).max() < 2e-6 * np.abs(wanted).max()
