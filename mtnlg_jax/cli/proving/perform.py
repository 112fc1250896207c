"""What the command that writes certificates does once its flags are parsed."""

import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING

from mtnlg_jax import command, storage
from mtnlg_jax.cli.proving import options

if TYPE_CHECKING:
    from mtnlg_jax.config import Config

# More than this would simulate nothing that fewer do not show.
MOST_DEVICES = 64
# Programs run for milliseconds here, and compile for seconds.
_QUICK_COMPILER = "--xla_backend_optimization_level=0"


def check_flags() -> None:
    """Raise ValueError or OSError where the flags cannot be used, before anything is computed."""
    devices = options.DEVICES.value
    if not 1 <= devices <= MOST_DEVICES:
        raise ValueError(
            f"--devices={devices} is outside 1 to {MOST_DEVICES}: this machine simulates them; 8 "
            "show three axes together"
        )
    workdir = options.WORKDIR.value
    if options.CONFIG.value is None and workdir is None:
        raise ValueError(
            "--config is missing; name a file, as --config=configs/tiny.py, or a run, as "
            "--workdir=RUN"
        )
    if workdir is not None and options.CONFIG.value is not None:
        raise ValueError(
            f"--config={options.CONFIG.value} and --workdir={workdir} both name the config; give "
            "--config with --output=FILE, or --workdir alone for the config of that run"
        )
    if workdir is not None and options.SET.value and options.OUTPUT.value is None:
        raise ValueError(
            f"--set={options.SET.value[0]} is not the config of --workdir={workdir}, whose "
            "certificate.json is that of its own config; name another file with --output=FILE"
        )
    if workdir is not None and not storage.exists(workdir, "config.json"):
        raise FileNotFoundError(
            f"--workdir={workdir} is not a run: {storage.lacking(workdir, 'config.json')}; give "
            "the folder of a launch/pretrain.py run, or --output=FILE"
        )
    command.check_output(options.OUTPUT)


def given_config() -> "Config":
    """Return the config of --config, or of the run --workdir, with --set. Raises ValueError where
    it has no small copy on --devices."""
    from mtnlg_jax.certify.shrink import small_copy
    from mtnlg_jax.config import from_json, load_config, override, validate

    if options.CONFIG.value is not None:
        config = load_config(options.CONFIG.value, options.SET.value)
    else:
        content = storage.read_file(options.WORKDIR.value, "config.json")
        assert content is not None, "check_flags has looked"
        config = override(from_json(content.decode()), *options.SET.value)
        # As `load_config` pads it.
        model = config.model.padded(config.mesh.tensor)
        config = dataclasses.replace(config, model=model)
        validate(config)
    small_copy(config, options.DEVICES.value)
    return config


def simulate_devices() -> None:
    """Make this process one of --devices simulated CPU devices. Call it before JAX is used."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _QUICK_COMPILER.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_QUICK_COMPILER}".strip()
    from mtnlg_jax import compat
    from mtnlg_jax.train import processes

    processes.start(None, None, None, 100, options.DEVICES.value, "off")
    compat.serialize_cpu_collectives()
    compat.configure_cache(0.3)


def perform(config: "Config") -> int:
    """Compute, print and write the certificate. Return 0 where all is within its tolerance."""
    from mtnlg_jax.certify import report
    from mtnlg_jax.certify.certificate import certify

    def say(text: str) -> None:
        if options.PROGRESS.value:
            print(f"... {text}", file=sys.stderr, flush=True)

    certificate = certify(config, options.DEVICES.value, say)
    print(report.render(certificate), flush=True)
    content = json.dumps(report.to_json(certificate), indent=1, allow_nan=False).encode()
    path = options.OUTPUT.value
    if path is None and options.WORKDIR.value is not None:
        path = storage.join(options.WORKDIR.value, report.FILE)
    if path is not None:
        folder, _, name = path.rpartition("/")
        storage.write_file(folder or ".", name, content)
        print(f"wrote {path}")
    return 0 if certificate.within else 1
