"""What the leaves share: settings, the engine, and the check that nothing the user set is ignored."""

from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from kpt_lightning.config import KptConfig
from kpt_lightning.errors import ConfigError
from kpt_lightning.optimize.engine import Engine
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.plugins.precision import KptFabricPrecision, KptPrecision
from kpt_lightning.strategies.conflicts import check_devices, check_ignored, check_precision
from kpt_lightning.strategies.connector import Request, calling_request

ConfigSource = KptConfig | dict[str, Any] | str | Path | None

# Lightning's spelling of precision -> ours. What is not here stays Lightning's own plugin.
_GIVEN = {"bf16-mixed": "bf16-mixed", "bf16": "bf16", "bf16-true": "bf16", "32": "32", "32-true": "32", 32: "32"}


class KptLeaf:
    """Mixin of every concrete strategy; stands before Lightning's own class.

    Attributes:
        engine: Plans, applies, proves and undoes.
    """

    engine: Engine
    _parallel: str
    _why_parallel: str = "the strategy's own"
    _given_precision: str | None = None
    _config: KptConfig

    def __init__(
        self, config: ConfigSource = None, *, level: str | None = None, precision: str | None = None, **lightning: Any
    ) -> None:
        """Check the settings; no device is touched.

        Args:
            config: Settings, or the path of a YAML file.
            level: conservative, balanced or aggressive.
            precision: auto, fp8, fp8-true, bf16, bf16-mixed or 32.
            lightning: Arguments of Lightning's own strategy.

        Raises:
            ConfigError: A setting is unknown, of the wrong type, or contradicts another one.
        """
        super().__init__(**lightning)
        built = KptConfig.build(config, level=level, precision=None if precision == "auto" else precision)
        if "parallel" in built.model_fields_set and built.parallel not in ("auto", self._parallel):
            raise ConfigError(
                "parallel", built.parallel, f"contradicts {type(self).__name__}, which is {self._parallel!r}",
                "Remove it, or use KptStrategy",
            )  # fmt: skip
        self._config = built
        self.engine = Engine(built)

    @property
    def plan(self) -> Plan | None:
        """What was decided, and proved so far; None until a model was set up."""
        return self.engine.plan

    def bind(self, request: Request) -> None:
        """Take what the connector knows, anew for each Trainer or Fabric that this object is given to.

        Raises:
            ConfigError: Two settings contradict each other.
            UnsupportedHardwareError: FP8 was asked for and there is no unit for it.
        """
        check_devices(request, getattr(self, "parallel_devices", None), type(self).__name__)
        self.engine.parallel = self._parallel
        if self.engine.config.parallel != self._parallel:
            self.engine.why_parallel = self._why_parallel
        plugin = self._precision_plugin_for(request)
        if request.is_fabric:
            self.precision = plugin
        else:
            self.precision_plugin = plugin

    def teardown(self) -> None:
        """Lightning's teardown, then everything that was done to the module is undone, whatever happened."""
        try:
            super().teardown()  # type: ignore[misc]
        finally:
            self.engine.stop()

    def _configure_launcher(self) -> None:
        self.bind(calling_request())
        super()._configure_launcher()  # type: ignore[misc]

    def _precision_plugin_for(self, request: Request) -> Any:
        """The plugin that drives the engine, or the user's own.

        Raises:
            ConfigError: ``precision=`` or a plugin beside the strategy's own precision.
        """
        config = self.engine.config = self._config
        self._given_precision = None
        ours = KptFabricPrecision if request.is_fabric else KptPrecision
        device_type = self.root_device.type  # type: ignore[attr-defined]
        plugin = ours.around(self.engine, device_type)
        mine = isinstance(request.plugin, ours) and request.plugin.engine is self.engine
        if request.plugin_given and not mine:
            check_precision(config, request, "plugins", type(request.plugin).__name__)
            if isinstance(request.plugin, ours):
                plugin = request.plugin
                self._adopt(request, plugin.settings)
                plugin.engine, plugin.device_type = self.engine, device_type
            else:
                check_ignored(config, request, "plugins", type(request.plugin).__name__)
                self._given_precision = str(request.plugin.precision)
                return request.plugin
        elif request.precision is not None:
            check_precision(config, request, "precision", request.precision)
            if request.precision not in _GIVEN:
                check_ignored(config, request, "precision", request.precision)
                self._given_precision = str(request.precision)
                return request.plugin
            self.engine.config = KptConfig.build(config, precision=_GIVEN[request.precision])
        self.engine.check(device_type)
        return plugin

    def _adopt(self, request: Request, settings: KptConfig) -> None:
        """A KptPrecision beside KptStrategy: the settings of both.

        Raises:
            ConfigError: Both set one field, or the two together contradict each other.
        """
        given = settings.model_dump(exclude_unset=True)
        own = self.engine.config.model_dump(exclude_unset=True)
        for field in given.keys() & own.keys():
            rule = f"contradicts KptStrategy({field}={own[field]!r}), which would make it ignored"
            raise ConfigError(f"{type(request.plugin).__name__}({field})", given[field], rule, "Remove one of the two")
        self.engine.config = KptConfig.build(own | given)

    def _start_engine(self, module: Any) -> None:
        """With the trainer's own precision plugin the engine still compiles and reports."""
        if self._given_precision is not None:
            self.engine.start(module, self.root_device.type, self._given_precision)  # type: ignore[attr-defined]

    def _report(self) -> None:
        if self.plan is not None:
            rank_zero_info(f"kpt: {self.plan.summary()}")
