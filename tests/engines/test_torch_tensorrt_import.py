"""A Torch-TensorRT that does not import says what it is, what is beside it, and what to install."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
from calibcast.calib import BuildError
from calibcast.engines.tensorrt.builder import torch_tensorrt_adapter as adapter


@pytest.mark.parametrize(("version", "remedy"), [("2.11.0", "pip install 'tensorrt-rtx==1.4.0.76'"), ("2.14.0", "")])
def test_a_tensorrt_that_is_too_new_is_named(monkeypatch, version, remedy):
    def fails(name):
        raise AttributeError("module 'tensorrt_rtx' has no attribute 'IAlgorithmSelector'")

    versions = {"torch-tensorrt-rtx": version, "tensorrt-rtx": "1.7.1"}
    monkeypatch.setattr(adapter, "metadata", SimpleNamespace(
        version=lambda name: versions.get(name) or _missing(name), PackageNotFoundError=LookupError,
        packages_distributions=dict))  # fmt: skip
    monkeypatch.setattr(adapter, "_pass_over_missing_plugins", lambda: None)
    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.raises(BuildError) as caught:
        adapter.load_package.__wrapped__()
    said = str(caught.value)
    assert said.startswith(
        f"torch-tensorrt-rtx {version} is installed but does not import with tensorrt-rtx 1.7.1: Attr"
    )
    assert said.endswith("IAlgorithmSelector'") if not remedy else remedy in said


def _missing(name):
    raise LookupError(name)


def test_torch_tensorrt_is_told_its_distribution_and_others_are_told_all():
    """It would look for every file of every distribution, which takes seconds."""
    asks = "from importlib import metadata\nfound = metadata.packages_distributions()"
    for name, told in ((adapter._ASKS, {"torch_tensorrt": ["torch-tensorrt-rtx"]}), ("transformers.utils", None)):
        module = {"__name__": name}
        with adapter._told_its_distribution("torch-tensorrt-rtx"):
            exec(asks, module)
        assert module["found"] == (told or metadata.packages_distributions())
    assert "pytest" in metadata.packages_distributions()


@pytest.mark.parametrize(("bindings", "plugins"), [(True, False), (True, True), (False, False)])
def test_plugins_without_their_binding_count_as_missing(monkeypatch, bindings, plugins):
    """Torch-TensorRT 2.11 looks for the modules in `tensorrt.plugin`, which then fails to import."""
    marked = bindings and not plugins
    there = {"tensorrt_rtx_bindings": bindings, "tensorrt_rtx_bindings.plugin": plugins}
    monkeypatch.setattr(adapter, "_found", there.__getitem__)
    monkeypatch.delitem(sys.modules, "tensorrt.plugin", raising=False)
    try:
        adapter._pass_over_missing_plugins()
        assert ("tensorrt.plugin" in sys.modules) == marked
        if marked:
            assert importlib.util.find_spec("tensorrt.plugin") is None
    finally:
        sys.modules.pop("tensorrt.plugin", None)
