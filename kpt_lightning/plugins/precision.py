"""KptPrecision: the engine as Lightning's precision plugin, for the Trainer and for Fabric.

As ``Trainer(plugins=[KptPrecision("fp8")])`` it works with any strategy of Lightning that calls ``convert_module``
before it wraps or shards, and compiles nothing. KptStrategy drives it with the whole plan.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.fabric.plugins.precision.utils import _convert_fp_tensor, _DtypeContextManager
from lightning.pytorch.plugins.precision import Precision
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from kpt_lightning.config import BF16_WEIGHTS, FP8_PRECISIONS, CompileConfig, KptConfig
from kpt_lightning.optimize.engine import Engine
from kpt_lightning.optimize.plan import Plan

__all__ = ["KptFabricPrecision", "KptPrecision"]


class _EnginePrecision:
    """What the Trainer's and Fabric's plugin share; Lightning's two base classes know nothing of each other."""

    engine: Engine
    settings: KptConfig
    device_type: str | None

    def __init__(
        self,
        precision: str = "auto",
        *,
        config: KptConfig | dict[str, Any] | str | Path | None = None,
        float8: dict[str, Any] | None = None,
        device_type: str | None = None,
    ) -> None:
        """Check the settings; no device is touched.

        Args:
            precision: auto, fp8, fp8-true, bf16, bf16-mixed or 32.
            config: Settings, or the path of a YAML file.
            float8: The float8 section alone.
            device_type: "cuda" or "cpu". None means the Trainer's, and with Fabric, which does not tell, CUDA where
                there is one.

        Raises:
            ConfigError: A setting is unknown, of the wrong type, or contradicts another one.
        """
        built = KptConfig.build(config, precision=None if precision == "auto" else precision, float8=float8)
        self.settings = built
        if "compile" not in built.model_fields_set:
            built = built.model_copy(update={"compile": CompileConfig(blocks=False, loss=False)})
        self.engine = Engine(built)
        self.device_type = device_type

    @classmethod
    def around(cls, engine: Engine, device_type: str) -> Any:
        """The plugin of a strategy that owns ``engine``."""
        plugin = cls.__new__(cls)
        plugin.engine, plugin.settings, plugin.device_type = engine, engine.config, device_type
        return plugin

    @property
    def precision(self) -> str:
        """The precision in use: the plan's once there is one, else what was asked for."""
        return self.plan.precision if self.plan is not None else self.engine.config.precision

    @property
    def plan(self) -> Plan | None:
        """None until a model was set up."""
        return self.engine.plan

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Plan for ``module`` and change it in place.

        Raises:
            UnsupportedHardwareError: FP8 was asked for, and the device or the model cannot run it.
            KptError: Another module is in the hands of this plugin.
        """
        self.engine.start(module, self._device_type(module))
        return module

    def _device_type(self, module: nn.Module) -> str:
        """Where ``module`` will run: Lightning moves it there after this plugin has seen it."""
        trainer = getattr(module, "_trainer", None)
        if self.device_type is not None:
            return self.device_type
        if trainer is not None:
            return str(trainer.strategy.root_device.type)
        return "cuda" if torch.cuda.is_available() else "cpu"

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """bf16 creates its weights in bf16; the others create them as they would be without us."""
        return _DtypeContextManager(torch.bfloat16) if self.precision in BF16_WEIGHTS else nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """As :meth:`tensor_init_context`."""
        return self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast where the plan says so; bf16 creates tensors in bf16, as Lightning's bf16-true does."""
        if self.precision not in BF16_WEIGHTS:
            return self.engine.autocast()
        stack = ExitStack()
        stack.enter_context(self.tensor_init_context())
        stack.enter_context(self.engine.autocast())
        return stack

    def convert_input(self, data: Any) -> Any:
        """bf16 casts floating-point inputs as Lightning's bf16-true does; integers stay."""
        if self.precision not in BF16_WEIGHTS:
            return data
        return apply_to_collection(data, function=_convert_fp_tensor, dtype=Tensor, dst_type=torch.bfloat16)

    def teardown(self) -> None:
        """Undo what was done to the module."""
        self.engine.stop()


class KptPrecision(_EnginePrecision, Precision):  # type: ignore[misc]
    """For ``lightning.pytorch.Trainer(plugins=[KptPrecision("fp8")])``."""

    @contextmanager
    def train_step_context(self) -> Iterator[None]:
        """Lightning's, and the proof starts here: a sanity validation that ran before counts for nothing."""
        self.engine.training_starts()
        with super().train_step_context():
            yield

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """One step of Lightning, the first ones checked against the plan."""
        run = super().optimizer_step
        return self.engine.step(
            lambda: run(optimizer, model=model, closure=closure, **kwargs), whole=model.automatic_optimization
        )


class KptFabricPrecision(_EnginePrecision, FabricPrecision):  # type: ignore[misc]
    """For ``lightning.fabric.Fabric(plugins=[KptFabricPrecision("fp8")])``."""

    def convert_output(self, data: Any) -> Any:
        """Outputs come back in the default dtype, as with Lightning's bf16-mixed and bf16-true."""
        if self.precision not in ("bf16-mixed", "bf16", *FP8_PRECISIONS):
            return data
        return apply_to_collection(data, function=_convert_fp_tensor, dtype=Tensor, dst_type=torch.get_default_dtype())

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """One step of Fabric, the first checked against the plan."""
        run = super().optimizer_step
        return self.engine.step(lambda: run(optimizer, **kwargs), whole=False)
