import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from kpt_lightning.config import KptConfig
from kpt_lightning.errors import ConfigError
from kpt_lightning.huggingface.accelerate_check import check_accelerate_yaml
from kpt_lightning.huggingface.accelerate_yaml import AccelerateSetup, setup_for_this_machine

PLAIN = {"distributed_type": "NO", "num_processes": 1}
SHARDED = {"distributed_type": "FSDP", "num_processes": 2}
TWO_ON_CPU = {"distributed_type": "MULTI_GPU", "num_processes": 2, "use_cpu": True}


@pytest.fixture
def check(tmp_path):
    def run(settings, config=None, environment=None):
        path = tmp_path / "acc.yaml"
        path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
        check_accelerate_yaml(path, config, {} if environment is None else environment)

    return run


@pytest.mark.parametrize("mixed", ["bf16", "no"])
@pytest.mark.parametrize(
    ("parallel", "processes", "cpu"),
    [("single", 1, True), ("single", 1, False), ("ddp", 2, True), ("ddp", 8, False), ("fsdp2", 4, False)],
)
def test_what_is_written_is_what_accelerate_reads(tmp_path, parallel, processes, cpu, mixed):
    setup = AccelerateSetup(parallel=parallel, processes=processes, mixed_precision=mixed, cpu=cpu)
    setup.write(tmp_path / "acc.yaml")
    read = load_config_from_file(str(tmp_path / "acc.yaml"))
    assert isinstance(read, ClusterConfig)
    assert (read.num_processes, read.mixed_precision, read.use_cpu) == (processes, mixed, cpu)
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(read.fsdp_config) <= known
    check_accelerate_yaml(tmp_path / "acc.yaml", environment={"ACCELERATE_USE_CPU": "true"})


def test_the_setup_for_this_machine_is_one_that_passes(tmp_path):
    setup_for_this_machine().write(tmp_path / "acc.yaml")
    check_accelerate_yaml(tmp_path / "acc.yaml")


@pytest.mark.parametrize(
    ("settings", "named", "told"),
    [
        (PLAIN | {"kpt": 1}, "config_file", "unknown keys (['kpt'])"),
        ({"num_processes": 1}, "config_file", "distributed_type"),
        ("- 1\n", "config_file", "cannot be read"),
        ("a: [", "config_file", "cannot be read"),
        (PLAIN | {"mixed_precision": "fp8"}, "mixed_precision", "Accelerate's own FP8"),
        (PLAIN | {"mixed_precision": "fp4"}, "mixed_precision", "is not a mixed precision"),
        (PLAIN | {"fp8_config": {"backend": "AO"}}, "fp8_config", "is dropped"),
        (PLAIN | {"deepspeed_config": {"module": True}}, "deepspeed_config", "does not support"),
        (PLAIN | {"dynamo_config": {"dynamo_bakend": "INDUCTOR"}}, "dynamo_config.dynamo_bakend", "dynamo_backend"),
        (PLAIN | {"mpirun_config": {"module": True}}, "mpirun_config.module", "mpirun_hostfile"),
        ({"distributed_type": "DEEPSPEED", "num_processes": 2}, "distributed_type", "DEEPSPEED"),
        ({"distributed_type": "MEGATRON_LM", "num_processes": 2}, "distributed_type", "MEGATRON_LM"),
        ({"distributed_type": "XLA", "num_processes": 2}, "distributed_type", "XLA"),
        (SHARDED, "fsdp_config.fsdp_version", "takes 1 where none is given"),
        (SHARDED | {"fsdp_config": {"fsdp_version": 1}}, "fsdp_config.fsdp_version", "Set fsdp_version: 2"),
        (SHARDED | {"fsdp_config": {"version": 2, "reshard": 1}}, "fsdp_config.reshard", "fsdp_reshard_after_forward"),
        (SHARDED | {"fsdp_config": {"fsdp_version": 2}, "use_cpu": True}, "use_cpu", "run DDP"),
        (
            SHARDED | {"fsdp_config": {"fsdp_version": 2}, "parallelism_config": {"parallelism_config_tp_size": 2}},
            "parallelism_config.parallelism_config_tp_size",
            "Set it to 1",
        ),
        (TWO_ON_CPU, "use_cpu", "each would train alone"),
        (TWO_ON_CPU | {"distributed_type": "MULTI_CPU"}, "num_processes", "as one process"),
    ],
)  # fmt: skip
def test_what_would_not_happen_as_it_says_is_refused(check, settings, named, told):
    with pytest.raises(ConfigError) as raised:
        check(settings)
    assert raised.value.field == named
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "environment"),
    [
        (TWO_ON_CPU, {"ACCELERATE_USE_CPU": "true"}),
        (TWO_ON_CPU | {"distributed_type": "MULTI_CPU"}, {"OMPI_COMM_WORLD_SIZE": "2"}),
        (TWO_ON_CPU | {"distributed_type": "MULTI_CPU", "mpirun_config": {"mpirun_hostfile": "hosts"}}, {}),
        (PLAIN | {"mixed_precision": "fp16"}, {}),
        (SHARDED | {"fsdp_config": {"version": 2, "fsdp_ignored_modules": "head"}}, {}),
    ],
)
def test_what_accelerate_can_do_beside_kpt_passes(check, settings, environment):
    check(settings, environment=environment)


@pytest.mark.parametrize(
    ("settings", "config", "named"),
    [
        (PLAIN | {"use_cpu": True}, KptConfig(precision="fp8"), "use_cpu"),
        (PLAIN | {"mixed_precision": "bf16"}, KptConfig(precision="32"), "mixed_precision"),
    ],
)
def test_the_two_files_may_not_contradict_each_other(check, settings, config, named):
    with pytest.raises(ConfigError) as raised:
        check(settings, config)
    assert raised.value.field == named


def test_emulated_fp8_may_run_on_cpu(check):
    check(PLAIN | {"use_cpu": True}, KptConfig(precision="fp8", float8={"emulate": True}))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        check_accelerate_yaml(tmp_path / "nowhere.yaml")
