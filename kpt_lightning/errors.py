"""Error types. Every message says: field, value, rule, next step."""


class KptError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(KptError, ValueError):
    """A setting of the user's is unknown, of the wrong type, or contradicts another one."""

    def __init__(self, field: str, value: object, rule: str, next_step: str) -> None:
        """Compose the message from its four parts.

        Args:
            field: Dotted name of the setting, as the user writes it.
            value: What the user gave.
            rule: What the setting must satisfy, a clause without full stop.
            next_step: What the user can do now, a sentence without full stop.
        """
        super().__init__(f"{field}={value!r}: {rule}. {next_step}.")
        self.field, self.value, self.rule, self.next_step = field, value, rule, next_step

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, object, str, str]]:
        """Pickle by the four parts: an error crosses process borders under a launcher."""
        return type(self), (self.field, self.value, self.rule, self.next_step)


class UnsupportedHardwareError(KptError, RuntimeError):
    """An explicit request needs a unit that this machine lacks."""


class VerificationError(KptError, RuntimeError):
    """Something that was planned did not run."""


class MissingDependencyError(KptError, ModuleNotFoundError):
    """An optional package is absent; the message carries the pip line."""


class HistoryError(KptError, RuntimeError):
    """A run history cannot be opened, read or written."""
