"""A plan by trial: found in the cache or by a search, with a decision for each layer and block."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from kpt_lightning.candidates import registry
from kpt_lightning.candidates.candidate import Candidate
from kpt_lightning.candidates.compile_blocks import decide_blocks
from kpt_lightning.candidates.float8 import with_head
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import WITHOUT_FLOAT8
from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.optimize.batch_advice import advise_batch
from kpt_lightning.optimize.first_guess import guess
from kpt_lightning.optimize.outcome import Outcome
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.plan_cache import find_plan, keep_plan, plan_key
from kpt_lightning.optimize.search import search
from kpt_lightning.optimize.work import Work
from kpt_lightning.precision.convert import decide_layers

MAX_SECONDS = 120.0


def plan_by_trial(
    subject: Subject,
    work: Work,
    *,
    precision: str,
    parallel: str,
    max_seconds: float = MAX_SECONDS,
    cache: Path | None = None,
    pool: Sequence[Candidate] | None = None,
    rounds: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Find the plan; the model is afterwards as before.

    Args:
        subject: The model and what surrounds it.
        work: Its forward pass on a real batch.
        precision: Of the unchanged model: 32, bf16-mixed, or what a trainer was given.
        parallel: single, ddp or a trainer's strategy.
        max_seconds: As in :func:`search`.
        cache: Directory of kept plans; None neither reads nor writes one.
        pool: As in :func:`search`.
        rounds: As in :func:`search`.
        say: As in :func:`search`.
    """
    candidates = tuple(registry.candidates() if pool is None else pool)
    # training_step is a method of the model; a plain loop may have a loss function of its own.
    loss = getattr(work, "loss_fn", None)
    key = plan_key(subject, candidates, precision, () if loss is None else (loss,))
    if cache is not None and (found := find_plan(cache, key)) is not None:
        say(f"plan taken from {cache / key}.json: the same model, batch, machine and versions; nothing is tried")
        return replace(found, basis="trial, kept from an earlier run")
    names = {each.name for each in candidates}
    outcome = search(
        subject, work, max_seconds=max_seconds, first=lambda: guess(subject, work, names), pool=candidates,
        rounds=rounds, say=say,
    )  # fmt: skip
    plan = Plan(
        config=subject.config, device=subject.profile.primary.name, precision=_precision(outcome, precision),
        parallel=parallel, changes=outcome.changes, trials=outcome.trials, whole=outcome.whole, basis="trial",
        seconds=outcome.seconds,
    )  # fmt: skip
    plan.choices.append(
        Accepted(f"precision {plan.precision}", f"by trial in {outcome.seconds:.0f} s; unchanged: {precision}")
    )
    if subject.goal == "memory":
        lookup = {each.name: each for each in candidates}.__getitem__
        plan.choices.append(advise_batch(subject, work, outcome.changes, lookup, max_seconds=max_seconds / 4))
    plan.layers = _layers(subject, outcome)
    plan.blocks = _blocks(subject, plan)
    if cache is not None and not _out_of_time(outcome):
        keep_plan(cache, key, plan)
    return plan


def _precision(outcome: Outcome, given: str) -> str:
    names = {change.candidate for change in outcome.changes}
    if "autocast_bf16" in names and "float8" not in names:
        return "bf16-mixed"
    if "float8" not in names:
        return given
    return {"32": "fp8", **{without: name for name, without in WITHOUT_FLOAT8.items()}}.get(given, given)


def _layers(subject: Subject, outcome: Outcome) -> list[Decision]:
    """One decision for each linear layer: kept, or which rule or trial turned it down."""
    kept = next((change for change in outcome.changes if change.candidate == "float8"), None)
    inside = set() if kept is None else set(kept.setting["layers"])
    tried = [trial for trial in outcome.trials if trial.candidate == "float8"]
    why = "; ".join(dict.fromkeys(f"{trial.what}: {trial.reason}" if trial.what else trial.reason for trial in tried))
    decisions: list[Decision] = []
    for decision in decide_layers(subject.model, with_head(subject.config)):
        if decision.subject in inside and kept is not None:
            decisions.append(Accepted(decision.subject, f"{decision.reason}: kept by trial, {kept.setting['recipe']}"))
        elif decision:
            decisions.append(Rejected(decision.subject, f"{decision.reason}: by trial: {why}"))
        else:
            decisions.append(decision)
    return decisions


def _blocks(subject: Subject, plan: Plan) -> list[Decision]:
    compiled = set(plan.compiled_blocks)
    return [
        Rejected(each.subject, f"{each.reason}: not kept by trial") if each and each.subject not in compiled else each
        for each in decide_blocks(subject.model)
    ]


def _out_of_time(outcome: Outcome) -> bool:
    return any(trial.ended == "no time" for trial in outcome.trials)
