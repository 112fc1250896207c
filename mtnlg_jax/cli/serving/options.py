"""Flags of launch/serve.py."""

from absl import flags

from mtnlg_jax import command

with command.flag_group("Model"):
    WORKDIR = command.define_path(
        "workdir", None, "folder of a run or of a Hugging Face model, or a GGUF file", required=True
    )
    NAME = flags.DEFINE_string(
        "name", None, "name of the model in requests; default: that of the folder"
    )
    LORA = flags.DEFINE_multi_string(
        "lora",
        [],
        "NAME=PATH: an adapter of the model, a folder of PEFT or a file of launch/adapt.py, "
        "served as the model NAME; repeat",
    )
    CHAT_TEMPLATE = command.define_path(
        "chat_template", None, "file of a chat template, instead of the one of the tokenizer"
    )

with command.flag_group("Engine"):
    SLOTS = flags.DEFINE_integer(
        "slots", 8, "rows that are written at the same time", lower_bound=1, upper_bound=1024
    )
    WAITING = flags.DEFINE_integer(
        "waiting", 64, "requests that may wait; further ones get 429", lower_bound=0
    )
    SELFTEST = flags.DEFINE_bool(
        "selftest",
        False,
        "instead of serving, write requests alone and then together, and compare what each was "
        "told",
    )
    WAITING_TOKENS = flags.DEFINE_integer(
        "waiting_tokens",
        None,
        "tokens of prompts that may wait together; default: 8 contexts",
        lower_bound=1,
    )
    WARM = flags.DEFINE_bool(
        "warm", True, "compile every program before the server is ready, so that none is later"
    )

with command.flag_group("Devices"):
    SET = flags.DEFINE_multi_string(
        "set", [], "mesh.KEY=VALUE: devices to split the model over (tensor, expert)"
    )

with command.flag_group("Server"):
    HOST = flags.DEFINE_string("host", "127.0.0.1", "address; others than loopback need API keys")
    PORT = flags.DEFINE_integer("port", 8000, "port", lower_bound=0, upper_bound=65535)
    API_KEYS = command.define_path(
        "api_keys",
        None,
        "file of API keys, one a line, optionally with name=NAME concurrent=N per_minute=N; the "
        "variable MTNLG_API_KEYS may hold some, separated by commas",
    )
    BODY_BYTES = flags.DEFINE_integer(
        "body_bytes", 1 << 20, "largest body of a request, in bytes", lower_bound=1024
    )
    REQUEST_SECONDS = flags.DEFINE_float(
        "request_seconds", 600.0, "longest time of a request, in seconds", lower_bound=1.0
    )
    DRAIN_SECONDS = flags.DEFINE_float(
        "drain_seconds",
        120.0,
        "after SIGTERM, the seconds in which running requests may finish",
        lower_bound=0.0,
    )
