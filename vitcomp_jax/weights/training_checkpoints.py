"""Finds the weights of a model in the checkpoints that training scripts and wrappers store."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from vitcomp_jax.weights import dialects

# Keys that hold the weights in training checkpoints; averaged weights come first, as in timm. The
# weights of DINO's teacher and I-JEPA's target are also averages, and their authors evaluate them.
NESTED = (
  "state_dict_ema",
  "model_ema",
  "ema_state_dict",
  "ema",
  "teacher",
  "target_encoder",
  "state_dict",
  "model_state_dict",
  "model",
  "module",
  "network",
  "net",
  "student",
  "encoder",
)
# Prefixes of averaged weights that are stored beside the trained weights.
AVERAGED = ("teacher.", "model_ema.", "ema_model.", "averaged_model.", "ema.")
# Prefixes that wrappers add to every name: DistributedDataParallel, torch.compile,
# FullyShardedDataParallel, Lightning's modules, and MoCo, whose authors evaluate `base_encoder`.
WRAPPERS = (
  "module.",
  "_orig_mod.",
  "_fsdp_wrapped_module.",
  "model.",
  "network.",
  "net.",
  "backbone.",
  "base_encoder.",
  "momentum_encoder.",
  "encoder.",
  "student.",
)
PREFIXES = (*AVERAGED, *WRAPPERS)
# Names that no Vision Transformer has: losses, metrics, counters, queues, and the projections that
# are discarded after self-supervised training (DINO, DINOv2, MoCo v3).
_ASIDE = re.compile(
  r"\w*(loss|criterion|metric|accuracy|auroc)\w*(\.|$)|(train|val|valid|test)_\w+\."
  r"|n_averaged$|queue(_ptr)?$|(predictor|projector|dino_head|ibot_head)\."
  r"|head\.(mlp|last_layer)\.|(base|momentum)_encoder\.head\.\d"
)


def in_effect(checkpoint: object, source: str) -> Mapping[object, object]:
  """Returns the state dict of a training checkpoint, averaged if possible; empty if it has none.

  Args:
    checkpoint: Content of a file.
    source: The file, for the log, which says what is read.
  """
  state = checkpoint if isinstance(checkpoint, Mapping) else {}
  keys = []
  while key := next((key for key in NESTED if _holds_tensors(state.get(key))), None):
    others = [str(other) for other in state if other != key]
    keys.append(f"{key}, not {', '.join(others)}" if others else key)
    state = state[key]
    if key == "target_encoder" and "predictor" in others:  # I-JEPA, recognised only by this
      state = {f"{key}.{name}": tensor for name, tensor in state.items()}
  if keys:
    logging.info("weights %s: read what is under %s", source, "; there under ".join(keys))
  return state


def _holds_tensors(value: object) -> bool:
  """Returns whether a tree of mappings contains a tensor."""
  if isinstance(value, Mapping):
    return any(_holds_tensors(part) for part in value.values())
  return hasattr(value, "shape")


def model_names(names: Iterable[str], source: str) -> dict[str, str]:
  """Finds a model's names without the prefixes that wrappers add to them.

  A prefix is removed if all names share it, or if the names without it clearly do not belong to the
  model: losses and metrics, the projections of self-supervised training, or a twin of the model,
  such as the trained weights beside their average. Names that are left out are logged. Otherwise
  the names stay as they are, as do the names of a known library or of a model's authors, by which
  the model is recognised.

  Args:
    names: Names of all tensors.
    source: The file, for the log.

  Returns:
    Names in the file by name in the model.
  """
  found = {name: name for name in names}
  while not dialects.recognises(found) and (prefix := _wrapper(found)):
    inside = [name for name in found if _is_inside(name, prefix)]
    if outside := found.keys() - inside:
      logging.info(
        "weights %s: read what is under %s, not %s", source, prefix, _shortened(sorted(outside))
      )
    found = {name.removeprefix(prefix): found[name] for name in inside}
  return found


def _wrapper(names: Collection[str]) -> str | None:
  return next((prefix for prefix in PREFIXES if _is_wrapper(prefix, names)), None)


def _is_wrapper(prefix: str, names: Iterable[str]) -> bool:
  """Returns whether a model's names start with `prefix`, and no other name belongs to the model."""
  inside = {_bare(name) for name in names if _is_inside(name, prefix)}
  twins = inside if prefix in (*AVERAGED, "base_encoder.") else set()
  outside = [name for name in names if not _is_inside(name, prefix)]
  return bool(inside) and all(_ASIDE.match(name) or _bare(name) in twins for name in outside)


def _is_inside(name: str, prefix: str) -> bool:
  return name.startswith(prefix) and not _ASIDE.match(name)


def _bare(name: str) -> str:
  """Returns a name without any prefix of `PREFIXES`."""
  while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
    name = name.removeprefix(prefix)
  return name


def _shortened(names: Sequence[str]) -> str:
  more = f" and {len(names) - 5} more" if len(names) > 5 else ""
  return ", ".join(names[:5]) + more
