"""Forecast how long a sweep takes on this machine, before its hours begin."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..checkpoint.checkpoint import Checkpoint
from ..errors import BudgetError, ContextError, SettingError
from ..plan import speed_probe
from ..plan.estimate import PlanOptions, SpeedEstimate, estimate_speed, split_memory
from ..plan.speed_model import Costs
from .cost import ROUNDS, SPEED_TOKENS

#: Tokens of a question with a tool or a schema, and of its answer; of the demo's they are medians.
QUESTION_TOKENS, ANSWER_TOKENS = 250, 60


@dataclass(frozen=True)
class Work:
    """What a sweep has still to measure at one K.

    Attributes:
        sampled: tokens that the exact model still answers with, for the text.
        texts: times that the text goes through the model.
        answers: tool calls and JSON documents to ask for.
        speeds: whether the speed is measured.
    """

    experts: int
    sampled: int = 0
    texts: int = 0
    answers: int = 0
    speeds: bool = False


def forecast_seconds(
    checkpoint: Checkpoint, work: list[Work], *, tokens: int, memory: str | int | None
) -> float | None:
    """Return the seconds that the work takes, as planned from what this machine is measured at.

    Versions of fewer bits count as long as the checkpoint itself, and writing them is left out.

    Args:
        tokens: of the text.
        memory: see `flashmoe.options.LoadOptions`.

    Returns:
        None if the model does not fit in memory, which the sweep itself explains, or if no small
        model of its type can be measured.
    """
    work = [w for w in work if w != Work(w.experts)]
    if not work:
        return 0.0
    try:
        costs = speed_probe.measure_compute(checkpoint, checkpoint.top_k)
    except SettingError:
        return None
    disk = speed_probe.measure_disk(checkpoint, misses=checkpoint.top_k, pause=0.0, scratch=None)
    costs = replace(costs, disk_gb_s=disk.gb_per_s)
    try:
        return sum(_seconds(checkpoint, w, tokens, memory, costs) for w in work)
    except (BudgetError, ContextError):
        return None


def _seconds(
    checkpoint: Checkpoint, work: Work, tokens: int, memory: str | int | None, costs: Costs
) -> float:
    def speed(prompt: int) -> SpeedEstimate:
        prompt = min(prompt, checkpoint.max_context)
        options = PlanOptions(experts=work.experts, memory=memory, prompt=prompt)
        return estimate_speed(checkpoint, options, split_memory(checkpoint, options), costs)

    question = speed(QUESTION_TOKENS)
    seconds = work.answers * (question.prompt.seconds + ANSWER_TOKENS * question.single.seconds)
    seconds += work.sampled * question.single.seconds
    if work.texts:
        seconds += work.texts * speed(tokens).prompt.seconds
    if work.speeds:
        seconds += ROUNDS * (SPEED_TOKENS * question.single.seconds + speed(20).prompt.seconds)
    return seconds
