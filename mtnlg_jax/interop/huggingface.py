"""Convert a folder of Hugging Face to a run folder, and back."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mtnlg_jax.config import DecodeConfig, ModelConfig, to_json
from mtnlg_jax.decode.results import writable
from mtnlg_jax.interop import vocabulary
from mtnlg_jax.interop.export import config_of
from mtnlg_jax.interop.families import family_of
from mtnlg_jax.interop.recognize import is_gguf
from mtnlg_jax.interop.shards import cast, write_shards
from mtnlg_jax.interop.source import Source, changed_decoding, meta_of
from mtnlg_jax.interop.written import KEPT, Written, read_kept
from mtnlg_jax.storage import is_remote
from mtnlg_jax.train.checkpoint import Checkpoints, Run, load_run

ORIGINALS = "huggingface"  # folder in a converted run: the original config.json and tokenizer
DTYPES = ("source", "float32", "float16", "bfloat16")
_ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}

# Placed in a converted run.
_CONFIG = '''"""The settings of this run, to train it further (WORKDIR is this folder):

    python launch/prepare_data.py --input=TEXT --output=OUT --tokenizer=WORKDIR/tokenizer
    python launch/pretrain.py --config=WORKDIR/config.py --set=data.path=OUT --workdir=WORKDIR
"""

from pathlib import Path

from mtnlg_jax.config import Config, from_json


def get_config() -> Config:
    return from_json(Path(__file__).with_name("config.json").read_text())
'''


def convert(
    source: str,
    target: str,
    *,
    dtype: str = "source",
    max_shard_size: float = 5.0,
    which: str = "best",
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> str:
    """Convert ``source`` to ``target``, and return a report for the user.

    The contents of ``source`` decide the direction: a config.json with a model_type is a model of
    Hugging Face's, and checkpoints/ are those of a run.

    Args:
      dtype: type of the tensors written for Hugging Face, one of DTYPES. "source" is the original
        type for a run that was converted and not trained since, else float32. Runs are always
        float32.
      max_shard_size: maximum size of a file in GB.
      which: the checkpoint of a run, "best" or "last".
      tokenizer: path of the tokenizer for a model that lacks one.
      overwrite: replace an earlier run or model in ``target`` once the new one is complete.

    Raises:
      ValueError: something cannot be converted.
      OSError: a file is missing or cannot be read.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype={dtype!r}; choose one of {', '.join(DTYPES)}")
    to_run = _holds_model(source)
    _refuse_target(source, target, overwrite)
    beside = f"{os.path.abspath(target)}.partial-{os.getpid()}"
    os.makedirs(beside)
    try:
        if to_run:
            report = _to_run(Path(source), Path(beside), os.fspath(target), dtype, tokenizer)
        else:
            if tokenizer is not None:
                raise ValueError(
                    f"--tokenizer={tokenizer} is for a model without one; {source} is a run, so "
                    "leave it out"
                )
            report = _to_model(source, Path(beside), dtype, max_shard_size, which)
        _put_in_place(beside, os.path.abspath(target))
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return f"{source} -> {target}\n{report}"


# --- Hugging Face -> ours


def read_model(folder: str | os.PathLike) -> tuple[ModelConfig, object, dict]:
    """Return the config and float32 parameters of a model, and what conversion back needs.

    Raises ValueError or FileNotFoundError that names what is missing or not supported.
    """
    source = Source(folder)
    return source.model, source.interchange.parameters(source.tensor), source.origin()


def _to_run(given: Path, folder: Path, workdir: str, dtype: str, tokenizer_path: str | None) -> str:
    if dtype not in ("source", "float32"):
        raise ValueError(
            f"--dtype={dtype} is for tensors of Hugging Face's; a run is float32, so leave it out"
        )
    source = Source(given)
    settings = source.settings(tokenizer_path)
    config = settings.config
    tokenizer = settings.tokenizer
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        checkpoints.save_parameters(
            0, source.interchange.shapes, source.parameters(), meta_of(settings, source)
        )
    finally:
        checkpoints.close()
    tokenizer.save(folder / "tokenizer")
    (folder / "config.json").write_text(to_json(config))
    (folder / "config.py").write_text(_CONFIG)
    (folder / ORIGINALS).mkdir()
    for name in source.files():
        if tokenizer_path is None or name not in vocabulary.FILES:
            shutil.copyfile(source.folder / name, folder / ORIGINALS / name)
    if source.is_gguf:
        content = json.dumps(source.original, indent=2) + "\n"
        (folder / ORIGINALS / "config.json").write_text(content)
    kept = {} if source.is_gguf else source.inexact()
    if kept:
        save_file(kept, folder / ORIGINALS / KEPT)
    model = source.model
    lines = _report(model, tokenizer, f"from {_kinds(source.dtypes)} to float32, exact")
    lines += _report_tokenizer(tokenizer, settings.left_out, model.vocabulary)
    lines += _report_decode(config.decode, settings.not_kept)
    if source.left_out:
        lines.append(
            f"left out   {_first(source.left_out)}: tensors that the model does not compute with"
        )
    if model.dropout_rate:
        lines.append(
            f"dropout    {model.dropout_rate:g} when training further (resid_pdrop; "
            "attention weights are not dropped)"
        )
    how = "--mode=fill --prompt='A <mask>.'" if source.family.masked else "--prompt=TEXT"
    return "\n".join(
        [
            *lines,
            f"next       python launch/generate.py --workdir={workdir} {how}",
            f"           {workdir}/config.py shows how to train further",
        ]
    )


def _first(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _report_tokenizer(tokenizer, outside: list[str], rows: int) -> list[str]:
    def spelled(index: int) -> str:
        name = tokenizer.special_names.get(index) or repr(tokenizer.decode([index]))
        return f"{name} ({index})"

    bos = "begin with bos" if tokenizer.prompt_bos else "get no bos, as there"
    end = (
        f"the end token is {spelled(tokenizer.eos_id)}"
        if tokenizer.eos_id >= 0
        else f"there is no end token; an empty prompt starts from {spelled(tokenizer.bos_id)}"
    )
    lines = [f"prompts    {bos}; {end}"]
    if outside:
        more = " ..." if len(outside) > 6 else ""
        lines.append(
            f"left out   {', '.join(outside[:6])}{more}: special tokens without a row "
            f"among the model's {rows:,}; no text has them"
        )
    if losses := tokenizer.losses():
        lines.append(f"lossy      this tokenizer is not lossless; a text loses {', '.join(losses)}")
    return lines


def _report_decode(decode: DecodeConfig, not_kept: list[str]) -> list[str]:
    changed = [f"{name}={value}" for name, value in changed_decoding(decode).items()]
    lines = []
    if changed:
        lines.append(f"decoding   as generation_config.json has it: {', '.join(changed)}")
    if not_kept:
        lines.append(f"not kept   of generation_config.json: {', '.join(not_kept)}")
    return lines


# --- ours -> Hugging Face


def _to_model(workdir: str, folder: Path, dtype: str, max_shard_size: float, which: str) -> str:
    run = load_run(workdir, which, vocab_padding=0)
    model = run.config.model
    tokenizer = run.tokenizer
    originals = Path(workdir, ORIGINALS)
    original = vocabulary.read_json(originals / "config.json")
    config = config_of(model, original)
    written = _write_tensors(
        run, folder, config, original, dtype, max_shard_size, read_kept(originals)
    )
    kinds = set(written.values())
    if len(kinds) == 1:
        key = next((key for key in ("dtype", "torch_dtype") if key in (original or {})), "dtype")
        if original is None or key in original or dtype != "source":
            config[key] = kinds.pop()
    if any((originals / name).is_file() for name in vocabulary.FILES):
        copied = [
            name
            for name in ("generation_config.json", *vocabulary.FILES)
            if (originals / name).is_file()
        ]
        for name in copied:
            shutil.copyfile(originals / name, folder / name)
        how = "as it came"
    else:
        config |= {
            "bos_token_id": tokenizer.bos_id,
            "pad_token_id": tokenizer.pad_id,
            "eos_token_id": tokenizer.eos_id if tokenizer.eos_id >= 0 else None,
        }
        files, how = vocabulary.write_tokenizer(tokenizer, model.max_position_embeddings)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / "generation_config.json").write_text(
            json.dumps(_generation(tokenizer, model), indent=2)
        )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return "\n".join(
        [
            *_report(model, tokenizer, f"from float32 to {_kinds(written)}"),
            f"tokenizer  {how}",
            f"checkpoint of step {run.step}",
        ]
    )


def _write_tensors(
    run: Run,
    folder: Path,
    config: dict,
    original: dict | None,
    dtype: str,
    max_shard_size: float,
    kept: dict[str, np.ndarray],
) -> dict[str, str]:
    """Write the tensors, and return the dtype of each by its name in the family's table."""
    family = config["model_type"]
    origin = run.meta.get("huggingface")
    if original is None or family_of(original)[0] != family:
        origin = None  # a run that was changed into another family
        kept = {}
    made = Written(run.config.model, family, run.params, origin, kept)
    if dtype == "source":
        dtypes = {name: made.origin_dtypes.get(name, "float32") for name in made.names}
    else:
        dtypes = dict.fromkeys(made.names, dtype)
    names = {made.stored_name(name): name for name in made.names}

    def values(full: str) -> np.ndarray:
        return cast(full, made[names[full]], dtypes[names[full]])

    sizes = {
        full: math.prod(made.shape(name)) * _ITEM[dtypes[name]] for full, name in names.items()
    }
    write_shards(folder, sizes, values, max_shard_size)
    return dtypes


def _generation(tokenizer, model: ModelConfig) -> dict:
    """Return a generation_config.json.

    It suppresses special tokens and the padding of the vocabulary, which are never written here.
    """
    never = np.flatnonzero(~writable(tokenizer, model.vocabulary)).tolist()
    end = tokenizer.eos_id if tokenizer.eos_id >= 0 else None
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": end,
        "pad_token_id": tokenizer.pad_id,
        "suppress_tokens": never or None,
    }


# --- both directions


def _holds_model(source: str) -> bool:
    """Return True for a model of Hugging Face's, False for a run."""
    if is_remote(source):
        raise ValueError(f"{source} is a URL; copy the folder to this machine first")
    folder = Path(source)
    if is_gguf(source) and folder.is_file():
        return True
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{source} is not a folder; give a model of Hugging Face's, a GGUF file or a run"
        )
    run = (folder / "checkpoints").is_dir()
    model = "model_type" in (vocabulary.read_json(folder / "config.json") or {})
    if run == model:
        raise ValueError(
            f"{source} holds {'both' if run else 'neither'} checkpoints/ of a run "
            f"{'and' if run else 'nor'} config.json with a model_type of Hugging Face's; "
            "give one of them"
        )
    return model


def _refuse_target(source: str, target: str, overwrite: bool) -> None:
    if is_remote(target):
        raise ValueError(f"{target} is a URL; convert to a local folder and copy that")
    here = Path(source).resolve()
    there = Path(target).resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(
            f"one of --from={source} and --to={target} contains the other; give another --to"
        )
    if there.exists() and not there.is_dir():
        raise ValueError(f"{target} is a file; give another --to")
    if there.is_dir() and any(there.iterdir()):
        if not overwrite:
            raise ValueError(
                f"{target} is not empty; give --overwrite to replace it, or another --to"
            )
        if not (there / "config.json").is_file():
            raise ValueError(
                f"{target} is neither a run nor a model, so --overwrite does not replace it; "
                "give another --to"
            )


def _put_in_place(beside: str, target: str) -> None:
    """Replace ``target``. The old folder is deleted last, so one of the two is always complete."""
    for folder, _, names in os.walk(beside):
        for path in (*(os.path.join(folder, name) for name in names), folder):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    old = f"{target}.old-{os.getpid()}"
    if os.path.isdir(target):
        os.rename(target, old)
    try:
        os.rename(beside, target)
    except OSError:
        if os.path.isdir(old):
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _kinds(dtypes: dict[str, str]) -> str:
    return " and ".join(sorted(set(dtypes.values())))


def _report(model: ModelConfig, tokenizer, numbers: str) -> list[str]:
    rest = model.vocabulary - tokenizer.vocab_size
    padding = f"; {rest} more rows are kept but never written" if rest > 0 else ""
    head = "tied" if model.tie_embeddings else "separate"
    return [
        f"model      {model.parameter_count():,} parameters, {model.num_layers} layers of width "
        f"{model.hidden_size}, {model.num_attention_heads} heads, output embedding {head}",
        f"numbers    {numbers}",
        f"vocabulary {model.vocab_size:,} rows for {tokenizer.vocab_size:,} tokens{padding}",
    ]
