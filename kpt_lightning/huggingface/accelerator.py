"""KptAccelerator: an Accelerator whose ``prepare`` converts the models first."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from kpt_lightning.config import KptConfig
from kpt_lightning.huggingface.checkpoint import atomic_save_state, checked_load_state
from kpt_lightning.huggingface.session import Session


class KptAccelerator(Accelerator):  # type: ignore[misc]
    """Accelerate's, with a session of ours and whole checkpoints.

    Attributes:
        kpt: Its plans, and ``stop`` to undo them.
    """

    def __init__(self, *args: Any, kpt: KptConfig | dict[str, Any] | str | Path | None = None, **kwargs: Any) -> None:
        """Check the settings.

        Args:
            args: Of Accelerator.
            kpt: Settings, or the path of a YAML file.
            kwargs: Of Accelerator.

        Raises:
            ConfigError: A setting is wrong, or contradicts Accelerate's.
        """
        session = Session(kpt)
        super().__init__(*args, **kwargs)
        session.check(self.state)
        self.kpt = session

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Accelerate's, after the models were converted. Raises as ``Session.convert``."""
        self.kpt.convert(self.state, args, place=self.device_placement)
        return super().prepare(*args, device_placement=device_placement)

    def prepare_model(self, model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        """Accelerate's; a model that is only evaluated is left alone."""
        if not evaluation_mode:
            self.kpt.convert(self.state, [model], place=self.device_placement)
        return super().prepare_model(model, device_placement, evaluation_mode)

    def save_state(self, output_dir: str | None = None, safe_serialization: bool = True, **kwargs: Any) -> Any:
        """Accelerate's; the folder appears, or is replaced, as a whole, and tells the plans in ``kpt_state.json``."""
        return atomic_save_state(
            self, super().save_state, output_dir, session=self.kpt, safe_serialization=safe_serialization, **kwargs
        )

    def load_state(self, input_dir: str | None = None, load_kwargs: Any = None, **kwargs: Any) -> Any:
        """Accelerate's; warns where model, plan or versions are not those of the save."""
        return checked_load_state(
            self, super().load_state, input_dir, session=self.kpt, load_kwargs=load_kwargs, **kwargs
        )
