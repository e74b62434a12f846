"""The report as a file: what it says, that it needs nothing else, and that no name becomes markup."""

import base64
import hashlib
import json
import random
import sys
import time
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kpt_lightning.cli.main import main
from kpt_lightning.cli.regress import app
from kpt_lightning.reports.histories import histories
from kpt_lightning.reports.numbers import Scale, moment, percent
from kpt_lightning.reports.page import render_report
from kpt_lightning.tracking.acks import Ack, acknowledge, new_ack
from kpt_lightning.tracking.events import utc_now
from kpt_lightning.tracking.record import Metric, RunRecord
from kpt_lightning.tracking.store import RunStore
from tests.reports.demo_history import FASTER_KEY, MOVED_AT, PLANTED_AT, SLOWER_KEY, STEADY_KEY, demo_history, run

ODD_NAMES = {
    "markup": "<script>alert(1)</script>",
    "attribute": "\"'><img src=x onerror=alert(1)>",
    "comment": "<!-- </style></title>",
    "right to left": "שלום עולם \u202e abc",
    "emoji": "🚀 train 👩‍🔬",
    "long": "n" * 300,
    "control": "a\x00b\x1b[31m\ud800c",
    "empty": "",
}


class Page(HTMLParser):
    """Tags, addresses and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.raw: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in self.CDATA_CONTENT_ELEMENTS:
            self.raw.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is not None:
            self.raw[-1] += data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts).replace("\u00a0", " ")


@pytest.fixture(scope="module")
def demo() -> str:
    return render_report(demo_history(), source=".kpt/runs.sqlite")


def odd_run(name: str, number: int, chance: random.Random) -> RunRecord:
    """The name wherever a user's text can stand."""
    key = replace(SLOWER_KEY, name=name, precision=name, device=name, strategy=name)
    made = run(key, number, 0.1, 1.0, chance)
    return replace(
        made, run_id=f"{name}{number}",
        environment={"torch": name if number > 5 else "2", "git_commit": name, name: "1"},
        metrics={**made.metrics, name: Metric(median=1.0 + number, unit=name, better="lower", n=9, mad=0.1)},
        plan={"choices": [{"subject": name, "accepted": True, "reason": name}]}, notes=(name,),
        details={"config": {name: name}}, created_at=name or made.created_at,
    )  # fmt: skip


def known(metric: str, reason: str) -> Ack:
    """A live acknowledgement for ``SLOWER_KEY``."""
    return new_ack(
        key_digest=SLOWER_KEY.digest, run_name=SLOWER_KEY.name, metric=metric, severity="moderate", shift=0.1,
        base_runs=(), reason=reason, expires=utc_now() + timedelta(days=3),
    )  # fmt: skip


def test_the_file_needs_nothing_but_itself(demo: str) -> None:
    page = Page(demo)
    addresses = [value for _, name, value in page.attributes if name in ("src", "href", "action", "data", "srcset")]
    assert addresses
    assert all(value.startswith("#") or value == "data:," for value in addresses)
    style, script, data = page.raw
    assert "@import" not in style
    assert "url(" not in style
    assert not any(word in script for word in ("fetch(", "XMLHttpRequest", "http", "import(", "innerHTML"))
    assert json.loads(data)["runs"]


def test_the_page_itself_forbids_everything_but_its_own_style_and_script(demo: str) -> None:
    page = Page(demo)
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in page.raw]
    assert policy.startswith("default-src 'none'; ")
    assert f"style-src 'sha256-{hashes[0]}'" in policy
    assert f"script-src 'sha256-{hashes[1]}'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize("kind", ODD_NAMES)
def test_a_name_of_a_users_never_becomes_markup(kind: str) -> None:
    name, chance = ODD_NAMES[kind], random.Random(1)
    text = render_report([odd_run(name, number, chance) for number in range(9)], source=name)
    plain = render_report([odd_run("plain", number, chance) for number in range(9)], source="plain")
    text.encode("utf-8")
    page = Page(text)
    assert {*page.tags} == {*Page(plain).tags}
    assert page.tags.count("script") == 2
    assert {attribute for _, attribute, _ in page.attributes} - {"title"} == {
        attribute for _, attribute, _ in Page(plain).attributes
    } - {"title"}
    assert not set("\x00\x1b\ud800") & set(text)
    shown = name[:50].replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    assert (shown or "(no name)") in page.text


def test_the_worst_key_comes_first_and_the_headline_counts_those_that_need_a_look(demo: str) -> None:
    page = Page(demo)
    links = [value for tag, name, value in page.attributes if tag == "a" and value.startswith("#key-")]
    order = [f"#key-{key.digest}" for key in (SLOWER_KEY, FASTER_KEY, STEADY_KEY)]
    assert sorted(links[:3], key=order.index) == links[:3]
    assert links[0] == order[0]
    assert "1 of 3 run keys needs a look." in page.text


def test_the_planted_change_is_named_with_its_run_its_cause_and_the_environment_before(demo: str) -> None:
    slower = [record for record in demo_history() if record.key == SLOWER_KEY]
    text = Page(demo).text
    planted, moved = slower[PLANTED_AT], slower[MOVED_AT]
    assert f"From run {planted.run_id} of {moment(planted.created_at)} on" in text
    assert "moderate regression" in text
    assert "plan.changes.causal_attention.setting.backend: flash → math" in text
    assert f"before {moment(moved.created_at)}: cuda 12.9 → 13.0; torch 2.9.1 → 2.10.0;" in text


def test_every_run_has_a_mark_and_those_that_did_not_finish_are_hollow(demo: str) -> None:
    classes = [value for tag, name, value in Page(demo).attributes if tag == "use" and name == "class"]
    charts = sum(value == "plot" for _, name, value in Page(demo).attributes if name == "class")
    assert charts == 3 * 12
    assert classes.count("mark newest") == 3 * 7
    assert classes.count("mark failed absent") == 2 * 7
    assert classes.count("mark interrupted") == 7


def test_two_runs_are_the_newest_and_the_one_before_the_last_change(demo: str) -> None:
    slower = [record for record in demo_history() if record.key == SLOWER_KEY]
    selected = demo.split('selected=""')[0].rsplit("value=", 1)[1], demo.split('selected=""')[1].rsplit("value=", 1)[1]
    assert slower[PLANTED_AT - 1].run_id in selected[0]
    assert slower[-1].run_id in selected[1]


def test_an_acknowledged_regression_is_told_and_needs_no_look() -> None:
    records = demo_history()
    acks = [known(metric, "until the mask is fixed") for metric in ("step_time", "tokens_per_second", "mfu")]
    text = Page(render_report(records, acks=acks)).text
    assert "Nothing certain is worse: 3 run keys." in text
    assert "until the mask is fixed" in text


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"step_time": Metric(median=0.1, unit="s", better="lower")}, "nothing to compare with"),
        ({"step_time": Metric(median=float("nan"), unit="s", better="lower")}, "No run has a finite value."),
        ({"step_time": Metric(median=float("inf"), unit="s", better="lower", mad=float("nan"))}, "No run has a finite"),
        ({"step_time": Metric(median=0.0, unit="s", better="lower", n=5, mad=0.0)}, "0.0 s"),
        ({}, "No run of this key has a metric."),
    ],
)
def test_one_run_and_values_that_are_no_numbers_give_a_page(metrics: dict[str, Metric], said: str) -> None:
    record = replace(run(SLOWER_KEY, 0, 0.1, 1.0, random.Random(1)), metrics=metrics)
    page = Page(render_report([record]))
    assert said in page.text
    assert "Two runs side by side" not in page.text


def test_a_run_without_a_number_among_others_is_marked_and_not_judged() -> None:
    chance = random.Random(1)
    records = [run(SLOWER_KEY, number, 0.1, 1.0, chance) for number in range(12)]
    broken = Metric(median=float("nan"), unit="s", better="lower")
    records[4] = replace(records[4], metrics={**records[4].metrics, "step_time": broken})
    records[5] = replace(records[5], metrics={"step_time": Metric(median=99.0, unit="ms", better="lower")})
    page = Page(render_report(records))
    assert "1 run with another unit than s left out." in page.text
    assert sum("absent" in value for _, name, value in page.attributes if name == "class") >= 2


def test_values_of_any_size_give_a_page() -> None:
    chance = random.Random(1)
    values = [1e308, -1e308, 0.0, 1e-9, float("nan"), 1.0] * 3
    records = [
        replace(
            run(SLOWER_KEY, number, 0.1, 1.0, chance),
            metrics={"own": Metric(median=value, unit="s", better="lower", n=3, mad=1e308)},
        )
        for number, value in enumerate(values)
    ]
    page = Page(render_report(records))
    places = [
        value for _, name, value in page.attributes if name in ("x", "x1", "x2", "y", "y1", "y2", "width", "height")
    ]
    assert places
    assert not any("nan" in place or "inf" in place for place in places)


def test_environments_that_alternate_have_levels_and_changes_of_their_own() -> None:
    chance = random.Random(1)
    records = []
    for number in range(48):
        host = "ab"[number % 2]
        factor = 1.5 if host == "b" else 1.2 if number >= 24 else 1.0
        made = run(SLOWER_KEY, number, 0.1, factor, chance)
        records.append(replace(made, environment={**made.environment, "host": host}))
    (found,) = histories(records)
    main = found.metrics[0]
    assert [step.after for step in main.steps] == [24]
    assert [(level.start, level.stop) for level in main.levels] == [(0, 23), (24, 47), (1, 48)]
    assert len(found.moves) == 47
    text = Page(render_report(records)).text
    assert "older ones not shown" in text


def test_a_newest_run_that_failed_or_diverged_is_told() -> None:
    chance = random.Random(1)
    records = [run(SLOWER_KEY, number, 0.1, 1.0, chance) for number in range(9)]
    assert "newest run failed" in Page(render_report([*records[:-1], replace(records[-1], status="failed")])).text
    assert "a loss was not finite" in Page(render_report([*records[:-1], replace(records[-1], loss_finite=False)])).text


def test_an_empty_history_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        render_report([])


def many(keys: int, metrics: int) -> list[RunRecord]:
    """Ten thousand values: runs of some keys with some metrics each."""
    chance = random.Random(1)
    made = run(SLOWER_KEY, 0, 0.1, 1.0, chance)
    return [
        replace(
            made, run_id=f"{number:032x}", key=replace(SLOWER_KEY, name=f"k{number % keys}"),
            environment={**made.environment, "git_commit": f"{number:040x}"},
            metrics={
                f"own_{at}": replace(made.metrics["step_time"], median=chance.gauss(0.1, 0.001))
                for at in range(metrics)
            },
        )
        for number in range(10_000 // metrics)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "metrics", "said"),
    [
        (1, 1, "each mark stands for up to"),
        (400, 1, "10,000 runs of 400 keys"),
        (1, 400, "280 more metrics not drawn"),
    ],
)
def test_ten_thousand_values_stay_a_small_file_made_in_seconds(keys: int, metrics: int, said: str) -> None:
    records = many(keys, metrics)
    start = time.perf_counter()
    text = render_report(records)
    # A few seconds where nothing else runs.
    assert time.perf_counter() - start < 20.0
    assert len(text.encode()) < 5_000_000
    assert said in Page(text).text


@pytest.mark.parametrize(
    ("value", "unit", "metric", "shown"),
    [
        (0.1012, "s", "step_time", "101.2 ms"),
        (12.5, "s", "first_step_time", "12.50 s"),
        (0.0000042, "s", "data_wait", "4.200 µs"),
        (41.5 * 2**30, "bytes", "peak_memory", "41.50 GiB"),
        (0.412, "1", "mfu", "41.20 %"),
        (2.31, "1", "final_loss", "2.310"),
        (603214.4, "tokens/s", "tokens_per_second", "603,214 tokens/s"),
        (1e300, "widgets", "own", "1e+300 widgets"),
        (-0.5, "1", "own", "\u22120.5000"),
    ],
)
def test_numbers_have_the_unit_that_suits_them(value: float, unit: str, metric: str, shown: str) -> None:
    assert Scale.of([value], unit, metric).show(value).replace("\u00a0", " ") == shown


@pytest.mark.parametrize(
    ("change", "shown"),
    [(0.098, "+9.8 %"), (-0.05, "\u22125.0 %"), (-1e-9, "0.0 %"), (19.0, "\u00d720"), (float("inf"), "unknown")],
)
def test_changes_have_a_sign(change: float, shown: str) -> None:
    assert percent(change).replace("\u00a0", " ") == shown


def report(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture
def history(tmp_path: Path) -> RunStore:
    store, chance = RunStore(tmp_path / "runs.sqlite"), random.Random(1)
    for number in range(12):
        store.add(run(SLOWER_KEY, number, 0.1, 1.0, chance))
        store.add(run(STEADY_KEY, number, 0.4, 1.0, chance))
    return store


def test_the_command_writes_the_runs_that_are_asked_for(history: RunStore, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    whole = report("--store", history.place, "--output", page)
    assert (whole.exit_code, whole.stdout) == (0, f"24 runs written to {page}\n")
    assert "24 runs of 2 keys" in Page(page.read_text(encoding="utf-8")).text
    for chosen in (("--key", SLOWER_KEY.digest[:6]), ("--name", SLOWER_KEY.name)):
        assert report("--store", history.place, "-o", page, *chosen, "--last", 5).exit_code == 0
        text = Page(page.read_text(encoding="utf-8")).text
        assert "5 runs of 1 key," in text
        assert STEADY_KEY.name not in text


def test_the_command_tells_acknowledged_regressions(history: RunStore, tmp_path: Path) -> None:
    history.add(run(SLOWER_KEY, 12, 0.1, 1.2, random.Random(2)))
    acknowledge(history, [known("step_time", "known since the move")])
    page = tmp_path / "page.html"
    assert report("--store", history.place, "--output", page).exit_code == 0
    assert "known since the move" in Page(page.read_text(encoding="utf-8")).text


def test_nothing_to_report_exits_with_3_and_writes_nothing(history: RunStore, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    RunStore(tmp_path / "none.sqlite").open()
    empty = report("--store", tmp_path / "none.sqlite", "--output", page)
    assert (empty.exit_code, "it holds no run" in empty.stderr) == (3, True)
    other = report("--store", history.place, "--name", "unknown", "--output", page)
    assert (other.exit_code, "none of 24 runs has --name unknown" in other.stderr) == (3, True)
    assert not page.exists()


@pytest.mark.parametrize(
    ("store", "output", "status", "said"),
    [
        ("runs.sqlite", "missing/page.html", 2, "Give another path"),
        ("foreign.sqlite", "page.html", 4, "cannot be read or written"),
    ],
)
def test_no_place_to_write_is_wrong_usage_and_a_foreign_file_is_unreadable(
    history: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    store: str, output: str, status: int, said: str,
) -> None:  # fmt: skip
    (tmp_path / "foreign.sqlite").write_bytes(b"no database" * 100)
    arguments = ["--store", f"{tmp_path / store}", "--output", f"{tmp_path / output}"]
    monkeypatch.setattr(sys, "argv", ["kpt", "regress", "report", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == status
    assert said in capsys.readouterr().err
