"""Results of a search or of slimming, and the resulting plan, as blocks of a report."""

from collections.abc import Sequence

from vitcomp_jax.models.reducers import KeepAll
from vitcomp_jax.plans import Plan, PlanLayer
from vitcomp_jax.reporting.plots import number, tokens_left
from vitcomp_jax.reporting.render import Block, Items, Table
from vitcomp_jax.reporting.tables import formatted, percents
from vitcomp_jax.results import SearchResult, SlimResult

Counts = Sequence[tuple[int, int]]


def search_blocks(search: SearchResult) -> list[Block]:
  """Returns the steps, time and result of a search; as a table if it was for several budgets."""
  if search.front:
    return [_front_table(search.front)]
  unit, asked, where = "GMACs", search.budget_gmacs, ""
  learnt, adjusted = search.raw_gmacs, search.gmacs
  if search.latency_ms is not None:
    unit, asked = "ms", search.budget_latency_ms
    learnt, adjusted = search.raw_latency_ms or 0.0, search.latency_ms
    where = f" for a batch of {search.batch} on {search.device}, by `latency.json`"
    if search.runtime == "onnxruntime":
      where += " of ONNX Runtime"
  by = ""
  if search.offset is not None:
    by = f", by an offset of {search.offset + 0.0:+.3g} on the expected counts"
  lines = [
    f"{search.steps:,} steps on {search.images:,} images, {search.minutes:.1f} minutes",
    f"Budget: {number(asked or 0.0)} {unit}{where}",
    *_chosen_text(search),
    f"Plan as learnt: {number(learnt)} {unit}",
    f"Plan adjusted to the budget: {number(adjusted)} {unit}{by}",
  ]
  return [Items(lines)]


def _front_table(front: Sequence[SearchResult]) -> Table:
  """Returns the table of a search for several budgets, with one line per budget."""
  heads = ["plan", "budget (GMACs)", "as learnt", "adjusted", "kept step", "its loss"]
  lines = []
  for search in front:
    gmacs = [number(search.budget_gmacs or 0.0), number(search.raw_gmacs), number(search.gmacs)]
    loss = formatted(dict(search.tried).get(search.chosen_step), ".4f")
    lines.append([search.plan, *gmacs, f"{search.chosen_step:,} of {search.steps:,}", loss])
  steps, images = sum(s.steps for s in front), sum(s.images for s in front)
  minutes = sum(s.minutes for s in front)
  text = (
    f"One search for all budgets: {steps:,} steps on {images:,} images, {minutes:.1f} minutes. "
    "Each goes on from the rates of the one before. Below is the last plan; all are in `plans/`."
  )
  return Table(text, heads, lines)


def _chosen_text(search: SearchResult) -> list[str]:
  """Describes the plan chosen among those that the search passed through."""
  tried = dict(search.tried)
  if not tried:
    return []
  return [
    f"Kept: the plan of step {search.chosen_step:,} with a loss of "
    f"{tried[search.chosen_step]:.4f}, the least of the {len(tried)} that were tried (steps "
    f"{', '.join(f'{step:,}' for step in tried)})"
  ]


def slim_items(slim: SlimResult) -> Items:
  """Returns the steps, time and result of slimming."""
  asked = f"Shares asked for: {percents(slim.shares)}"
  if slim.budget_gmacs:
    share = 100 * next(iter(slim.shares.values()))
    asked = (
      f"Budget: {number(slim.budget_gmacs)} GMACs, met by a share of {share:.1f} % of the masks of "
      "each kind that was searched"
    )
  trained = f"{slim.steps:,} steps on {slim.images:,} images, {slim.minutes:.1f} minutes"
  lines = [
    trained if slim.steps else "An earlier search's masks and weights, cut anew",
    asked,
    f"Shares reached: {percents(slim.kept)}",
    f"{number(slim.gmacs)} GMACs, {100 * slim.of_dense:.1f} % of the dense model's; "
    f"{slim.params_m:.4g} M parameters",
    f"By the authors' own formulas: {number(slim.authors_gmacs)} GMACs, "
    f"{slim.authors_params_m:.4g} M parameters",
    slim.timm,
  ]
  return Items(lines)


def plan_blocks(plan: Plan | None, counts: Counts, search: SearchResult | None) -> list[Block]:
  """Returns a table of the layers: widths if they are slimmed, tokens if some are removed.

  Args:
    plan: The plan; None: only the search is described.
    counts: Tokens after pruning and after merging in each layer of the plan.
    search: Result of the search for the plan, if it was part of this run.
  """
  columns: dict[str, list[str]] = {}
  text = ""
  if plan is not None:
    text = f"For `{plan.variant}` with {plan.num_tokens} tokens: {number(plan.gmacs)} GMACs."
    columns |= _own_width_columns(plan) if plan.has_own_widths else _width_columns(plan.layers)
  if not columns or _removes(plan):
    text += " Tokens after pruning and after merging in each layer, prefix included."
    columns |= _token_columns(plan.num_tokens if plan else None, counts, search)
  layers = map(str, range(1, 1 + len(next(iter(columns.values())))))
  lines = list(zip(layers, *columns.values(), strict=True))
  return [Table(text.strip(), ["layer", *columns], lines)]


def _removes(plan: Plan | None) -> bool:
  """Returns whether any layer prunes or merges."""
  return plan is not None and any(layer.reduce != KeepAll() for layer in plan.layers)


def _width_columns(layers: Sequence[PlanLayer]) -> dict[str, list[str]]:
  """Tabulates the units that slimmed layers keep, without padding."""
  columns: dict[str, list[str]] = {}
  for index in [layer.index for layer in layers if layer.index]:
    heads = [sum(unit >= 0 for unit in head) for head in index.attn]
    columns.setdefault("heads", []).append(str(len(heads)))
    columns.setdefault("dimensions of each", []).append(" ".join(map(str, heads)))
    hidden = sum(unit >= 0 for unit in index.mlp)
    columns.setdefault("hidden units", []).append(str(hidden))
  kept = [getattr(layer.select, "positions", None) for layer in layers]
  if any(kept):
    columns["tokens kept"] = ["all" if k is None else str(len(k)) for k in kept]
  return columns


def _own_width_columns(plan: Plan) -> dict[str, list[str]]:
  """Tabulates the widths of layers whose weights are not slices of the dense model's."""
  pairs = zip(plan.dense_spec.dense_layers, plan.layers, strict=True)
  qk, value, hidden = zip(*(layer.apply_to(base).widths for base, layer in pairs), strict=True)
  columns = {"query dimensions": qk, "value dimensions": value, "hidden units": hidden}
  return {name: list(map(str, widths)) for name, widths in columns.items()}


def _token_columns(
  num_tokens: int | None, counts: Counts, search: SearchResult | None
) -> dict[str, list[str]]:
  """Tabulates the learnt plan beside the adjusted plan, or the given plan."""
  plans = {"": counts}
  if search is not None:
    plans = {"learnt: ": search.raw_counts, "adjusted: ": search.counts}
  columns = {}
  for prefix, of_layers in plans.items():
    pruned, merged = zip(*tokens_left(of_layers, num_tokens), strict=True)
    columns[f"{prefix}after pruning"] = [str(count) for count in pruned]
    columns[f"{prefix}after merging"] = [str(count) for count in merged]
  return columns
