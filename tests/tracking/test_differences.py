"""What differs between two runs is told by name, and what is measured anew in each run is not."""

import dataclasses

from kpt_lightning.tracking.differences import differences, environment_changes
from tests.tracking.test_store import make

PLAN = {
    "precision": "bf16", "seconds": 1.0, "trials": [{"candidate": "compile_blocks", "gain": 1.1}],
    "choices": [{"subject": "fp8", "accepted": False, "reason": "too old"}],
    "changes": [{"candidate": "compile_blocks", "setting": {"blocks": ["layers.0"]}, "reason": "faster"}],
}  # fmt: skip


def test_equal_runs_have_no_differences():
    assert differences(make("a"), make("b")) == {}


def test_environment_key_settings_and_plan_are_told_in_this_order():
    old = dataclasses.replace(make("a"), environment={"torch": "2", "git_commit": "c1"}, plan=PLAN, details={})
    plan = PLAN | {
        "seconds": 9.0,
        "choices": [{"subject": "fp8", "accepted": True, "reason": "measured"}],
        "changes": [],
    }
    new = dataclasses.replace(
        old, key=dataclasses.replace(old.key, precision="fp8"), environment={"torch": "3", "git_commit": "c2"},
        plan=plan, details={"config": {"batch": [4, 8]}},
    )  # fmt: skip
    assert differences(old, new) == {
        "environment.git_commit": ("c1", "c2"),
        "environment.torch": ("2", "3"),
        "key.precision": ("32-true", "fp8"),
        "config.batch": (None, [4, 8]),
        "plan.changes": (None, []),
        "plan.changes.compile_blocks.setting.blocks": (["layers.0"], None),
        "plan.choices.fp8.accepted": (False, True),
    }
    assert list(differences(old, new))[:2] == ["environment.git_commit", "environment.torch"]


def test_a_changed_commit_is_a_difference_and_no_changed_environment():
    old, new = (dataclasses.replace(make("a"), environment={"torch": "2", "git_commit": each}) for each in "cd")
    assert environment_changes(old, new) == {}
    assert differences(old, new) == {"environment.git_commit": ("c", "d")}
