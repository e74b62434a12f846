"""``kpt regress accept`` and ``ack``: what is the base, and which regressions are known."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kpt_lightning.cli.regress_check import FailOn
from kpt_lightning.cli.regress_options import REGRESSION, TOO_LITTLE, Key, Store, existing_history
from kpt_lightning.errors import ConfigError

if TYPE_CHECKING:
    from kpt_lightning.tracking.baselines import Baseline, Move
    from kpt_lightning.tracking.record import RunRecord
    from kpt_lightning.tracking.store import RunStore


def accept(
    store: Store = None,
    name: Annotated[str, typer.Option("--name", help="Of the baseline.")] = "main",
    run: Annotated[list[str] | None, typer.Option("--run", help="Pin this run; may be given again.")] = None,
    last: Annotated[int, typer.Option("--last", min=1, help="Without --run: pin as many newest of each key.")] = 10,
    key: Key = None,
    limit: Annotated[
        FailOn, typer.Option("--limit", help="From which severity on a move for the worse needs a reason.")
    ] = FailOn.MODERATE,
    reason: Annotated[str, typer.Option("--reason", help="Why the base may get worse; is stored.")] = "",
) -> None:
    """Pin runs as the base of their key; a base that gets worse is refused without a reason.

    A regression that stands in the pinned runs is accepted with them: check fails no more for it.
    """
    from kpt_lightning.tracking.acks import rank
    from kpt_lightning.tracking.baselines import accepted_runs, moves, new_baseline, pin, pinned, standing_moves
    from kpt_lightning.tracking.check import finished_by_key
    from kpt_lightning.tracking.runs_by_key import choose_keys, runs_to_pin

    history = existing_history(store, reading=False)
    by_key = choose_keys(finished_by_key(history.all()), key=key)
    chosen, left_out = runs_to_pin(by_key, [history.find(each) for each in run or []], last)
    for message in left_out:
        typer.echo(f"kpt: {message}", err=True)
    if not chosen:
        typer.echo("kpt: nothing was pinned", err=True)
        raise typer.Exit(TOO_LITTLE)
    before, accepted = pinned(history, name), accepted_runs(history)
    found = []
    for digest, runs in chosen.items():
        old = set(before[digest].run_ids) if digest in before else set()
        found += moves([each for each in by_key[digest] if each.run_id in old], runs)
        found += standing_moves(by_key[digest], runs, accepted)
    worse = [move for move in found if move.verdict.outcome == "regression"]
    for move in worse:
        typer.echo(_move_text(move))
    if not reason.strip() and any(rank(move.verdict.severity) >= rank(limit.value) for move in worse):
        typer.echo(f"kpt: refused: the base would get worse by {limit.value} or more; give --reason", err=True)
        raise typer.Exit(REGRESSION)
    baselines = [new_baseline(name, runs, reason.strip()) for runs in chosen.values()]
    pin(history, baselines)
    for each in baselines:
        typer.echo(_pin_text(each, by_key[each.key_digest][-1]))


def ack(
    metrics: Annotated[
        list[str] | None, typer.Argument(metavar="[METRIC]...", help="The metrics that got worse.")
    ] = None,
    store: Store = None,
    key: Key = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the runs, in place of --key.")] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why it is accepted for now; required.")] = "",
    expires: Annotated[str, typer.Option("--expires", help="14d, 36h, 2w, or a date in UTC; required.")] = "",
    new: Annotated[int, typer.Option("--new", min=1, help="As for check: the newest runs that are judged.")] = 1,
    baseline: Annotated[str | None, typer.Option("--baseline", help="As for check: judge by these runs.")] = None,
    show: Annotated[bool, typer.Option("--list", help="List all acknowledgements.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --list: print data.")] = False,
) -> None:
    """Let a known regression pass until it recovers, gets worse or its time is over."""
    history = existing_history(store, reading=show)
    if show:
        _list(history, as_json)
        return
    _acknowledge(history, metrics or [], key, name, reason.strip(), expires, new, baseline)


def _acknowledge(
    history: "RunStore", metrics: list[str], key: str | None, name: str | None, reason: str, expires: str, new: int,
    baseline: str | None,
) -> None:  # fmt: skip
    from kpt_lightning.tracking.acks import acknowledge, new_ack
    from kpt_lightning.tracking.expiry import expiry
    from kpt_lightning.tracking.review import review
    from kpt_lightning.tracking.runs_by_key import one_key

    if not metrics:
        raise ConfigError("METRIC", metrics, "name at least one metric", "kpt regress check says which got worse")
    if not reason:
        raise ConfigError("--reason", reason, "an acknowledgement needs one", "Say why the regression is accepted")
    until = expiry(expires)
    seen = review(history, new=new, baseline=baseline)
    digest = one_key(seen.records, key=key, name=name)
    regressed = {each.metric: each for each in seen.found if each.key.digest == digest and each.regressed}
    made = []
    for metric in dict.fromkeys(metrics):
        checked = regressed.get(metric)
        if checked is None or checked.verdict is None:
            shown = ", ".join(regressed) or "nothing"
            rule = f"is no regression of the newest runs of this key; regressed: {shown}"
            raise ConfigError("METRIC", metric, rule, "See kpt regress check with the same --new and --baseline")
        made.append(
            new_ack(
                key_digest=digest, run_name=checked.key.name, metric=metric, severity=checked.verdict.severity,
                shift=checked.verdict.shift, base_runs=checked.base_runs, reason=reason, expires=until,
            )
        )  # fmt: skip
    acknowledge(history, made)
    for each in made:
        known = f"{each.severity or 'small'} regression of {each.shift:+.1%}"
        typer.echo(f"{each.run_name} {each.metric}: {known} acknowledged until {each.expires_at[:16]} UTC")
    rest = [metric for metric, each in regressed.items() if metric not in metrics and each.acknowledged is None]
    if rest:
        typer.echo(f"still failing: {', '.join(rest)}; acknowledge them too where they have the same cause")


def _list(history: "RunStore", as_json: bool) -> None:
    from kpt_lightning.tracking.acks import all_acks

    found = all_acks(history)
    if as_json:
        typer.echo(json.dumps([asdict(each) | {"state": each.state()} for each in found], indent=2))
        return
    from rich.console import Console

    from kpt_lightning.cli.tables import new_table, plain

    table = new_table("Acknowledged regressions", "run", "key", "metric", "known", "state", "until (UTC)", "by", "why")
    for each in found:
        known = f"{each.severity or 'small'} {each.shift:+.1%}"
        row = (
            each.run_name, each.key_digest, each.metric, known, each.state(), each.expires_at[:16], each.author,
            each.reason,
        )  # fmt: skip
        table.add_row(*map(plain, row))
    Console().print(table if found else "no regression was acknowledged in this history")


def _move_text(move: "Move") -> str:
    verdict = move.verdict
    text = (
        f"{move.run_name} [{move.key_digest}] {move.metric}: {verdict.severity or 'small'} regression of "
        f"{verdict.shift:+.1%} ({verdict.interval.low:+.1%} to {verdict.interval.high:+.1%}) against {move.against}"
    )
    changed = ", ".join(f"{name} {old or 'none'} -> {new or 'none'}" for name, (old, new) in move.environment.items())
    return f"{text}; the environment changed: {changed}" if changed else text


def _pin_text(baseline: "Baseline", newest: "RunRecord") -> str:
    return (
        f"{newest.key.name} [{baseline.key_digest}]: {len(baseline.run_ids)} runs pinned as {baseline.name!r}, "
        f"{baseline.run_ids[0][:12]} to {baseline.run_ids[-1][:12]}"
    )
