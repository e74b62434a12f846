"""Versions that this package leans on, checked before the first private point is touched."""

from collections.abc import Mapping
from importlib import metadata

from packaging.specifiers import SpecifierSet

from kpt_lightning.errors import MissingDependencyError

NEEDED = {"lightning": "<2.7,>=2.6", "torch": ">=2.9"}
"""As in pyproject.toml; the strategies use private points of Lightning 2.6."""


def check_versions(installed: Mapping[str, str] | None = None) -> None:
    """Refuse a version that was not tried.

    Args:
        installed: Distribution to version; None asks the environment.

    Raises:
        MissingDependencyError: One is too old or too new, with the pip line.
    """
    for name, wanted in NEEDED.items():
        version = metadata.version(name) if installed is None else installed[name]
        if not SpecifierSet(wanted).contains(version, prereleases=True):
            raise MissingDependencyError(
                f"{name} {version} is installed, and kpt-lightning needs {name}{wanted}. "
                f"Run: pip install '{name}{wanted}'"
            )
