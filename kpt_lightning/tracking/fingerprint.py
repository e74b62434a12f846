"""Stable fingerprints of a model and of the environment that it ran in."""

import hashlib
import os
import platform
import socket
import subprocess
from pathlib import Path

import torch
from torch import nn

from kpt_lightning.optional import installed_version
from kpt_lightning.tracking.record import digest

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Name parts that torch.compile, FSDP and activation checkpointing add; none changes what is trained."""

CODE_KEY = "git_commit"
PACKAGES = ("kpt-lightning", "lightning", "transformers", "accelerate", "torchao", "triton", "transformer-engine")


def model_fingerprint(model: nn.Module) -> str:
    """Hash of every parameter's name, global shape, dtype and ``requires_grad``.

    Buffers and module classes stay out, so the fingerprint is the same before and after FP8 conversion or compilation
    in place, and with any wrapper of :data:`WRAPPERS`.
    """
    return digest(sorted(_parameter_facts(model)))


def _parameter_facts(model: nn.Module) -> list[tuple[str, tuple[int, ...], str, bool]]:
    facts = []
    for name, parameter in model.named_parameters():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        # a lazy parameter has no shape before its first forward pass
        shape = () if nn.parameter.is_lazy(parameter) else tuple(parameter.shape)
        facts.append((name, shape, str(parameter.dtype), parameter.requires_grad))
    return facts


def environment(extra: dict[str, str] | None = None, directory: Path | None = None) -> dict[str, str]:
    """Versions, operating system, hashed host name and git commit.

    Args:
        extra: More facts, such as the driver version; they win.
        directory: Where to look for a git repository, the current directory by default.
    """
    facts = {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "host": hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12],
    }
    if torch.version.cuda:
        facts["cuda"] = torch.version.cuda
    facts.update({name: version for name in PACKAGES if (version := installed_version(name))})
    if commit := git_commit(directory):
        facts[CODE_KEY] = commit
    return facts | (extra or {})


def git_commit(directory: Path | None = None) -> str | None:
    """The commit checked out in a directory, None outside a repository or without git."""
    command = ["git", "-C", str(directory or Path.cwd()), "rev-parse", "--verify", "HEAD"]
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, env=quiet, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
