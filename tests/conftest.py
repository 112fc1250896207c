"""Set up eight virtual CPU devices, and skip tests that are slow or need hardware."""

import contextlib
import gc
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

# Set before the first import of JAX, which reads both once. To test on an accelerator, set
# JAX_PLATFORMS=cuda.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
# Small programs take longer to optimize than to run.
for _flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if _flag.split("=")[0] not in _flags:
        _flags = f"{_flags} {_flag}".strip()
os.environ["XLA_FLAGS"] = _flags
# Half of the suite's time is compilation: programs that took longer than this are cached.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax  # noqa: E402

from mtnlg_jax import compat  # noqa: E402

# For later tests, the processes that they start, and later runs. JAX_COMPILATION_CACHE_DIR=""
# disables it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(compat.cache_folder(), "tests"))
compat.configure_cache()
# Several programs in flight on more CPU devices than cores can deadlock in their collectives.
jax.config.update("jax_cpu_enable_async_dispatch", False)
# Arrays of different ranks must be aligned in plain sight, as in x_BSD * scale_D[None, None, :].
jax.config.update("jax_numpy_rank_promotion", "raise")


_tests = itertools.count(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --slow to run it"))
        if item.get_closest_marker("hardware") and os.environ["JAX_PLATFORMS"] == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs an accelerator: JAX_PLATFORMS is cpu"))


def _drop_programs(most: int) -> None:
    """Drop compiled programs if this process has more than ``most`` mappings of memory.

    Each has three, and Linux allows 65,530 (vm.max_map_count). XLA aborts at the limit.
    """
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > most:
        gc.collect()
        jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def bounded_mappings():
    yield
    _drop_programs(30_000)


@pytest.fixture(autouse=True)
def bounded_mappings_within_a_file():
    yield
    # Later than between files, whose engines may go on. Reading the mappings takes milliseconds,
    # and a test adds some thousands at most.
    if next(_tests) % 4 == 0:
        _drop_programs(45_000)


@pytest.fixture
def heeded_signals():
    """Heed the signals that nohup, or a script that runs in the background, makes pytest ignore.

    Processes inherit that they are ignored.
    """
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [each for each in defaults if signal.getsignal(each) is signal.SIG_IGN]
    for each in ignored:
        signal.signal(each, defaults[each])
    yield
    for each in ignored:
        signal.signal(each, signal.SIG_IGN)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real corpora and published weights next to the checkout, or skip the
    test."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the data of {folder.name}/ beside the checkout")
    return folder


@pytest.fixture(scope="module")
def answering():
    """Return a factory of functions that run a script with a random model as --workdir=RUN.

    The factory takes (script of launch/, folder of a tokenizer, positions, new tokens); its
    functions take (*arguments, stdin bytes) and return (exit code, standard output, standard
    error).
    """
    with contextlib.ExitStack() as stack:

        def start(script, tokenizer, positions, new_tokens):
            root = Path(__file__).resolve().parents[1]
            process = stack.enter_context(
                subprocess.Popen(
                    [
                        sys.executable,
                        root / "tests/answer.py",
                        root / "launch" / script,
                        tokenizer,
                        str(positions),
                        str(new_tokens),
                    ],
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )

            def answer(*arguments, stdin=b""):
                request = {"arguments": arguments, "stdin": stdin.decode("latin-1")}
                print(json.dumps(request), file=process.stdin, flush=True)
                line = next(line for line in process.stdout if line.startswith("answer "))
                return json.loads(line.removeprefix("answer "))

            return answer

        yield start


class _Tpu:
    """A device as JAX describes it."""

    platform = "tpu"
    core_on_chip = 0
    process_index = 0

    def __init__(self, kind: str, coords: tuple[int, ...]):
        self.device_kind = kind
        self.coords = coords


@pytest.fixture(scope="session")
def described_tpus():
    """Return the devices of a slice from their kind and its three dims, x fastest."""

    def describe(kind: str, dims: tuple[int, ...]) -> list[_Tpu]:
        places = itertools.product(*map(range, dims[::-1]))
        return [_Tpu(kind, place[::-1]) for place in places]

    return describe


@pytest.fixture
def proving():
    """Return `cli.proving.perform`, with its flags in place of those of the commands that were
    imported before: they have some of the same names."""
    prefix = "mtnlg_jax.cli."
    kept = [
        (module, flag)
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith(prefix)
        for flag in defined
        if flag.name in flags.FLAGS
    ]
    for _, flag in kept:
        delattr(flags.FLAGS, flag.name)
    yield importlib.import_module(prefix + "proving.perform")
    for name in [name for name in sys.modules if name.startswith(prefix + "proving")]:
        for flag in flags.FLAGS.get_flags_for_module(name):
            delattr(flags.FLAGS, flag.name)
        del sys.modules[name]
    for module, flag in kept:
        flags.FLAGS[flag.name] = flag
        flags.FLAGS.register_flag_by_module(module, flag)
