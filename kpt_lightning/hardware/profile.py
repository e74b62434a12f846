"""The machine as one frozen value: every later decision reads this and nothing else."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kpt_lightning.decision import Decision
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import features, peaks
from kpt_lightning.hardware.device import DeviceProfile, check_keys

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Link:
    """How two accelerators talk, by their positions in ``HardwareProfile.devices``.

    Attributes:
        first: Position of the one.
        second: Position of the other.
        kind: "nvlink", "pcie" (same host bridge), "node" (same NUMA node) or "system" (across sockets).
    """

    first: int
    second: int
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """Devices, host and versions of one machine, with the decisions that follow from them alone.

    Attributes:
        devices: The accelerators this process may use, in torch's order; the host alone where there is none.
        host: The CPU, always present.
        versions: Name to version of torch, python, cuda, cudnn, nccl, triton, driver, lightning and others where
            present; "cc" and "cxx" name the C and C++ compilers found.
        links: How the accelerators are linked, empty where unknown.
        notes: What detection saw and could not use, such as a GPU that this torch build cannot reach.
        recorded: True where a machine was asked, False where the facts come from a data sheet.
        origin: Where the facts come from.
    """

    devices: tuple[DeviceProfile, ...]
    host: DeviceProfile
    versions: Mapping[str, str] = field(default_factory=dict)
    links: tuple[Link, ...] = ()
    notes: tuple[str, ...] = ()
    recorded: bool = True
    origin: str = "detected"

    def __post_init__(self) -> None:
        if not self.devices:
            rule = "a profile has at least one device"
            raise ConfigError("devices", self.devices, rule, "Give the host where there is no accelerator")

    @property
    def primary(self) -> DeviceProfile:
        """The device that decisions are about: the weakest accelerator, or the CPU."""
        return min(self.devices, key=lambda device: (device.capability or (0, 0), device.memory_bytes))

    @property
    def kind(self) -> str:
        """The torch device type of :attr:`primary`."""
        return self.primary.kind

    @property
    def is_mixed(self) -> bool:
        """Whether the accelerators are unlike."""
        return len({device.model for device in self.devices}) > 1

    def supports(self, feature: str) -> Decision:
        """Whether every device can do something, and why.

        Args:
            feature: One of :data:`kpt_lightning.hardware.features.NAMES`.

        Returns:
            Accepted or Rejected; on unlike devices the weakest decides and the reason names it.

        Raises:
            ConfigError: The feature is unknown.
        """
        return features.decide(feature, self.devices, self.versions)

    def peak_flops(self, dtype: str) -> peaks.Peak | None:
        """Dense peak rate of the primary device in FLOP/s, None where no data sheet figure is known.

        Args:
            dtype: "float32", "tf32", "float16", "bfloat16", "float8" or "int8".

        Raises:
            ConfigError: The dtype is none of these.
        """
        return peaks.peak_flops(self.primary, dtype)

    def peak_bandwidth(self) -> peaks.Bandwidth | None:
        """Memory rate of the primary device in bytes per second, None where unknown."""
        return peaks.peak_bandwidth(self.primary)

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON-like data, with the version of its schema."""
        return {
            "schema": SCHEMA,
            "recorded": self.recorded,
            "origin": self.origin,
            "devices": [device.to_dict() for device in self.devices],
            "host": self.host.to_dict(),
            "versions": dict(self.versions),
            "links": [asdict(link) for link in self.links],
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "HardwareProfile":
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: The schema is another one, a key is unknown, or a needed one is missing.
        """
        if data.get("schema") != SCHEMA:
            rule = f"this version reads hardware profiles of schema {SCHEMA}"
            raise ConfigError("schema", data.get("schema"), rule, "Detect the profile again")
        values = {key: value for key, value in data.items() if key != "schema"}
        known = frozenset(entry.name for entry in fields(cls))
        check_keys("profile", values, known, frozenset({"devices", "host"}))
        values["devices"] = tuple(DeviceProfile.from_dict(device) for device in values["devices"])
        values["host"] = DeviceProfile.from_dict(values["host"])
        values["links"] = tuple(Link(**link) for link in values.get("links", ()))
        values["notes"] = tuple(values.get("notes", ()))
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "HardwareProfile":
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: The file is not JSON, or as in :meth:`from_dict`.
            OSError: The file cannot be read.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ConfigError(
                "profile", str(path), f"not JSON ({error})", "Write it with HardwareProfile.save"
            ) from error
        return cls.from_dict(data)
