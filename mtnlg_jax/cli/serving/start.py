"""Load the models of launch/serve.py and serve them."""

import contextlib
import dataclasses
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mtnlg_jax.cli.decoding import devices, fitting, held_flags
from mtnlg_jax.cli.serving import options
from mtnlg_jax.command import expand

if TYPE_CHECKING:
    from mtnlg_jax.config import Config
    from mtnlg_jax.decode.cache import Decoder
    from mtnlg_jax.serve.engine import Engine
    from mtnlg_jax.serve.keys import Keys
    from mtnlg_jax.serve.mirror import Leader, Mirror
    from mtnlg_jax.serve.models import Model
    from mtnlg_jax.train.checkpoint import Run


@dataclasses.dataclass
class _Loaded:
    """A model before it has an engine."""

    name: str
    adapter: str | None
    run: "Run"
    decoder: "Decoder"


def serve() -> int:
    """Check everything that costs nothing, then load, then serve until a signal.

    Return the exit code.
    """
    for entry in options.SET.value:
        if not devices.of_mesh(entry):
            raise ValueError(
                f"--set={entry}: a server has no settings of decoding, since each request brings "
                "its own; give only mesh.KEY=VALUE"
            )
    with devices.started(options.SET.value):
        return _serve()


def _serve() -> int:
    from mtnlg_jax.decode.slots import check_mesh
    from mtnlg_jax.interop import registry

    registry.register()
    adapters = _adapters()
    template = _template()
    try:
        from mtnlg_jax.serve import listening
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the server needs the package {error.name}; install mtnlg_jax[serve]"
        ) from None
    from mtnlg_jax.serve.keys import load_keys

    check_mesh(devices.mesh())
    with contextlib.ExitStack() as stack:
        held: dict[str, Any] = {}

        def listen() -> None:
            keys = load_keys(options.API_KEYS.value)
            held["keys"] = keys
            held["bound"] = listening.bind(options.HOST.value, options.PORT.value, keys)

        if not options.SELFTEST.value:
            devices.on_first(listen)
        if "bound" in held:
            stack.enter_context(held["bound"])
        loaded = [_load(name, folder) for name, folder in adapters.items()]
        models = [_model(each, template) for each in loaded]
        leader = _join(models)
        if not devices.on_first_process():
            return 0
        if leader is not None:
            stack.callback(leader.end)
        for number, (model, each) in enumerate(zip(models, loaded, strict=True)):
            model.engine = _engine(each, None if leader is None else leader.mirror(number))
        if options.SELFTEST.value:
            return _selftest(models)
        try:
            _listen(models, **held)
        except RuntimeError:
            if leader is None or leader.whole:
                raise
            _end_lost("another process")
    return 0


def _join(models: Sequence["Model"]) -> "Leader | None":
    """Connect the processes of a mesh. Return the leader in process 0, None if it is alone.

    The others repeat its calls until it ends.
    """
    from mtnlg_jax.serve import mirror
    from mtnlg_jax.train import processes

    mesh = devices.mesh()
    if mesh is None or not mesh.is_multi_process:
        return None
    named: dict[str, Any] = {}
    for number, model in enumerate(models):
        named |= {f"model {number}": model, f"tokenizer {number}": model.tokenizer}
    peer = mirror.connect(devices.on_first)
    if processes.is_first():
        peer.named = named
        return peer
    for name in (signal.SIGTERM, signal.SIGINT):
        # Process 0 drains first and says when to end.
        signal.signal(name, signal.SIG_IGN)
    try:
        mirror.follow(peer, [model.decoder for model in models], named)
    except (EOFError, OSError):
        _end_lost("process 0")
    return None


def _end_lost(which: str) -> None:
    """End this process, since the programs of a mesh need all of them."""
    from mtnlg_jax import errors
    from mtnlg_jax.train import processes

    print(f"error: {which} ended, so this one ends; start all of them again", file=sys.stderr)
    processes.exit_now(errors.PROCESS_LOST)


def _listen(models: Sequence["Model"], keys: "Keys", bound: socket.socket) -> None:
    """Serve until a signal."""
    from mtnlg_jax.serve import listening
    from mtnlg_jax.serve.http import Api, Limits
    from mtnlg_jax.serve.models import Models

    limits = Limits(options.BODY_BYTES.value, options.REQUEST_SECONDS.value)
    for model in models:
        # It warms in a thread; /health answers meanwhile, and /ready says when it is over.
        model.engine.start()
    address, port = bound.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    names = ", ".join(model.name for model in models)
    print(f"serving {names} at http://{shown}:{port}/", flush=True)
    _note_cpu()
    api = Api(Models(models), keys, limits)
    listening.Server(api, options.DRAIN_SECONDS.value).run_until_signal(bound)


def _note_cpu() -> None:
    """Tell that several rows in float32 are slow on a CPU, which packs the weights each step."""
    from mtnlg_jax import compat

    floats = held_flags.DTYPE.value == "float32" and held_flags.WEIGHTS.value is None
    if floats and options.SLOTS.value > 1 and compat.platform() == "cpu":
        devices.note(
            "note: on a CPU several rows in float32 take up to twice as long as with "
            "--weights=int8 or --dtype=bfloat16; docs/serving.md has the figures"
        )


def _selftest(models: Sequence["Model"]) -> int:
    """Print what the self-test of each model found. Return 1 if one of them failed, else 0."""
    from mtnlg_jax.serve.engine import Engine
    from mtnlg_jax.serve.selftest import selftest

    failed = False
    for model in models:
        engine = cast(Engine, model.engine)
        engine.start()
        report = selftest(engine)
        engine.close()
        failed |= not report.passed
        print(
            f"{model.name}: the self-test {'passed' if report.passed else 'failed'}. Together as "
            f"alone: {report.equal} of {report.requests} requests; parted where two tokens are "
            f"equally probable: {report.near_ties}; different: {len(report.different)}. "
            f"Log-probabilities differ by at most {report.largest_difference:.1e}. Programs "
            f"compiled meanwhile: {report.compiles}.",
            flush=True,
        )
    return int(failed)


def _adapters() -> dict[str, str | None]:
    """Return the folder of the adapter of each name; None for the model itself, which is first."""
    path = options.WORKDIR.value
    own = options.NAME.value or Path(os.path.abspath(path)).name
    found: dict[str, str | None] = {own: None}
    for given in options.LORA.value:
        name, _, folder = given.partition("=")
        if not name or not folder:
            raise ValueError(f"--lora={given} is not of the form NAME=FOLDER")
        if name in found:
            raise ValueError(f"--lora={given} repeats the name {name}; give each its own")
        folder = expand(folder)
        ours = folder.endswith(".safetensors")
        if not ours and not Path(folder, "adapter_config.json").is_file():
            raise ValueError(
                f"--lora={given}: {folder} holds no adapter_config.json; name the folder that PEFT "
                "has saved, or a file of launch/adapt.py"
            )
        found[name] = folder
    return found


def _template() -> str | None:
    """Return the text of --chat_template. Raise ValueError if it is not a template."""
    from mtnlg_jax.data.tokenizer.template import ChatTemplate, decode_template

    path = options.CHAT_TEMPLATE.value
    if path is None:
        return None
    text = decode_template(Path(path).read_bytes(), path)
    ChatTemplate(text, {})
    return text


def _load(name: str, adapter: str | None) -> _Loaded:
    """Load a model, with an adapter merged into it if one is given."""
    from mtnlg_jax import compat
    from mtnlg_jax.decode.load import load_decoder
    from mtnlg_jax.interop import registry

    compat.quiet()
    compat.configure_cache(least_seconds=0)
    path = options.WORKDIR.value
    registry.adapt(path, adapter, held_flags.CHECKPOINT.value)
    run, decoder = load_decoder(
        path,
        held_flags.CHECKPOINT.value,
        held_flags.DTYPE.value,
        weights=held_flags.WEIGHTS.value,
        cache=held_flags.CACHE.value,
        mesh=devices.mesh(),
        before=_check_memory if adapter is None else lambda config, tokenizer: None,
    )
    return _Loaded(name, adapter, run, decoder)


def _model(loaded: _Loaded, template: str | None) -> "Model":
    """Return a model without its engine."""
    from mtnlg_jax.data.tokenizer.chat import Chat
    from mtnlg_jax.serve.models import Model

    run = loaded.run
    chat = None
    try:
        chat = Chat(run.tokenizer, template)
    except ValueError:
        # A model without a template is served without /v1/chat/completions.
        if template is not None:
            raise
    adapted = loaded.adapter is not None
    return Model(
        loaded.name,
        cast(Any, None),
        loaded.decoder,
        run.tokenizer,
        chat=chat,
        chat_template=template or _own_template(run.tokenizer),
        stages=None if adapted else run.config.train.stages,
        base=next(iter(_adapters())) if adapted else None,
    )


def _engine(loaded: _Loaded, mirror: "Mirror | None") -> "Engine":
    from mtnlg_jax.serve.engine import Engine

    return Engine(
        loaded.decoder,
        loaded.run.tokenizer,
        slots=options.SLOTS.value,
        # The self-test asks for all at once.
        waiting=64 if options.SELFTEST.value else options.WAITING.value,
        waiting_tokens=1 << 30 if options.SELFTEST.value else options.WAITING_TOKENS.value,
        warm=options.WARM.value,
        mirror=mirror,
    )


def _check_memory(config: "Config", _: object) -> None:
    """Raise ValueError if the models of all names, and all slots at their full length, do not
    fit. The model itself is loaded first, so nothing is loaded yet."""
    from mtnlg_jax.decode.memory import Caches, Choices, Plan

    slots = options.SLOTS.value
    plan = Plan(
        config.model,
        held_flags.DTYPE.value,
        held_flags.WEIGHTS.value,
        held_flags.CACHE.value,
        mesh=devices.mesh(),
        caches=(Caches(slots, config.model.max_position_embeddings, split=False),),
    )
    # Each adapter is merged into weights of its own, and has slots of its own.
    plans = [plan] * len(_adapters())
    rows = ("--slots", slots)
    fitting.check(options.WORKDIR.value, plans, Choices(rows=rows), devices.mesh())


def _own_template(tokenizer) -> str | None:
    content = tokenizer.companions.get("chat_template.jinja")
    return None if content is None else content.decode("utf-8", "replace")
