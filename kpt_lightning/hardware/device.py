"""One device: what it is called, which generation it belongs to, and what it holds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kpt_lightning.errors import ConfigError

REQUIRED = frozenset({"kind", "vendor", "name", "architecture", "memory_bytes"})


def check_keys(field: str, data: Mapping[str, Any], known: frozenset[str], required: frozenset[str]) -> None:
    """Raise ConfigError where a stored profile has a key too many or too few."""
    if unknown := sorted(set(data) - known):
        raise ConfigError(
            field, unknown, f"is unknown; known are {', '.join(sorted(known))}", "Remove or rename the key"
        )
    if missing := sorted(required - set(data)):
        raise ConfigError(field, missing, "is missing in the stored profile", "Add it, or detect the profile again")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """Facts about one device, as data: nothing here asks the machine.

    Attributes:
        kind: The torch device type: "cuda", "cpu", "xla", "mps" or "xpu". AMD GPUs are "cuda" in torch too.
        vendor: "nvidia", "amd", "intel", "apple", "google" or "arm", lower case.
        name: The name that the driver or the operating system gives.
        architecture: Generation: "volta" to "blackwell" for NVIDIA, the instruction set ("x86_64") for a CPU.
        memory_bytes: Memory of the device, or of the host that this process may use for a CPU. The driver and
            torch differ by the driver's own share (below 2 %), so this is a size and not an identity.
        capability: NVIDIA compute capability as (major, minor), None for everything else.
        multiprocessors: Streaming multiprocessors of an NVIDIA GPU or of the MIG slice.
        cores: Logical CPU cores that this process may use.
        isa: The instruction sets that matter for training, such as "avx512_bf16" and "amx_bf16"; CPU only.
        mig: MIG slice such as "1g.10gb", None for a whole GPU.
        driver: Version of the device driver.
        uuid: Identity that the driver gives, None where unknown.
        power_limit_watts: Power limit in force.
        power_default_watts: Power limit the device is sold with.
    """

    kind: str
    vendor: str
    name: str
    architecture: str
    memory_bytes: int
    capability: tuple[int, int] | None = None
    multiprocessors: int | None = None
    cores: int | None = None
    isa: tuple[str, ...] = ()
    mig: str | None = None
    driver: str | None = None
    uuid: str | None = None
    power_limit_watts: float | None = None
    power_default_watts: float | None = None

    @property
    def title(self) -> str:
        """Name, generation and capability, as used in reasons."""
        if self.capability is None:
            return f"{self.name} ({self.architecture})"
        return f"{self.name} ({self.architecture}, compute capability {self.capability[0]}.{self.capability[1]})"

    @property
    def model(self) -> tuple[str, str, str, tuple[int, int] | None, str | None, int | None]:
        """What makes two devices alike: everything but identity, driver, memory size and power."""
        return (self.kind, self.vendor, self.name, self.capability, self.mig, self.multiprocessors)

    def to_dict(self) -> dict[str, Any]:
        """The device as JSON-like data; tuples become lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DeviceProfile":
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: A key is unknown or a needed one is missing.
        """
        check_keys("device", data, frozenset(field.name for field in fields(cls)), REQUIRED)
        values = dict(data)
        values["isa"] = tuple(values.get("isa") or ())
        if values.get("capability") is not None:
            major, minor = values["capability"]
            values["capability"] = (int(major), int(minor))
        return cls(**values)
