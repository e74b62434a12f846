"""Modules with kernels are imported at their first launch, looked up once, and missed with the pip line."""

from collections.abc import Iterator

import pytest

from kpt_lightning.errors import MissingDependencyError
from kpt_lightning.kernels import triton_module as loading
from kpt_lightning.optional import OptionalPackage


@pytest.fixture
def forgotten() -> Iterator[None]:
    loading.triton_module.cache_clear()
    yield
    loading.triton_module.cache_clear()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("name", ["quantize", "gated", "rms_norm", "cross_entropy"])
def test_the_kernels_of_each_module_are_found_and_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    found = loading.triton_module(name)
    assert found.__name__ == f"kpt_lightning.kernels.{name}_triton"
    # Not asked for again.
    monkeypatch.setattr(loading, "TRITON", None)
    assert loading.triton_module(name) is found


@pytest.mark.usefixtures("forgotten")
def test_without_triton_the_pip_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = OptionalPackage("no_such_module", "no-such-module", "gpu", "kernels")
    monkeypatch.setattr(loading, "TRITON", absent)
    with pytest.raises(MissingDependencyError, match=r"kpt-lightning\[gpu\]"):
        loading.triton_module("quantize")
