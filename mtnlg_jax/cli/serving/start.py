"""Load the models of launch/serve.py and serve them."""

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from mtnlg_jax.cli.serving import options
from mtnlg_jax.command import expand

if TYPE_CHECKING:
    from mtnlg_jax.serve.models import Model


def serve() -> None:
    """Check everything that costs nothing, then load, then serve until a signal."""
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
    from mtnlg_jax.serve.http import Api, Limits
    from mtnlg_jax.serve.keys import load_keys
    from mtnlg_jax.serve.models import Models

    keys = load_keys(options.API_KEYS.value)
    bound = listening.bind(options.HOST.value, options.PORT.value, keys)
    with bound:
        models = Models([_load(name, folder, template) for name, folder in adapters.items()])
        limits = Limits(options.BODY_BYTES.value, options.REQUEST_SECONDS.value)
        for engine in models.engines:
            # Warming takes long; /health answers meanwhile, and /ready says when it is over.
            threading.Thread(target=engine.start, name="start", daemon=True).start()
        address, port = bound.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        names = ", ".join(model.name for model in models.all)
        print(f"serving {names} at http://{shown}:{port}/", flush=True)
        server = listening.Server(Api(models, keys, limits), options.DRAIN_SECONDS.value)
        server.run_until_signal(bound)


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
        if not Path(folder, "adapter_config.json").is_file():
            raise ValueError(
                f"--lora={given}: {folder} holds no adapter_config.json; name the folder that PEFT "
                "has saved"
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


def _load(name: str, adapter: str | None, template: str | None) -> "Model":
    """Load a model, with an adapter merged into it if one is given."""
    from mtnlg_jax import compat
    from mtnlg_jax.data.tokenizer.chat import Chat
    from mtnlg_jax.decode.load import load_decoder
    from mtnlg_jax.interop import registry
    from mtnlg_jax.serve.engine import Engine
    from mtnlg_jax.serve.models import Model

    compat.quiet()
    compat.configure_cache(least_seconds=0)
    path = options.WORKDIR.value
    registry.adapt(path, adapter, options.CHECKPOINT.value)
    run, decoder = load_decoder(
        path,
        options.CHECKPOINT.value,
        options.DTYPE.value,
        weights=options.WEIGHTS.value,
        cache=options.CACHE.value,
    )
    chat = None
    try:
        chat = Chat(run.tokenizer, template)
    except ValueError:
        # A model without a template is served without /v1/chat/completions.
        if template is not None:
            raise
    engine = Engine(
        decoder,
        run.tokenizer,
        slots=options.SLOTS.value,
        waiting=options.WAITING.value,
        waiting_tokens=options.WAITING_TOKENS.value,
        warm=options.WARM.value,
    )
    base = None if adapter is None else next(iter(_adapters()))
    return Model(
        name,
        engine,
        decoder,
        run.tokenizer,
        chat=chat,
        chat_template=template or _own_template(run.tokenizer),
        stages=run.config.train.stages if adapter is None else None,
        base=base,
    )


def _own_template(tokenizer) -> str | None:
    content = tokenizer.companions.get("chat_template.jinja")
    return None if content is None else content.decode("utf-8", "replace")
