"""``prepare``: one call in a script of one's own, in the place of ``accelerator.prepare``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpt_lightning.config import KptConfig
from kpt_lightning.errors import ConfigError
from kpt_lightning.huggingface.session import Session

if TYPE_CHECKING:
    from accelerate import Accelerator

_SESSION = "kpt"


def prepare(
    accelerator: "Accelerator", *objects: Any, config: KptConfig | dict[str, Any] | str | Path | None = None
) -> Any:
    """``accelerator.prepare(*objects)`` with the models among them converted before. Nothing is patched.

    The session with its plans is afterwards ``accelerator.kpt``; ``accelerator.kpt.stop()`` undoes it.

    Args:
        accelerator: Any Accelerator.
        objects: Models, optimizers, loaders and schedulers, as ``Accelerator.prepare`` takes them.
        config: Settings, or the path of a YAML file; those of the first call hold for the later ones.

    Returns:
        What ``accelerator.prepare`` returns.

    Raises:
        ConfigError: A setting is wrong, contradicts Accelerate's, or a later call brings another config.
        UnsupportedHardwareError: What was asked for by name is not possible here.
    """
    session: Session | None = vars(accelerator).get(_SESSION)
    if session is None:
        session = Session(config)
        vars(accelerator)[_SESSION] = session
    elif config is not None and KptConfig.build(config) != session.config:
        raise ConfigError("config", config, "differs from that of the first call", "Give it to the first call alone")
    session.convert(accelerator.state, objects, place=accelerator.device_placement)
    return accelerator.prepare(*objects)
