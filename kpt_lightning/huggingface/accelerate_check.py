"""What a config file for ``accelerate launch`` holds that Accelerate would drop, misread, or kpt cannot go with."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kpt_lightning.config import FP8_PRECISIONS, KptConfig
from kpt_lightning.errors import ConfigError
from kpt_lightning.huggingface.accelerate_yaml import USE_CPU_VARIABLE
from kpt_lightning.optional import ACCELERATE

if TYPE_CHECKING:
    from accelerate.commands.config.config_args import ClusterConfig

SECTIONS = {
    "dynamo_config": "dynamo_", "fsdp_config": "fsdp_", "mpirun_config": "mpirun_",
    "parallelism_config": "parallelism_config_",
}  # fmt: skip
"""Section of the file -> what the launcher's arguments of that section begin with; accelerate/commands/launch.py."""

IMPLIED_PREFIX = ("dynamo_config", "fsdp_config")
"""Sections whose keys may leave the beginning out."""

WITHOUT_ARGUMENT = ("fsdp_ignored_modules",)
"""Read by the launcher, and no argument of its."""

SUPPORTED = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP")
_WORLD_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""One of these says that somebody else, such as mpirun, started the processes."""


def check_accelerate_yaml(
    path: str | Path, config: KptConfig | None = None, environment: Mapping[str, str] | None = None
) -> None:
    """Read a config file as ``accelerate launch`` does, and refuse what would not happen as it says.

    Args:
        path: YAML, or JSON where the name ends so.
        config: The settings of kpt that go with it.
        environment: Of the launch; None is that of this process.

    Raises:
        ConfigError: Accelerate cannot read it; a nested key is unknown, which Accelerate would hand to its launcher
            unchecked; or a setting is not possible beside kpt.
        MissingDependencyError: Accelerate is not installed.
    """
    found = _read(Path(path))
    if str(found.compute_environment.value) != "LOCAL_MACHINE":
        kind = str(found.compute_environment.value)
        raise ConfigError("compute_environment", kind, "starts no python -m", "Set compute_environment: LOCAL_MACHINE")
    _check_parallel(found)
    _check_precision(found, config)
    _check_sections(found)
    _check_processes(found, os.environ if environment is None else environment)


def _read(path: Path) -> "ClusterConfig":
    ACCELERATE.require("a config file for accelerate launch")
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        return load_config_from_file(str(path))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
        rule = f"cannot be read by Accelerate: {error}"
        raise ConfigError("config_file", str(path), rule, "Correct it, or run 'kpt accelerate-config'") from error


def _check_parallel(found: "ClusterConfig") -> None:
    kind = str(found.distributed_type.value)
    if kind not in SUPPORTED:
        raise ConfigError("distributed_type", kind, "is not supported beside kpt", f"Use one of {', '.join(SUPPORTED)}")
    for section in ("deepspeed_config", "megatron_lm_config"):
        if given := getattr(found, section):
            raise ConfigError(section, given, "belongs to a launcher that kpt does not support", "Remove it")
    if kind != "FSDP":
        return
    version = found.fsdp_config.get("fsdp_version", found.fsdp_config.get("version", 1))
    if str(version) != "2":
        rule = "flattens the parameters of layers that kpt converts; Accelerate takes 1 where none is given"
        raise ConfigError("fsdp_config.fsdp_version", version, rule, "Set fsdp_version: 2")
    if found.use_cpu:
        rule = "beside distributed_type FSDP makes Accelerate run DDP"
        raise ConfigError("use_cpu", True, rule, "Set distributed_type: MULTI_GPU, or use_cpu: false")


def _check_precision(found: "ClusterConfig", config: KptConfig | None) -> None:
    given = str(found.mixed_precision or "no").lower()
    if given not in ("no", "bf16", "fp16"):
        rule = "is Accelerate's own FP8, which would convert the layers that kpt converts" if given == "fp8" else (
            "is not a mixed precision of Accelerate"
        )  # fmt: skip
        raise ConfigError("mixed_precision", found.mixed_precision, rule, "Set mixed_precision: bf16; FP8 is kpt's")
    if found.fp8_config:
        rule = "is dropped by Accelerate unless mixed_precision is fp8"
        raise ConfigError("fp8_config", found.fp8_config, rule, "Remove it; kpt's own file has a section float8")
    if config is None:
        return
    if found.use_cpu and config.precision in FP8_PRECISIONS and not config.float8.emulate:
        rule = f"trains on CPU, which has no unit for precision={config.precision!r}"
        raise ConfigError("use_cpu", True, rule, "Set use_cpu: false, or float8.emulate: true to test the numerics")
    if given != "no" and config.precision == "32":
        raise ConfigError("mixed_precision", given, "contradicts kpt's precision='32'", "Set mixed_precision: no")


def _check_sections(found: "ClusterConfig") -> None:
    arguments = _launcher_arguments()
    for section, prefix in SECTIONS.items():
        known = {name for name in arguments if name.startswith(prefix)} | set(WITHOUT_ARGUMENT)
        for key, value in getattr(found, section).items():
            name = key if key.startswith(prefix) or section not in IMPLIED_PREFIX else prefix + key
            if name not in known:
                close = difflib.get_close_matches(name, sorted(known), n=1)
                hint = f"Write {close[0]}" if close else f"Known here: {', '.join(sorted(known))}"
                rule = "is no setting of this section; Accelerate would hand it to its launcher unchecked"
                raise ConfigError(f"{section}.{key}", value, rule, hint)
    for name in ("tp_size", "cp_size", "sp_size"):
        size = found.parallelism_config.get(f"parallelism_config_{name}", 1)
        if size != 1:
            rule = "is not supported beside kpt"
            raise ConfigError(f"parallelism_config.parallelism_config_{name}", size, rule, "Set it to 1")


def _launcher_arguments() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    return {action.dest for action in launch_command_parser()._actions}


def _check_processes(found: "ClusterConfig", environment: Mapping[str, str]) -> None:
    """On CPU Accelerate does less than the file says, and does not tell."""
    kind, processes = str(found.distributed_type.value), found.num_processes
    if not found.use_cpu or processes < 2:
        return
    if kind == "MULTI_GPU" and environment.get(USE_CPU_VARIABLE, "").lower() not in ("1", "true", "yes", "on", "y"):
        rule = f"reaches none of {processes} processes: each would train alone"
        raise ConfigError("use_cpu", True, rule, f"Write {USE_CPU_VARIABLE}=true before accelerate launch")
    alone = not found.mpirun_config and not any(name in environment for name in _WORLD_VARIABLES)
    if kind in ("MULTI_CPU", "NO") and alone:
        rule = f"is started as one process by distributed_type {kind} without mpirun"
        next_step = f"Set distributed_type: MULTI_GPU, and {USE_CPU_VARIABLE}=true before accelerate launch"
        raise ConfigError("num_processes", processes, rule, next_step)
