"""What every test stands on: eight virtual CPU devices, and skipping what is slow or wants hardware."""

import os
from pathlib import Path

import pytest

# Before the first import of JAX, which reads both once. To test on an accelerator: JAX_PLATFORMS=cuda.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
# Small programs take longer to optimise than to run.
for _flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if _flag.split("=")[0] not in _flags:
        _flags = f"{_flags} {_flag}".strip()
os.environ["XLA_FLAGS"] = _flags


import jax  # noqa: E402

# Several programs in flight on more CPU devices than cores can wait for each other inside their collectives.
jax.config.update("jax_cpu_enable_async_dispatch", False)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --slow to run it"))
        if item.get_closest_marker("hardware") and os.environ["JAX_PLATFORMS"] == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs an accelerator: JAX_PLATFORMS is cpu"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real corpora and published weights beside the checkout; without it a test skips."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the data of {folder.name}/ beside the checkout")
    return folder
