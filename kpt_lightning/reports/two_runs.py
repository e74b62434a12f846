"""Two runs side by side: what is different between them. Only the choice of others needs the page's script."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kpt_lightning.reports.elements import Element, by_user, clean, element, isolated
from kpt_lightning.reports.histories import KeyHistory
from kpt_lightning.reports.numbers import Scale, counted, moment, percent
from kpt_lightning.reports.overview import title
from kpt_lightning.reports.standing import label
from kpt_lightning.tracking.differences import differences
from kpt_lightning.tracking.record import RunKey, RunRecord

MOST_RUNS = 240
"""Runs to choose from, of all keys together."""

MOST_METRICS = 40
"""Of one run, in the table."""

FEWEST_RUNS, NEWEST = 4, 12
"""Of each key at least so many are offered, and of its newest so many before all those around changes."""

SECTIONS = {
    "run": "Run", "metrics": "Metrics", "environment": "Environment", "key": "Key", "config": "Settings",
    "plan": "Plan",
}  # fmt: skip

UNLIKE = "different"

NOTHING = RunRecord(
    run_id="", created_at="", status="", metrics={}, environment={},
    key=RunKey(name="", model="", config="", device="", device_count=0, strategy="", precision=""),
)  # fmt: skip
"""What a run has is what is different from this one."""

ALWAYS_UNLIKE = ("run", "metrics")
"""Shown of any two runs, and not counted as differences."""

Fact = tuple[str, str, float | None]
"""Name, value in words, and the number where a relative change makes sense."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A run that can be chosen."""

    run: RunRecord
    label: str
    facts: Mapping[str, Sequence[Fact]]


def choices(found: Sequence[KeyHistory]) -> dict[str, list[Choice]]:
    """By key digest the runs that are offered, newest first; each key has the same room."""
    room, each, offered = MOST_RUNS, max(MOST_RUNS // max(len(found), 1), FEWEST_RUNS), {}
    for history in found:
        places = _places(history)[: min(room, each)]
        room -= len(places)
        if places:
            offered[history.key.digest] = [_choice(history.runs[at]) for at in sorted(places, reverse=True)]
    return offered


def first_pair(history: KeyHistory) -> tuple[str, str] | None:
    """Ids of the last run before the last change of the main metric, or the one before, and of the newest run."""
    if len(history.runs) < 2:
        return None
    steps = history.metrics[0].steps if history.metrics else ()
    before = steps[-1].before if steps else len(history.runs) - 2
    return history.runs[before].run_id, history.runs[-1].run_id


def two_runs(found: Sequence[KeyHistory], offered: Mapping[str, Sequence[Choice]]) -> Element | None:
    """The section; None where there are no two runs of one key."""
    by_id = {choice.run.run_id: choice for group in offered.values() for choice in group}
    pairs = (first_pair(history) for history in found)
    pair = next((pair for pair in pairs if pair is not None and by_id.keys() >= {*pair}), None)
    if pair is None:
        return None
    old, new = (by_id[run_id] for run_id in pair)
    names = {history.key.digest: history for history in found}
    total = sum(len(history.runs) for history in found)
    less = f"{counted(len(by_id), 'run')} of {total:,} can be chosen: the newest, and those around changes."
    return element(
        "section",
        element("h2", "Two runs side by side", id="two-runs", tabindex="-1"),
        element(
            "div",
            _select("before", "Before", names, offered, pair[0]), _select("after", "After", names, offered, pair[1]),
            element("label", element("input", type="checkbox", id="all-facts"), " also what is equal", class_="check"),
            class_="chooser scripted",
        ),
        element("p", less, class_="muted scripted") if len(by_id) < total else None,
        _table(old, new),
    )  # fmt: skip


def as_json(offered: Mapping[str, Sequence[Choice]]) -> str:
    """All facts for the script; those that runs share are there once. Cannot end the element that it stands in."""
    tables: dict[tuple[Fact, ...], int] = {}
    runs: dict[str, dict[str, Any]] = {}
    for choice in (each for group in offered.values() for each in group):
        places = {name: tables.setdefault(tuple(facts), len(tables)) for name, facts in choice.facts.items()}
        runs[clean(choice.run.run_id)] = {"label": choice.label, "facts": places}
    data = {"sections": SECTIONS, "uncounted": ALWAYS_UNLIKE, "tables": list(tables), "runs": runs}
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _places(history: KeyHistory) -> list[int]:
    """Places of the runs to offer, the most wanted first: the newest, those around changes, then back in time."""
    newest = range(len(history.runs) - 1, -1, -1)
    steps = [at for metric in history.metrics for step in reversed(metric.steps) for at in (step.before, step.after)]
    moves = [at for move in reversed(history.moves) for at in (move.index - 1, move.index)]
    return list(dict.fromkeys([newest[0], *steps[:2], *newest[:NEWEST], *steps, *moves, *newest]))


def _choice(run: RunRecord) -> Choice:
    facts: dict[str, list[Fact]] = {name: [] for name in SECTIONS}
    steps = run.details.get("steps")
    facts["run"] = [
        ("id", run.run_id, None), ("time", moment(run.created_at), None), ("status", run.status, None),
        *([("steps", f"{steps}", None)] if steps is not None else []),
        *([("notes", "; ".join(run.notes), None)] if run.notes else []),
    ]  # fmt: skip
    for name, metric in list(run.metrics.items())[:MOST_METRICS]:
        value = Scale.of([metric.median], metric.unit, name).show(metric.median)
        number = metric.median if metric.median == metric.median and abs(metric.median) != float("inf") else None
        facts["metrics"].append((label(name), value, number))
    for name, (_, given) in differences(NOTHING, run).items():
        section, _, rest = name.partition(".")
        facts[section].append((rest or section, _words(given), None))
    text = f"{moment(run.created_at)} · {isolated(run.run_id[:12])}"
    cleaned = {
        section: [(clean(name), clean(value), number) for name, value, number in rows]
        for section, rows in facts.items()
    }  # fmt: skip
    return Choice(run, clean(text if run.status == "finished" else f"{text} · {run.status}"), cleaned)


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _select(
    name: str, text: str, histories: Mapping[str, KeyHistory], offered: Mapping[str, Sequence[Choice]], chosen: str
) -> Element:
    groups = []
    for digest, group in offered.items():
        options = [
            element("option", each.label, value=each.run.run_id, selected=each.run.run_id == chosen) for each in group
        ]
        shown = "".join(title(histories[digest]).itertext())
        about = f"{isolated(shown)}, {histories[digest].key.precision}"
        groups.append(element("optgroup", *options, label=about))
    return element("label", text, element("select", *groups, id=f"run-{name}", name=name, autocomplete="off"))


def _table(old: Choice, new: Choice) -> Element:
    bodies, unlike = [], 0
    for section, heading in SECTIONS.items():
        rows, counts = _rows(old.facts[section], new.facts[section]), section not in ALWAYS_UNLIKE
        unlike += sum(counts and bool(change) for *_, change in rows)
        lines = [_line(*row, counts) for row in rows]
        if lines:
            head = element("tr", element("th", heading, colspan=4, scope="rowgroup"), class_="part")
            bodies.append(element("tbody", head, *lines))
    columns = ("Fact", "Before", "After", "Change")
    table = element(
        "table", element("thead", element("tr", *(element("th", name, scope="col") for name in columns))), *bodies,
        id="facts",
    )  # fmt: skip
    return element(
        "div", element("p", f"{counted(unlike, 'difference')}.", id="unlike", role="status"),
        element("div", table, class_="scroll", tabindex="0", role="region", aria_label="Two runs side by side"),
    )  # fmt: skip


def _rows(old: Sequence[Fact], new: Sequence[Fact]) -> list[tuple[str, str, str, str]]:
    """Name, before, after, and the change in words."""
    then, now = ({name: (text, number) for name, text, number in facts} for facts in (old, new))
    rows = []
    for name in dict.fromkeys([*then, *now]):
        before, after = then.get(name, ("none", None)), now.get(name, ("none", None))
        if before[1] and after[1] is not None:
            change = percent(after[1] / before[1] - 1)
        else:
            change = UNLIKE if before[0] != after[0] else ""
        rows.append((name, before[0], after[0], change))
    return rows


def _line(name: str, before: str, after: str, change: str, counts: bool) -> Element:
    cells = [element("td", by_user(before)), element("td", by_user(after))]
    sign = element("span", "≠ ", aria_hidden="true") if change and counts else None
    said = change if counts or change != UNLIKE else None
    return element(
        "tr", element("th", by_user(name), scope="row"), *cells, element("td", sign, said),
        class_=("unlike" if change else "equal") if counts else None,
    )  # fmt: skip
