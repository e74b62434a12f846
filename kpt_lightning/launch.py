"""Run an unmodified Accelerate or Hugging Face Trainer script with a kpt config.

``accelerate launch --config_file acc.yaml -m kpt_lightning.launch [--kpt-config kpt.yaml] train.py args...``

Accelerate stays the launcher. Each of its processes runs this module, which runs the script as ``__main__`` with the
arguments, folder, tracebacks and exit status that it would have without us.
"""

import argparse
import atexit
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from kpt_lightning.errors import ConfigError, KptError, VerificationError

if TYPE_CHECKING:
    from kpt_lightning.huggingface.session import Session

CONFIG_VARIABLE = "KPT_CONFIG"
"""Path of the config where ``--kpt-config`` is not given."""

WRONG_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script that the command line names.

    A TPU launcher imports this module and calls it, so everything is read from ``sys.argv``.

    Args:
        arguments: None takes those of the command line.
    """
    options = _parser().parse_args(arguments)
    try:
        session = _session(options)
        target = _target(options)
    except KptError as error:
        _refuse(error)
    with _as_script(options, target), _hidden_frames():
        _run(session, options, target)


def _run(session: "Session", options: argparse.Namespace, target: str) -> None:
    from kpt_lightning.huggingface.patches import patched
    from kpt_lightning.huggingface.tracked_run import break_off_runs

    process = os.getpid()
    try:
        with patched(session):
            if options.module:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            else:
                _run_file(target)
        if os.getpid() == process:
            session.conclude()
    except BaseException as error:
        break_off_runs(error)
        raise
    finally:
        session.stop()


def _run_file(target: str) -> None:
    """As ``python train.py``; runpy would make ``sys.argv[0]`` or ``__file__`` another."""
    file = Path(target).absolute()
    module, ours = ModuleType("__main__"), sys.modules["__main__"]
    module.__file__, module.__loader__ = str(file), SourceFileLoader("__main__", str(file))
    sys.modules["__main__"] = module
    try:
        exec(compile(file.read_bytes(), file, "exec"), vars(module))
    finally:
        sys.modules["__main__"] = ours


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kpt_lightning.launch", description=__doc__.partition("\n")[0])
    parser.add_argument("--kpt-config", metavar="FILE", help=f"settings; default: ${CONFIG_VARIABLE}, else defaults")
    parser.add_argument("--kpt-plan", metavar="FILE", help="a plan made before, followed instead of rules")
    parser.add_argument("-m", "--module", action="store_true", help="the script is the name of a module")
    parser.add_argument("script", help="a Python file, or a module with -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    return parser


def _session(options: argparse.Namespace) -> "Session":
    from kpt_lightning.huggingface.session import Session

    return Session(options.kpt_config or os.environ.get(CONFIG_VARIABLE) or None, plan=options.kpt_plan)


def _target(options: argparse.Namespace) -> str:
    """What is run. Raises ConfigError where there is no such file."""
    script: str = options.script
    if not options.module and not Path(script).exists():
        raise ConfigError("script", script, "is no file", "Check the path, or name a module with -m")
    return script


def _refuse(error: KptError) -> NoReturn:
    """One line from the first process, the exit status of wrong usage from all."""
    if os.environ.get("RANK", "0") == "0":
        print(f"kpt: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    raise SystemExit(WRONG_USAGE)


@contextmanager
def _as_script(options: argparse.Namespace, target: str) -> Iterator[None]:
    """``sys.argv`` and ``sys.path`` as ``python train.py`` would have them."""
    arguments, path = sys.argv, list(sys.path)
    sys.argv = [target, *options.arguments]
    if not options.module:
        # Python puts the folder of the script there; now it is that of this process.
        sys.path[0] = str(Path(target).resolve().parent)
    try:
        yield
    finally:
        sys.argv = arguments
        sys.path[:] = path


@contextmanager
def _hidden_frames() -> Iterator[None]:
    """A traceback that nobody catches begins with the script."""
    usual = sys.excepthook
    interrupted: list[bool] = []
    # Registered first, so it comes after all that the script registers.
    atexit.register(_end_by_signal, interrupted)
    if usual is not sys.__excepthook__:
        yield
        return

    def shown(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
        if isinstance(error, VerificationError):
            print(f"kpt: {error}", file=sys.stderr)
            return
        if issubclass(kind, KeyboardInterrupt):
            interrupted.append(True)
        traceback.print_exception(kind, error, _without_ours(trace))

    sys.excepthook = shown
    yield
    # An exception leaves this block by itself, and the hook is needed when it has left everything.
    sys.excepthook = usual


def _end_by_signal(interrupted: list[bool]) -> None:
    """Ctrl-C ends a script by the signal itself, which ``python -m`` turns into status 1."""
    if interrupted:
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    ours = (__file__, runpy.__file__, "<frozen runpy>")
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    return trace


if __name__ == "__main__":
    main()
