"""KptTrainerCallback: the Hugging Face Trainer, without the launcher."""

from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kpt_lightning.config import KptConfig
from kpt_lightning.errors import ConfigError
from kpt_lightning.huggingface.session import Session
from kpt_lightning.optimize.plan import Plan


class KptTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """``Trainer(model, args, callbacks=[KptTrainerCallback()])``: the model is converted when the Trainer is made.

    Beside ``python -m kpt_lightning.launch`` it does nothing: the launcher has converted the model already, or will.

    Attributes:
        session: The plans, and ``stop`` to undo them.
    """

    def __init__(self, config: KptConfig | dict[str, Any] | str | Path | None = None) -> None:
        """Check the settings; nothing is touched.

        Args:
            config: Settings, or the path of a YAML file.

        Raises:
            ConfigError: A setting is unknown, of the wrong type, or contradicts another one.
        """
        self.session = Session(config)

    @property
    def plan(self) -> Plan | None:
        """Of the model, None before the Trainer was made."""
        return self.session.plans[-1] if self.session.plans else None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Convert the model, before the Trainer gives it to Accelerate. Raises as ``Session.convert``."""
        self.session.convert(AcceleratorState(), [kwargs["model"]])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a model that was made later, by ``model_init``.

        Raises:
            ConfigError: The model in training is another one than the Trainer began with.
        """
        if not self.session.knows(kwargs["model"]):
            raise ConfigError(
                "model_init", type(kwargs["model"]).__name__, "makes a model after KptTrainerCallback saw the first",
                "Pass model=, or start the script with python -m kpt_lightning.launch",
            )  # fmt: skip
