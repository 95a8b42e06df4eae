"""What a run does, one module per stage; each is a function of a `Run` that returns a summary."""

from vitcomp_jax.stages.evaluate import evaluate
from vitcomp_jax.stages.pretrain import pretrain
from vitcomp_jax.stages.search import search

STAGES = {"pretrain": pretrain, "search": search, "evaluate": evaluate}
