"""JUnit that any reader takes: the rules of Jenkins' schema, and names that survive."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from kpt_lightning.reports.junit import to_junit
from kpt_lightning.reports.words import visible
from tests.reports.test_findings import ODD, slower, told
from tests.tracking.test_alerts import SLOWER, STEADILY, histories
from tests.tracking.test_check import STEADY, runs
from tests.tracking.test_store import KEY

# Of junit-10.xsd: element -> (attributes that must be there, attributes that may, children).
RULES = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"group", "time", "skipped", "timestamp", "hostname", "id", "package", "file", "log", "url", "version"},
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
    ),
    "testcase": ({"name"}, {"time", "classname", "group"}, {"skipped", "failure", "system-out", "system-err"}),
    "failure": (set(), {"type", "message"}, set()),
    "skipped": (set(), {"type", "message"}, set()),
    "system-out": (set(), set(), set()),
}  # fmt: skip


def parsed(text: str) -> ET.Element:
    """The document, checked by the schema's rules and for counts that are true."""
    root = ET.fromstring(text.encode())
    assert root.tag == "testsuites"
    for element in root.iter():
        required, optional, children = RULES[element.tag]
        assert required <= set(element.attrib) <= required | optional
        assert {child.tag for child in element} <= children
    for suite in [root, *root]:
        assert int(suite.attrib["tests"]) == len(list(suite.iter("testcase")))
        assert int(suite.attrib["failures"]) == len(list(suite.iter("failure")))
    return root


def test_each_outcome_has_its_form() -> None:
    pairs = [(0.1105, "a"), (0.1, "b"), (0.05, "c")]
    records = [run for last, name in pairs for run in runs([*STEADY, last], key=replace(KEY, name=name))]
    records += runs([0.1], key=replace(KEY, name="d"))
    root = parsed(to_junit(told(records)))
    assert {suite.attrib["name"].split(":")[0] for suite in root} == {"a", "b", "c", "d"}
    kinds = {case.attrib["classname"].split()[0]: [child.tag for child in case] for case in root.iter("testcase")}
    assert kinds == {"a": ["failure"], "b": [], "c": ["system-out"], "d": ["skipped"]}
    failure, skipped = next(root.iter("failure")), next(root.iter("skipped"))
    assert failure.attrib["message"].startswith("step time +10.4% (95% interval")
    assert failure.attrib["type"] == "moderate regression"
    assert "before 100.000 ms, now 110.500 ms" in (failure.text or "")
    assert skipped.attrib["message"] == "no baseline: no run to compare with"


def test_a_regression_that_does_not_fail_the_build_is_no_failure() -> None:
    root = parsed(to_junit(told(slower(), "severe")))
    (case,) = root.iter("testcase")
    assert [child.tag for child in case] == ["system-out"]
    assert root.attrib["failures"] == "0"


def test_a_case_per_metric_and_a_suite_per_key() -> None:
    records = histories(*STEADILY, SLOWER)
    other = [replace(each, key=replace(KEY, precision="fp8")) for each in histories(*STEADILY, {})]
    root = parsed(to_junit(told([*records, *other])))
    names = [case.attrib["name"] for case in root[0]]
    assert sorted(names) == sorted(["step_time", "tokens_per_second", "mfu", "peak_memory", "final_loss"])
    assert len(root) == 2
    identities = [(case.attrib["classname"], case.attrib["name"]) for case in root.iter("testcase")]
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize("name", ODD)
def test_odd_names_survive(name: str) -> None:
    records = [replace(run, metrics={name: run.metrics["step_time"]}) for run in slower(name)]
    root = parsed(to_junit(told(records)))
    (case,) = root.iter("testcase")
    assert case.attrib["name"] == visible(name)
    assert case.attrib["classname"] == f"{visible(name)} ({records[0].key.digest})"
    assert visible(name) in (next(root.iter("failure")).text or "")


def test_nothing_to_tell_is_an_empty_document() -> None:
    assert len(parsed(to_junit([]))) == 0
