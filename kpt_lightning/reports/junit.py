"""What a check found as JUnit XML, which every build server shows as tests.

Form: the schema that Jenkins publishes, https://github.com/jenkinsci/xunit-plugin (junit-10.xsd); GitLab reads it too.
"""

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from kpt_lightning.reports.findings import Finding
from kpt_lightning.reports.words import visible

SUITES = "kpt regress check"


def to_junit(found: Sequence[Finding]) -> str:
    """One test suite per key, one test case per metric.

    A failing regression is a failure; an acknowledged one and what could not be settled are skipped, with the reason;
    all else passes, and says in its output what changed.
    """
    suites: dict[str, list[Finding]] = {}
    for finding in found:
        suites.setdefault(finding.checked.key.digest, []).append(finding)
    root = ET.Element("testsuites", {"name": SUITES, **_counts(found)})
    for digest, findings in suites.items():
        skipped = sum(_is_skipped(each) for each in findings)
        suite = ET.SubElement(
            root, "testsuite", {"name": findings[0].title, "id": digest, **_counts(findings), "skipped": str(skipped)}
        )
        for finding in findings:
            _add_case(suite, finding)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _add_case(suite: ET.Element, finding: Finding) -> None:
    # Servers tell cases apart by class and name, and two keys may have one name.
    class_name = f"{finding.name} ({finding.checked.key.digest})"
    case = ET.SubElement(suite, "testcase", {"classname": class_name, "name": visible(finding.checked.metric)})
    text = "\n".join(finding.lines)
    if finding.state == "failing":
        ET.SubElement(case, "failure", {"type": finding.verdict, "message": finding.headline}).text = text
    elif _is_skipped(finding):
        message = f"{finding.verdict}: {finding.reasons[0]}"
        ET.SubElement(case, "skipped", {"type": finding.verdict, "message": message}).text = text
    elif finding.state != "passed":
        ET.SubElement(case, "system-out").text = text


def _is_skipped(finding: Finding) -> bool:
    return finding.state in ("acknowledged", "unsettled")


def _counts(found: Sequence[Finding]) -> dict[str, str]:
    failures = sum(each.state == "failing" for each in found)
    return {"tests": str(len(found)), "failures": str(failures), "errors": "0"}
