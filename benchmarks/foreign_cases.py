"""Scripts of Accelerate, transformers and TRL that foreign_scripts.py runs, and their arguments."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One script.

    Attributes:
        checkout: accelerate, transformers or trl.
        script: Path in it.
        arguments: Of the script; ``{data}`` is the folder of data, ``{out}`` an empty one.
        needs: Modules that must be installed.
        cannot: Why it cannot run on any machine without the hub.
    """

    checkout: str
    script: str
    arguments: str = ""
    needs: tuple[str, ...] = ()
    cannot: str = ""

    @property
    def name(self) -> str:
        """As the log shows it."""
        return f"{self.checkout}/{self.script}"


_TRAINER = (
    "--do_train --do_eval --output_dir {out} --report_to none --logging_steps 5 --save_steps 20 --seed 1 "
    "--data_seed 1 --per_device_train_batch_size 8 --dataloader_pin_memory False"
)
_LOOP = "--output_dir {out} --seed 1 --per_device_train_batch_size 8"
_TEXT = "--train_file {data}/train.txt --validation_file {data}/validation.txt"
_DECODER = "--model_name_or_path {data}/small-llama --learning_rate 3e-3 --block_size 64"
_ENCODER = "--model_name_or_path {data}/bert-base-cased"
_LANGUAGE, _TEXTS = "examples/pytorch/language-modeling", "examples/pytorch/text-classification"
_IMAGES = "examples/pytorch/image-classification"

CASES = (
    Case("accelerate", "examples/nlp_example.py"),
    Case("accelerate", "examples/complete_nlp_example.py", "--checkpointing_steps epoch --output_dir {out}"),
    Case("accelerate", "examples/by_feature/gradient_accumulation.py", "--gradient_accumulation_steps 2"),
    Case("accelerate", "examples/by_feature/automatic_gradient_accumulation.py"),
    Case("accelerate", "examples/by_feature/checkpointing.py", "--checkpointing_steps 40 --output_dir {out}"),
    Case("accelerate", "examples/by_feature/memory.py"),
    Case("accelerate", "examples/by_feature/multi_process_metrics.py"),
    Case("accelerate", "examples/by_feature/early_stopping.py"),
    Case("accelerate", "examples/cv_example.py", "--data_dir {data}/images", ("timm", "torchvision")),
    Case(
        "transformers", f"{_TEXTS}/run_glue.py",
        f"{_ENCODER} --task_name mrpc --max_seq_length 64 --learning_rate 1e-4 --max_steps 60 {_TRAINER}",
    ),
    Case(
        "transformers", f"{_TEXTS}/run_glue_no_trainer.py",
        f"{_ENCODER} --task_name mrpc --max_length 64 --learning_rate 1e-4 --max_train_steps 60 "
        f"--checkpointing_steps 40 {_LOOP}",
    ),
    Case("transformers", f"{_LANGUAGE}/run_clm.py", f"{_DECODER} {_TEXT} --max_steps 40 {_TRAINER}"),
    Case(
        "transformers", f"{_LANGUAGE}/run_clm_no_trainer.py",
        f"{_DECODER} {_TEXT} --max_train_steps 40 --checkpointing_steps 20 {_LOOP}",
    ),
    Case(
        "transformers", f"{_LANGUAGE}/run_mlm.py",
        f"{_ENCODER} {_TEXT} --max_seq_length 64 --learning_rate 1e-3 --max_steps 40 {_TRAINER}",
    ),
    Case(
        "transformers", f"{_IMAGES}/run_image_classification.py", f"--train_dir {{data}}/images {_TRAINER}",
        ("torchvision",),
    ),
    Case(
        "trl", "trl/scripts/sft.py",
        "--model_name_or_path {data}/small-llama --dataset_name {data}/texts --learning_rate 3e-3 --max_length 64 "
        "--bf16 False --gradient_checkpointing False --max_steps 40 --eval_strategy no --output_dir {out} "
        "--report_to none --logging_steps 5 --save_steps 20 --per_device_train_batch_size 8 "
        "--dataloader_pin_memory False",
    ),
)  # fmt: skip
