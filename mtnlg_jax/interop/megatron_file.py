"""A checkpoint of Megatron-LM: its folder, its tensors, its ModelConfig and its tokenizer."""

import os
from pathlib import Path

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.data.tokenizer import ByteLevelBPETokenizer, Tokenizer
from mtnlg_jax.interop import vocabulary
from mtnlg_jax.interop.layouts import Family
from mtnlg_jax.interop.megatron_dist import Distributed
from mtnlg_jax.interop.megatron_ranks import Ranks
from mtnlg_jax.interop.megatron_settings import EMBEDDING, family_of, model_of
from mtnlg_jax.interop.recognize import MEGATRON_LATEST, megatron_format


class Megatron:
    """The checkpoint at ``path``: a folder with latest_checkpointed_iteration.txt, or one iteration
    of it.

    Args:
      tokenizer: path of a tokenizer, where the one that the args name is elsewhere.

    Raises ValueError or FileNotFoundError if something is missing, damaged or not supported.
    """

    def __init__(self, path: str | os.PathLike, tokenizer: str | os.PathLike | None = None):
        self.folder = Path(path)
        self.iteration = iteration_of(self.folder)
        stored: Ranks | Distributed
        if megatron_format(self.iteration) == "torch":
            stored = Ranks(self.iteration)
        else:
            stored = Distributed(self.iteration)
        self.stored = stored
        self.args = stored.args
        self._given = tokenizer
        padded = self._padded()
        rows = self._rows(padded)
        stored.cut(rows)
        self.model: ModelConfig = model_of(self.args, str(self.iteration), rows)
        self.family: Family = family_of(self.args, self.model)

    def _padded(self) -> int:
        """Return the rows of the embedding as stored."""
        if EMBEDDING not in self.stored.shapes:
            raise ValueError(
                f"{self.iteration} holds no {EMBEDDING}: it is not a GPT model, or parts of it are "
                "missing"
            )
        return self.stored.shapes[EMBEDDING][0]

    def _rows(self, padded: int) -> int:
        """Return the rows without padding, as far as they are known."""
        stated = self.args.get("vocab_size")
        known = [stated] if isinstance(stated, int) and 0 < stated <= padded else []
        try:
            known.append(self.tokenizer({}, {}, padded)[0].vocab_size)
        except FileNotFoundError:
            pass
        return max(known, default=padded)

    def tokenizer(self, config: dict, generation: dict, rows: int) -> tuple[Tokenizer, list[str]]:
        """Return the tokenizer, and the special tokens without a row: of the path that was given,
        of files beside the checkpoint, or of the args."""
        if self._given is not None:
            return vocabulary.read_tokenizer(self._given, config, generation, rows)
        if any((self.folder / name).is_file() for name in vocabulary.FILES):
            return vocabulary.read_tokenizer(self.folder, config, generation, rows)
        named = {
            key: self.args[key]
            for key in ("tokenizer_model", "vocab_file", "merge_file")
            if self.args.get(key)
        }
        model = named.get("tokenizer_model")
        if model and Path(model).exists():
            return vocabulary.read_tokenizer(model, config, generation, rows)
        pair = [Path(named.get(key, "")) for key in ("vocab_file", "merge_file")]
        if all(path.is_file() for path in pair):
            files = [path.read_bytes() for path in pair]
            return ByteLevelBPETokenizer(*files), []
        shown = ", ".join(f"{key}={value}" for key, value in named.items()) or "no file"
        raise FileNotFoundError(
            f"the args of {self.iteration} name the tokenizer "
            f"{self.args.get('tokenizer_type')} with {shown}, which is not on this machine; give "
            f"--tokenizer=FOLDER, or copy its files to {self.folder}"
        )


def iteration_of(folder: Path) -> Path:
    """Return the folder of the iteration to read. Raises FileNotFoundError if it is missing."""
    if megatron_format(folder):
        return folder
    latest = folder / MEGATRON_LATEST
    text = latest.read_text().strip()
    if text == "release":
        chosen = folder / "release"
    elif text.isdigit():
        chosen = folder / f"iter_{int(text):07d}"
    else:
        raise ValueError(f"{latest} holds {text[:20]!r} instead of an iteration; correct it")
    if not chosen.is_dir():
        found = sorted(path.name for path in folder.glob("iter_*"))
        there = f"there are {', '.join(found[-3:])}" if found else "there is none"
        raise FileNotFoundError(
            f"{chosen} is missing, and {latest} names it; {there}: give one of them, or correct "
            "the file"
        )
    if not megatron_format(chosen):
        raise ValueError(
            f"{chosen} has neither ranks (mp_rank_*) nor a torch_dist checkpoint (.metadata and "
            "common.pt); write it with --ckpt-format=torch_dist, or copy the whole folder"
        )
    return chosen
