"""Apache Otava on many series. Runs in an environment of its own: JSON list of series in, JSON of what it found out.

Otava 0.8 reports an increase and a decrease alike; these are its defaults, P 0.001 in windows of 50.
"""

import json
import sys
from importlib.metadata import version

from otava.analysis import compute_change_points
from otava.series import AnalysisOptions


def main() -> None:
    options = AnalysisOptions()
    found = []
    for values in json.load(sys.stdin):
        changes, _ = compute_change_points(
            values,
            window_len=options.window_len,
            max_pvalue=options.max_pvalue,
            min_magnitude=options.min_magnitude,
        )
        found.append(sorted(int(change.index) for change in changes))
    json.dump({"version": f"apache-otava {version('apache-otava')}", "found": found}, sys.stdout)


if __name__ == "__main__":
    main()
