"""Convert a folder of Hugging Face, or of another project, to a run folder, and back."""

import itertools
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np

from mtnlg_jax.config import ModelConfig, to_json
from mtnlg_jax.decode.results import writable
from mtnlg_jax.foreign import ORIGINALS, is_gguf
from mtnlg_jax.interop import report, vocabulary
from mtnlg_jax.interop.adapter_config import CONFIG
from mtnlg_jax.interop.adapter_export import to_adapter
from mtnlg_jax.interop.adapter_runs import Beside, base_of, open_base, run_of_base
from mtnlg_jax.interop.adapters import Adapter, Merged
from mtnlg_jax.interop.export import config_of
from mtnlg_jax.interop.families import family_of
from mtnlg_jax.interop.recognize import is_adapter, is_megatron, maxtext_items
from mtnlg_jax.interop.run_folder import keep_originals, write_run
from mtnlg_jax.interop.shards import cast, write_shards
from mtnlg_jax.interop.source import Source, meta_of, parameters_of
from mtnlg_jax.interop.written import Written, read_kept
from mtnlg_jax.storage import is_remote
from mtnlg_jax.train.checkpoint import Run, load_run
from mtnlg_jax.train.init_from import identity_of

DTYPES = ("source", "float32", "float16", "bfloat16")
ADAPTERS = ("merge", "keep")
TEMPLATE = "chat_template.jinja"
MAX_SHARD_SIZE = 5.0  # GB
_ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}


def convert(
    source: str,
    target: str,
    *,
    dtype: str = "source",
    max_shard_size: float | None = None,
    which: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
    family: str | None = None,
    adapters: str | None = None,
    base: str | None = None,
) -> str:
    """Convert ``source`` to ``target``, and return a report for the user.

    The contents of ``source`` decide the direction: a config.json with a model_type is a model of
    Hugging Face's, an adapter_config.json an adapter of PEFT's, iter_*/ are checkpoints of
    Megatron-LM, and checkpoints/ are those of a run.

    Args:
      dtype: type of the tensors written for Hugging Face, one of DTYPES. "source" is the original
        type for a run that was converted and not trained since, else float32. Runs are always
        float32.
      max_shard_size: maximum size of a file in GB, above 0; None: MAX_SHARD_SIZE.
      which: the checkpoint of a run, "best" or "last"; None: "best".
      tokenizer: path of the tokenizer for a model that lacks one.
      overwrite: replace an earlier run or model in ``target`` once the new one is complete.
      family: the model_type that a run becomes; by default the original one, or the first that
        computes the same.
      adapters: "merge" low-rank adapters into the model, or "keep" them apart: as an adapter of
        PEFT's, or as a run that trains them further. None: merge those of a run, keep PEFT's.
      base: the base of the adapter; None: the one that it names.

    Raises:
      ValueError: something cannot be converted, or an argument has no use in this direction.
      OSError: a file is missing or cannot be read.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype={dtype!r}; choose one of {', '.join(DTYPES)}")
    if adapters not in (None, *ADAPTERS):
        raise ValueError(f"unknown adapters={adapters!r}; choose one of {', '.join(ADAPTERS)}")
    adapter = not is_remote(source) and is_adapter(source)
    to_run = adapter or _holds_model(source)
    if base is not None and not (adapter or adapters == "keep"):
        raise ValueError(f"--base={base} is for adapters, and {source} holds none; leave it out")
    if base is not None and not os.path.exists(base):
        raise FileNotFoundError(f"--base={base} does not exist; give the folder of the base")
    if to_run and not adapter and adapters is not None:
        raise ValueError(
            f"--adapters={adapters} is for adapters, and {source} is a whole model; leave it out"
        )
    to_adapters = adapters == "keep" and not adapter
    becomes = "an adapter" if to_adapters else "a run" if adapter or to_run else "a model"
    _refuse_unused(source, becomes, family, max_shard_size, which)
    _refuse_target(source, target, overwrite)
    beside = f"{os.path.abspath(target)}.partial-{os.getpid()}"
    os.makedirs(beside)
    try:
        if adapter:
            _refuse_dtype(dtype)
            how = adapters or "keep"
            text = _adapter_to_run(source, Path(beside), target, how, base, tokenizer)
        elif to_run:
            text = _to_run(Path(source), Path(beside), os.fspath(target), dtype, tokenizer)
        else:
            if tokenizer is not None:
                raise ValueError(
                    f"--tokenizer={tokenizer} is for a model without one; {source} is a run, so "
                    "leave it out"
                )
            which = which or "best"
            if to_adapters:
                run, rest = to_adapter(source, Path(beside), dtype, which, base)
                text = "\n".join([*report.of_model(run.config.model, run.tokenizer), rest])
            else:
                size = MAX_SHARD_SIZE if max_shard_size is None else max_shard_size
                text = _to_model(source, Path(beside), dtype, size, which, family)
        _put_in_place(beside, os.path.abspath(target))
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return f"{source} -> {target}\n{text}"


# --- Hugging Face -> ours


def read_model(folder: str | os.PathLike) -> tuple[ModelConfig, object, dict]:
    """Return the config and float32 parameters of a model, and what conversion back needs.

    Raises ValueError or FileNotFoundError that names what is missing or not supported.
    """
    source = Source(folder)
    return source.model, source.interchange.parameters(source.tensor), source.origin()


def _to_run(given: Path, folder: Path, workdir: str, dtype: str, tokenizer_path: str | None) -> str:
    _refuse_dtype(dtype)
    source = Source(given, tokenizer_path)
    settings = source.settings(tokenizer_path)
    config = settings.config
    tokenizer = settings.tokenizer
    meta = meta_of(settings, source)
    write_run(folder, config, tokenizer, source.interchange.shapes, source.parameters(), meta)
    keep_originals(source, folder / ORIGINALS, tokenizer_path is None)
    model = source.model
    lines = report.of_model(
        model, tokenizer, f"from {report.kinds(source.dtypes)} to float32, exact"
    )
    lines += report.of_tokenizer(tokenizer, settings.left_out, model.vocabulary)
    lines += report.of_decode(config.decode, settings.not_kept)
    if source.left_optimizer:
        lines.append("left out   the optimizer's state; training begins with a new one")
    if source.left_out:
        lines.append(
            f"left out   {report.first(source.left_out)}: tensors that the model does not compute "
            "with"
        )
    if model.dropout_rate:
        lines.append(
            f"dropout    {model.dropout_rate:g} when training further (as there; "
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


def _refuse_dtype(dtype: str) -> None:
    if dtype not in ("source", "float32"):
        raise ValueError(
            f"--dtype={dtype} is for tensors of Hugging Face's; a run is float32, so leave it out"
        )


def _adapter_to_run(
    given: str, folder: Path, workdir: str, how: str, base: str | None, tokenizer: str | None
) -> str:
    """Write a run of an adapter: merged into its base, or beside it."""
    path = base_of(given, base)
    found = open_base(path)
    adapter = Adapter(given, found)
    run = run_of_base(found, tokenizer)
    config = run.config
    interchange = found.interchange
    shapes = dict(interchange.shapes)
    meta = dict(run.meta)
    if how == "merge":
        parts = parameters_of(interchange, Merged(found, adapter))
        line = (
            f"merged     {len(adapter.changes)} matrices, {len(adapter.whole)} tensors as a whole"
        )
    else:
        low_rank = Beside(adapter)
        config = low_rank.config(config, path)
        shapes |= low_rank.shapes
        parts = itertools.chain(parameters_of(interchange, found), low_rank.parameters())
        line = (
            f"adapter    beside its base: optimizer.lora_rank={low_rank.rank}, lora_alpha="
            f"{low_rank.scale * low_rank.rank:g}, lora_targets={','.join(low_rank.targets)}"
        )
    meta |= {"config": json.loads(to_json(config)), "samples": 0, "metrics": {}}
    identity = {key: meta["identity"][key] for key in ("model", "tokenizer")}
    meta["identity"] = identity | identity_of(config, {})
    write_run(folder, config, run.tokenizer, shapes, parts, meta)
    keep_originals(found, folder / ORIGINALS, tokenizer is None)
    named = adapter.config.base
    note = (
        []
        if not named or os.path.basename(named) in os.path.abspath(path)
        else [
            f"note       the adapter names {named} as its base; shapes and names agree with {path}"
        ]
    )
    return "\n".join(
        [
            *report.of_model(found.model, run.tokenizer),
            f"base       {path}",
            line,
            *note,
            f"next       python launch/generate.py --workdir={workdir} --prompt=TEXT",
            f"           {workdir}/config.py shows how to train further",
        ]
    )


# --- ours -> Hugging Face


def _to_model(
    workdir: str, folder: Path, dtype: str, max_shard_size: float, which: str, family: str | None
) -> str:
    run = load_run(workdir, which, vocab_padding=0)
    model = run.config.model
    tokenizer = run.tokenizer
    originals = Path(workdir, ORIGINALS)
    original = vocabulary.read_json(originals / "config.json")
    config = config_of(model, original, family)
    if config["model_type"] == "roberta" and tokenizer.pad_id != 1:
        raise ValueError(
            f"roberta counts positions from the pad token, which must be token 1; here it is "
            f"{tokenizer.pad_id}. Write --family=bert, which computes the same"
        )
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
        # The one that the run was trained with, which may be another than the original.
        template = tokenizer.companions.get(TEMPLATE)
        if template is not None:
            (folder / TEMPLATE).write_bytes(template)
        how = "as it came"
    else:
        config |= {
            "bos_token_id": tokenizer.bos_id,
            "pad_token_id": tokenizer.pad_id,
            "eos_token_id": _ends(tokenizer),
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
            *report.of_model(model, tokenizer, f"from float32 to {report.kinds(written)}"),
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
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": _ends(tokenizer),
        "pad_token_id": tokenizer.pad_id,
        "suppress_tokens": never or None,
    }


def _ends(tokenizer) -> int | list[int] | None:
    """Return eos_token_id: one id, a list of several, or None where no token ends a text."""
    if tokenizer.eos_id < 0:
        return None
    several = [index for index in tokenizer.eos_ids if index >= 0]
    return several if len(several) > 1 else several[0]


# --- both directions


def _holds_model(source: str) -> bool:
    """Return True for a model of Hugging Face's, False for a run."""
    if is_remote(source):
        raise ValueError(f"{source} is a URL; copy the folder to this machine first")
    folder = Path(source)
    if is_gguf(source) and folder.is_file():
        return True
    if is_megatron(source) or maxtext_items(source) is not None:
        return True
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{source} is not a folder; give a model of Hugging Face's, a GGUF file, a "
            "checkpoint of Megatron-LM or MaxText, or a run"
        )
    run = (folder / "checkpoints").is_dir()
    model = "model_type" in (vocabulary.read_json(folder / "config.json") or {})
    tensors = sorted(found.name for found in folder.glob("*.safetensors*"))
    if not run and not model and tensors:
        what = "has no model_type" if (folder / "config.json").is_file() else "is missing"
        raise ValueError(
            f"{folder / 'config.json'} {what}, so that nothing names the family of the model in "
            f"{tensors[0]}; copy the whole folder"
        )
    if run == model:
        raise ValueError(
            f"{source} holds {'both' if run else 'neither'} checkpoints/ of a run "
            f"{'and' if run else 'nor'} config.json with a model_type of Hugging Face's; "
            "give one of them"
        )
    return model


def _refuse_unused(
    source: str,
    becomes: str,
    family: str | None,
    max_shard_size: float | None,
    which: str | None,
) -> None:
    """Raise ValueError for an argument that is out of range, or that has no use where ``source``
    ``becomes`` this. None: not given."""
    # Written so that it refuses nan too.
    if max_shard_size is not None and not max_shard_size > 0:
        raise ValueError(
            f"--max_shard_size={max_shard_size:g} GB holds no tensor; set it above 0, such as "
            f"{MAX_SHARD_SIZE:g}"
        )
    if becomes != "a model":
        for name, value in (("family", family), ("max_shard_size", max_shard_size)):
            if value is not None:
                text = value if isinstance(value, str) else f"{value:g}"
                raise ValueError(
                    f"--{name}={text} is for a run that becomes a model; {source} becomes "
                    f"{becomes}, so leave it out"
                )
    if becomes == "a run" and which is not None:
        raise ValueError(
            f"--checkpoint={which} is for a run that becomes a model or an adapter; {source} "
            "becomes a run, so leave it out"
        )


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
        if not any((there / name).is_file() for name in ("config.json", CONFIG)):
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
