"""The report in a real browser: what a reader sees, does by keyboard, and what leaves the machine (nothing)."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kpt_lightning.reports.page import render_report
from tests.reports.chromium import PROGRAMS, Browser, chromium
from tests.reports.demo_history import PLANTED_AT, SLOWER_KEY, demo_history
from tests.reports.test_page import ODD_NAMES, odd_run

pytestmark = pytest.mark.skipif(
    None in PROGRAMS.values(), reason="Chromium is not installed (Debian: apt install chromium chromium-driver)"
)

OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"

CONTRASTS = """
const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const known = {};
const rgb = (text) => (known[text] ??= read(text));
const read = (text) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = text;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const color = rgb(getComputedStyle(element).backgroundColor);
    if (color[3] === 255) return color;
  }
  return [255, 255, 255];
};
const found = {};
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.checkVisibility() || element.closest("noscript, script")) continue;
  const style = getComputedStyle(element);
  const [one, other] = [light(rgb(element.closest("svg") ? style.fill : style.color)), light(behind(element))];
  const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  const name = `${element.tagName}.${element.getAttribute("class") ?? ""}`;
  found[name] = Math.min(found[name] ?? 99, ratio);
}
return found;
"""
"""Contrast of every visible text with what is behind it, as WCAG 2 defines it: https://www.w3.org/TR/WCAG22/#contrast-minimum"""

LEAST_CONTRAST = 4.5
"""WCAG 2, level AA."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as session:
        yield session


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("page") / "report.html"
    page.write_text(render_report(demo_history(), source=".kpt/runs.sqlite"), encoding="utf-8")
    return page


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    chance, page = random.Random(1), tmp_path / "odd.html"
    records = [odd_run(name, number, chance) for name in ODD_NAMES.values() for number in range(9)]
    page.write_text(render_report(records), encoding="utf-8")
    return page


@pytest.fixture(autouse=True)
def settled(browser: Browser) -> Iterator[None]:
    """Each test begins at a usual window, and its page may say nothing on the console."""
    browser.resize(1280, 900)
    browser.log("browser")
    browser.requests()
    yield
    assert [entry["message"] for entry in browser.log("browser")] == []


def focused(browser: Browser) -> str:
    """What the keyboard is at: its id, else its class, else its tag."""
    script = "const at = document.activeElement; return at.id || at.getAttribute('class') || at.tagName"
    found: str = browser.run(script)
    return found


def enter(browser: Browser) -> None:
    """Tab to the page's first control; the very first press may go to the window itself."""
    for _ in range(3):
        browser.press("Tab")
        if focused(browser) != "BODY":
            return


def test_the_page_asks_the_network_for_nothing(browser: Browser, demo: Path) -> None:
    browser.open(demo)
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert {*browser.requests()} <= {demo.as_uri(), "data:,"}
    assert browser.run("return performance.getEntriesByType('resource').map((each) => each.name)") in ([], ["data:,"])


def test_what_is_not_in_the_file_is_refused_by_the_browser(browser: Browser, demo: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.html"
    foreign = "<img src='https://example.invalid/a.png'><script>document.title = 'foreign'</script></main>"
    changed.write_text(demo.read_text(encoding="utf-8").replace("</main>", foreign), encoding="utf-8")
    browser.open(changed)
    assert browser.run("return document.title") != "foreign"
    refused = [entry["message"] for entry in browser.log("browser")]
    assert len(refused) == 2
    assert all("Content Security Policy" in message and "blocked" in message for message in refused)


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_scrolls_sideways_and_no_text_is_faint(
    browser: Browser, demo: Path, odd: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    browser.resize(width, 900, scheme=scheme)
    for page in (demo, odd):
        browser.open(page)
        browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert browser.run(OVERFLOW) <= 0
        faint = {name: ratio for name, ratio in browser.run(CONTRASTS).items() if ratio < LEAST_CONTRAST}
        assert faint == {}
    browser.screenshot(tmp_path / f"{width}-{scheme}.png", whole=False)
    assert (tmp_path / f"{width}-{scheme}.png").read_bytes().startswith(b"\x89PNG")


def test_names_of_users_run_no_script(browser: Browser, odd: Path) -> None:
    browser.open(odd)
    assert browser.run("return document.querySelectorAll('img, main script').length") == 0
    browser.run("document.querySelectorAll('.choose, #facts').forEach((each) => each.click && each.click())")
    browser.run("document.getElementById('all-facts').click()")
    for value in browser.run("return [...document.getElementById('run-before').options].map((each) => each.value)"):
        choose(browser, "before", value)
        assert len(facts(browser)) > 10
    assert browser.run("return document.querySelectorAll('#facts img, #facts script').length") == 0


def test_the_tab_key_reaches_every_control_and_leaves_a_chart_with_one_press(browser: Browser, demo: Path) -> None:
    browser.open(demo)
    enter(browser)
    order = [focused(browser)]
    while order[-1] != "all-facts" and len(order) < 60:
        browser.press("Tab")
        order.append(focused(browser))
    assert order[:2] == ["skip", "theme"]
    assert [name for name in order if name.startswith("run-")] == ["run-before", "run-after"]
    assert order[-1] == "all-facts"
    marks = [at for at, name in enumerate(order) if name.startswith("mark newest")]
    assert len(marks) >= 3
    assert all(not order[at + 1].startswith("mark newest") for at in marks)
    assert "choose scripted" in order


def test_the_skip_link_goes_to_the_overview(browser: Browser, demo: Path) -> None:
    browser.open(demo)
    enter(browser)
    assert browser.run("return document.activeElement.getBoundingClientRect().top") >= 0
    browser.run("document.activeElement.click()")
    assert focused(browser) == "overview"


def test_focus_and_pointer_tell_run_commit_and_value_and_the_arrow_keys_walk(browser: Browser, demo: Path) -> None:
    slower = [record for record in demo_history() if record.key == SLOWER_KEY]
    browser.open(demo)
    for _ in range(200):
        if focused(browser).startswith("mark newest"):
            break
        browser.press("Tab")
    else:
        pytest.fail("the newest run is not reached by Tab")
    tip = "const tip = document.getElementById('tip'); return tip.hidden ? null : tip.textContent"
    for step, key in ((-1, None), (-2, "ArrowLeft"), (-1, "ArrowRight"), (0, "Home")):
        if key:
            browser.press(key)
        shown = browser.run(tip)
        assert slower[step].run_id in shown
        assert slower[step].environment["git_commit"][:10] in shown
        assert "ms" in shown
    assert browser.run("return document.querySelectorAll('.plot')[0].querySelectorAll('[tabindex=\"0\"]').length") == 1
    browser.press("Escape")
    assert browser.run(tip) is None
    point = """
      const plot = document.querySelector(".plot");
      const box = plot.querySelector(".failed").getBoundingClientRect();
      plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.x + 5, clientY: box.y + 5, bubbles: true }));
    """
    browser.run(point)
    assert "failed" in browser.run(tip)


def test_the_steps_of_a_run_are_a_box_that_pointer_and_keyboard_can_read(browser: Browser, demo: Path) -> None:
    newest = [record for record in demo_history() if record.key == SLOWER_KEY][-1]
    assert newest.metrics["step_time"].quantiles is not None
    low, first, middle, third, high = (f"{1e3 * each:.2f}" for each in newest.metrics["step_time"].quantiles)
    said = f"median {middle} ms, half of 200 steps {first} to {third}, 5 to 95 % {low} to {high} · run "
    tip = "const tip = document.getElementById('tip'); return tip.hidden ? null : tip.textContent"
    browser.open(demo)
    for _ in range(60):
        browser.press("Tab")
        if focused(browser).startswith("mark box newest"):
            break
    assert browser.run(tip).replace("\u00a0", " ").startswith(said)
    browser.press("ArrowLeft")
    assert focused(browser) == "mark box at"
    browser.press("Home")
    assert focused(browser) == "mark box older at"
    assert "half of 200" in browser.run(tip).replace("\u00a0", " ")
    assert "95" not in browser.run(tip).partition("run")[0]
    outline = "return [...document.querySelectorAll('.box.at .half')].map((each) => getComputedStyle(each).stroke)"
    text = browser.run("return getComputedStyle(document.body).color")
    assert browser.run(outline) == [text]


@pytest.mark.parametrize("width", [360, 1280])
def test_the_parts_of_a_box_lie_in_order_and_the_pointer_finds_it_by_its_column(
    browser: Browser, demo: Path, width: int
) -> None:
    browser.resize(width, 900)
    browser.open(demo)
    parts = """
      const box = document.querySelector(".mark.box.newest");
      const at = (name) => [...box.querySelectorAll(name)].map((each) => each.getBoundingClientRect());
      const [half, middle] = [at(".half")[0], at(".middle")[0]];
      const ends = at(".whisker").flatMap((each) => [each.top, each.bottom]);
      return [Math.min(...ends), half.top, middle.top, half.bottom, Math.max(...ends)];
    """
    places = browser.run(parts)
    assert places == sorted(places)
    assert places[-1] - places[0] > 10
    point = """
      const boxes = [...document.querySelectorAll(".plot:has(.box)")][0].querySelectorAll(".box");
      const column = boxes[arguments[0]].querySelector(".column").getBoundingClientRect();
      const where = { clientX: column.left + column.width / 2, clientY: column.bottom - 3, bubbles: true };
      boxes[0].closest(".plot").dispatchEvent(new PointerEvent("pointermove", where));
      return [...boxes].findIndex((each) => each.classList.contains("at"));
    """
    assert [browser.run(point, at) for at in (0, 11, 29)] == [0, 11, 29]


def test_the_choice_of_colours_is_kept(browser: Browser, demo: Path) -> None:
    background = "return getComputedStyle(document.documentElement).backgroundColor"
    browser.open(demo)
    light = browser.run(background)
    assert browser.run("return document.getElementById('theme').textContent") == "Dark colours"
    browser.run("document.getElementById('theme').click()")
    dark = browser.run(background)
    assert dark != light
    browser.open(demo)
    assert browser.run(background) == dark
    assert browser.run("return document.getElementById('theme').textContent") == "Light colours"
    browser.run("document.getElementById('theme').click()")
    browser.resize(1280, 900, scheme="dark")
    browser.open(demo)
    assert browser.run(background) == light
    browser.run("localStorage.clear()")


def facts(browser: Browser, chosen: str = "") -> list[list[str]]:
    """The rows of the table of two runs that are visible, or those of one class."""
    script = """
      const rows = [...document.querySelectorAll(`#facts tbody tr:not(.part)${arguments[0]}`)];
      return rows.filter((row) => row.checkVisibility()).map((row) => [...row.cells].map((cell) => cell.textContent));
    """
    # The first layout of a page may still be to come; every table here has rows.
    give_up = time.monotonic() + 5
    while not (rows := browser.run(script, chosen)) and time.monotonic() < give_up:
        time.sleep(0.05)
    found: list[list[str]] = rows
    return found


def choose(browser: Browser, which: str, run_id: str) -> None:
    """As a reader who picks another run."""
    script = """
      const select = document.getElementById(`run-${arguments[0]}`);
      select.value = arguments[1];
      select.dispatchEvent(new Event("change", { bubbles: true }));
    """
    browser.run(script, which, run_id)


def test_choosing_two_runs_changes_the_table(browser: Browser, demo: Path) -> None:
    slower = [record for record in demo_history() if record.key == SLOWER_KEY]
    browser.open(demo)
    before = facts(browser, ".unlike")
    assert [row[0] for row in before] == ["git_commit", "changes.causal_attention.setting.backend"]
    choose(browser, "before", slower[-2].run_id)
    assert [row[0] for row in facts(browser, ".unlike")] == ["git_commit"]
    assert browser.run("return document.getElementById('unlike').textContent").replace("\xa0", " ") == "1 difference."
    few = len(facts(browser))
    browser.run("document.getElementById('all-facts').click()")
    assert len(facts(browser)) > few + 10
    assert ["device", SLOWER_KEY.device, SLOWER_KEY.device, ""] in facts(browser)


def test_the_scripts_table_is_the_files_table(browser: Browser, demo: Path) -> None:
    everything = "return document.getElementById('facts').innerText"
    browser.open(demo)
    written = browser.run(everything)
    choose(browser, "after", browser.run("return document.getElementById('run-after').value"))
    assert browser.run(everything) == written


def test_a_change_offers_its_two_runs(browser: Browser, demo: Path) -> None:
    slower = [record for record in demo_history() if record.key == SLOWER_KEY]
    browser.open(demo)
    browser.run("document.querySelector('.choose').click()")
    chosen = browser.run("return ['before', 'after'].map((name) => document.getElementById(`run-${name}`).value)")
    assert chosen == [slower[PLANTED_AT - 1].run_id, slower[PLANTED_AT].run_id]
    assert focused(browser) == "two-runs"


def test_without_scripts_all_but_the_choice_is_there(browser: Browser, demo: Path) -> None:
    browser.without_scripts()
    try:
        browser.open(demo)
        assert browser.shows("Two runs side by side")
        assert browser.shows("changes.causal_attention.setting.backend")
        assert browser.shows("Without scripts two other runs cannot be chosen")
        assert "Compare the runs on both sides" not in "\n".join(browser.snapshot())
    finally:
        browser.without_scripts(off=False)


def test_paper_has_every_chart_and_no_control(browser: Browser, demo: Path) -> None:
    browser.open(demo)
    browser.media("print")
    try:
        visible = "return [...document.querySelectorAll(arguments[0])].map((each) => each.checkVisibility())"
        assert not any(browser.run(visible, "button, nav, select"))
        browser.run("dispatchEvent(new Event('beforeprint'))")
        assert all(browser.run(visible, ".plot"))
        assert browser.run(OVERFLOW) <= 0
        browser.run("dispatchEvent(new Event('afterprint'))")
    finally:
        browser.media("")
