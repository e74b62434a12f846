"""The plan: one object that says what is done to a model and why, and what was proved to have run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Group
from rich.table import Table

from kpt_lightning.candidates.candidate import Change
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Accepted, Decision, Rejected, from_dict, to_dict
from kpt_lightning.errors import ConfigError
from kpt_lightning.optimize.trial_record import TrialRecord


@dataclass(slots=True, kw_only=True)
class Plan:
    """What is done to one model on one device.

    Attributes:
        config: The settings that it was made from.
        device: Name of the device.
        precision: fp8, fp8-true, bf16, bf16-mixed, 32, or what the trainer was given.
        parallel: single, ddp or fsdp2.
        choices: Decisions about the whole run.
        layers: One decision for each linear layer, when FP8 was considered.
        blocks: One decision for each repeated block.
        proofs: What was seen to run in the first steps.
        changes: What is applied to the model, the whole of it.
        trials: What was measured, for a plan by trial.
        basis: "rules", "trial", or where a trial's plan was taken from.
        seconds: What the trials cost; 0 by rules.
        whole: All kept changes together against the unchanged model; None for a plan by rules.
    """

    config: KptConfig
    device: str
    precision: str
    parallel: str
    choices: list[Decision] = field(default_factory=list)
    layers: list[Decision] = field(default_factory=list)
    blocks: list[Decision] = field(default_factory=list)
    proofs: list[Decision] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    trials: list[TrialRecord] = field(default_factory=list)
    basis: str = "rules"
    seconds: float = 0.0
    whole: TrialRecord | None = None

    @property
    def float8_layers(self) -> list[str]:
        """Names of the layers that run in FP8, small ones beside larger ones too."""
        groups = self.setting("float8_siblings").get("groups", ())
        beside = (name for group in groups for name in group)
        return list(dict.fromkeys([*self.setting("float8").get("layers", ()), *beside]))

    @property
    def merges_float8(self) -> bool:
        """Whether FP8 products of several layers are to run as one GEMM."""
        groups = self.setting("float8_siblings").get("groups", ())
        return bool(self.setting("float8_mlp")) or any(len(group) > 1 for group in groups)

    @property
    def compiled_blocks(self) -> list[str]:
        """Names of the blocks that are compiled."""
        names = [*self.setting("compile_blocks").get("blocks", ()), *self.setting("causal_attention").get("blocks", ())]
        return [str(name) for name in names]

    @property
    def compiled_modules(self) -> int:
        """How many modules are compiled: blocks, or others as a whole."""
        return len(self.compiled_blocks) + len(self.setting("compile_model").get("modules", ()))

    def setting(self, candidate: str) -> Mapping[str, Any]:
        """The setting of that candidate's change, empty where there is none."""
        return next((each.setting for each in self.changes if each.candidate == candidate), {})

    def accepts(self, subject: str) -> bool:
        """Whether that choice was accepted."""
        return any(choice.subject == subject and bool(choice) for choice in self.choices)

    def explain(self, name: str) -> list[Decision]:
        """Every decision about one layer, block, choice or candidate."""
        return [decision for decision in self._all() if decision.subject == name]

    def summary(self) -> str:
        """One line."""
        parts = [f"{self.precision}, {self.parallel}, on {self.device}"]
        for change in self.changes:
            setting = change.setting
            if change.candidate == "float8":
                count = f"{len(self.float8_layers)} of {len(self.layers)}"
                recipe = ", by ".join(filter(None, (setting["recipe"], setting.get("backend"))))
                parts.append(f"{count} linear layers in FP8 ({recipe})")
            elif change.candidate == "compile_blocks":
                graphs = ", as CUDA graphs where inputs are small" if setting.get("graphs") else ""
                parts.append(f"{len(setting['blocks'])} blocks compiled{graphs}")
            elif change.candidate == "compile_loss":
                parts.append("loss compiled")
            else:
                parts.append(change.candidate.replace("_", " "))
        if self.whole is not None and self.whole.kept and self.whole.gain is not None:
            parts.append(f"{self.whole.gain:.2f}x by trial")
        elif self.basis != "rules" and not self.changes:
            parts.append("unchanged: nothing tried was faster")
        return "; ".join(parts)

    def render(self) -> Group:
        """Tables for a terminal: trials, then choices, layers and blocks grouped by like reasons, and proofs."""
        title = f"Plan by {self.basis}: {self.summary()}"
        table = Table(title=None if self.trials else title, title_justify="left")
        table.add_column("")
        table.add_column("what", overflow="fold")
        table.add_column("why", overflow="fold")
        for decision in self.choices:
            _row(table, decision.subject, decision)
        for name, decisions in (("linear layer", self.layers), ("block", self.blocks)):
            for text, decision in _grouped(name, decisions):
                _row(table, text, decision)
        for decision in self.proofs:
            _row(table, f"proved: {decision.subject}", decision)
        whole = [] if self.whole is None else [self.whole]
        return Group(*([_trials_table([*self.trials, *whole], title)] if self.trials else []), table)

    def to_dict(self) -> dict[str, Any]:
        """JSON-like data, which survives ``torch.load(weights_only=True)``."""
        return {
            "config": self.config.model_dump(mode="json", exclude_unset=True),
            "device": self.device,
            "precision": self.precision,
            "parallel": self.parallel,
            **{name: [to_dict(decision) for decision in getattr(self, name)] for name in _LISTS},
            "changes": [change.to_dict() for change in self.changes],
            "trials": [trial.to_dict() for trial in self.trials],
            "basis": self.basis,
            "seconds": self.seconds,
            "whole": None if self.whole is None else self.whole.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Plan":
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: A key is missing, as in a plan of another version.
        """
        for name in ("device", "precision", "parallel", "basis"):
            if not isinstance(data.get(name, ""), str):
                raise ConfigError(f"plan.{name}", data[name], "must be text", "Make a new plan")
        try:
            return cls(
                config=KptConfig.build(data["config"]),
                device=data["device"],
                precision=data["precision"],
                parallel=data["parallel"],
                **{name: [from_dict(item) for item in data[name]] for name in _LISTS},
                changes=[Change.from_dict(item) for item in data["changes"]],
                trials=[TrialRecord.from_dict(item) for item in data["trials"]],
                basis=data["basis"],
                seconds=data["seconds"],
                whole=None if data["whole"] is None else TrialRecord.from_dict(data["whole"]),
            )
        except (KeyError, TypeError) as error:
            rule = f"does not have the form of this version ({error!r})"
            raise ConfigError("plan", sorted(data), rule, "Make a new plan") from error

    def _all(self) -> list[Decision]:
        tried = [
            (Accepted if trial.kept else Rejected)(trial.candidate, trial.what + ": " * bool(trial.what) + trial.reason)
            for trial in self.trials
        ]
        return [*self.choices, *self.layers, *self.blocks, *self.proofs, *tried]


_LISTS = ("choices", "layers", "blocks", "proofs")


def _grouped(title: str, decisions: Sequence[Decision]) -> list[tuple[str, Decision]]:
    """Layers of like verdict and reason as one row, with their number, the ends of their names and their shapes."""
    groups: dict[tuple[bool, str], list[tuple[Decision, str]]] = {}
    for decision in decisions:
        shape, _, reason = decision.reason.partition(": ")
        groups.setdefault((bool(decision), reason), []).append((decision, shape))
    rows: list[tuple[str, Decision]] = []
    for (_, reason), members in groups.items():
        names = dict.fromkeys(_end_of_name(decision.subject) for decision, _ in members)
        shapes = ", ".join(dict.fromkeys(shape for _, shape in members))
        why = f"{reason} ({shapes})" if reason else shapes
        plural = "s" if len(members) > 1 else ""
        what = f"{len(members)} {title}{plural}: {', '.join(names)}"
        rows.append((what, replace(members[0][0], reason=why)))
    return rows


def _end_of_name(name: str) -> str:
    """The last two parts, numbers as stars: ``layers.3.mlp.up_proj`` is ``mlp.up_proj``."""
    return ".".join("*" if part.isdigit() else part for part in name.split(".")[-2:])


def _row(table: Table, what: str, decision: Decision) -> None:
    mark = "[green]yes[/green]" if decision else "[yellow]no[/yellow]"
    table.add_row(mark, what.replace("[", r"\["), decision.reason.replace("[", r"\["))


def _trials_table(trials: Sequence[TrialRecord], title: str) -> Table:
    """What was tried: the figure in one column, everything that explains it in another."""
    table = Table(title=title, title_justify="left")
    for name in ("", "tried", "speed", "why"):
        table.add_column(name, overflow="fold")
    for trial in trials:
        mark = "[green]kept[/green]" if trial.kept else "[yellow]no[/yellow]"
        what = trial.candidate + (f": {trial.what}" if trial.what else "")
        cells = (what, _speed(trial), "\n".join(_reasons(trial)))
        table.add_row(mark, *(cell.replace("[", r"\[") for cell in cells))
    return table


def _speed(trial: TrialRecord) -> str:
    lines = [] if trial.gain is None else [f"{trial.gain:.3f}x"]
    lines += _interval("", trial.low, trial.high) + _interval("expected again: ", trial.expect_low, trial.expect_high)
    return "\n".join(lines + ([] if trial.predicted is None else [f"predicted {trial.predicted:.2f}x"]))


def _interval(title: str, low: float | None, high: float | None) -> list[str]:
    """Nothing where it has no ends: too few rounds were worth it."""
    return [] if low is None or high is None else [f"({title}{low:.3f} to {high:.3f})"]


def _reasons(trial: TrialRecord) -> list[str]:
    lines = [trial.reason]
    if trial.gate and trial.gate not in trial.reason:
        lines.append(f"numbers: {trial.gate}")
    if trial.memory_bytes is not None:
        lines.append(f"peak memory {trial.memory_bytes / 1e6:+,.0f} MB")
    if trial.gain is not None or trial.gate:
        lines.append(f"level {trial.level}")
    return lines
