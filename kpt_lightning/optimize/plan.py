"""The plan: one object that says what is done to a model and why, and what was proved to have run."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table

from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Decision, from_dict, to_dict


@dataclass(slots=True, kw_only=True)
class Plan:
    """What is done to one model on one device.

    Attributes:
        config: The settings that it was made from.
        device: Name of the device.
        precision: fp8, bf16, bf16-mixed, 32, or what the trainer was given.
        parallel: single, ddp or fsdp2.
        choices: Decisions about the whole run.
        layers: One decision for each linear layer, when FP8 was considered.
        blocks: One decision for each repeated block.
        proofs: What was seen to run in the first steps.
    """

    config: KptConfig
    device: str
    precision: str
    parallel: str
    choices: list[Decision] = field(default_factory=list)
    layers: list[Decision] = field(default_factory=list)
    blocks: list[Decision] = field(default_factory=list)
    proofs: list[Decision] = field(default_factory=list)

    @property
    def float8_layers(self) -> list[str]:
        """Names of the layers that run in FP8."""
        return _accepted(self.layers) if self.precision == "fp8" else []

    @property
    def compiled_blocks(self) -> list[str]:
        """Names of the blocks that are compiled."""
        return _accepted(self.blocks) if self.accepts("compile blocks") else []

    def accepts(self, subject: str) -> bool:
        """Whether that choice was accepted."""
        return any(choice.subject == subject and bool(choice) for choice in self.choices)

    def explain(self, name: str) -> list[Decision]:
        """Every decision about one layer, block or choice."""
        return [decision for decision in self._all() if decision.subject == name]

    def summary(self) -> str:
        """One line."""
        parts = [f"{self.precision}, {self.parallel}, on {self.device}"]
        if self.precision == "fp8":
            parts.append(
                f"{len(self.float8_layers)} of {len(self.layers)} linear layers in FP8 ({self.config.float8.recipe})"
            )
        if self.compiled_blocks:
            parts.append(f"{len(self.compiled_blocks)} blocks compiled")
        if self.accepts("compile loss"):
            parts.append("loss compiled")
        return "; ".join(parts)

    def render(self) -> Table:
        """A table for a terminal: choices, then layers and blocks grouped by like reasons, then proofs."""
        table = Table(title=f"Plan: {self.summary()}", title_justify="left", show_lines=False)
        table.add_column("")
        table.add_column("what", overflow="fold")
        table.add_column("why", overflow="fold")
        for decision in self.choices:
            _row(table, decision.subject, decision)
        for title, decisions in (("linear layer", self.layers), ("block", self.blocks)):
            for text, decision in _grouped(title, decisions):
                _row(table, text, decision)
        for decision in self.proofs:
            _row(table, f"proved: {decision.subject}", decision)
        return table

    def to_dict(self) -> dict[str, Any]:
        """JSON-like data, which survives ``torch.load(weights_only=True)``."""
        return {
            "config": self.config.model_dump(mode="json", exclude_unset=True),
            "device": self.device,
            "precision": self.precision,
            "parallel": self.parallel,
            **{name: [to_dict(decision) for decision in getattr(self, name)] for name in _LISTS},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Plan":
        """The inverse of :meth:`to_dict`."""
        return cls(
            config=KptConfig.build(data["config"]),
            device=data["device"],
            precision=data["precision"],
            parallel=data["parallel"],
            **{name: [from_dict(item) for item in data[name]] for name in _LISTS},
        )

    def _all(self) -> list[Decision]:
        return [*self.choices, *self.layers, *self.blocks, *self.proofs]


_LISTS = ("choices", "layers", "blocks", "proofs")


def _accepted(decisions: Sequence[Decision]) -> list[str]:
    return [decision.subject for decision in decisions if decision]


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
