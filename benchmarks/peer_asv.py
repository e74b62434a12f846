"""asv's step detection on many series. Runs in an environment of its own: JSON list of series in, JSON out.

As ``asv publish`` does without a setting: steps are fitted, and a regression is one that grew by 5 % or more and did
not come back. Decreases are not reported at all.
"""

import json
import sys
from importlib.metadata import version

from asv.step_detect import detect_regressions, detect_steps

THRESHOLD = 0.05


def regressions(values: list[float]) -> list[int]:
    _, _, places = detect_regressions(detect_steps(values), THRESHOLD)
    return sorted(after for _, after, _, _ in places or () if after is not None)


def main() -> None:
    found = [regressions(values) for values in json.load(sys.stdin)]
    json.dump({"version": f"asv {version('asv')}", "found": found}, sys.stdout)


if __name__ == "__main__":
    main()
