"""Models of SentencePiece, trained here or elsewhere."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain

from mtnlg_jax.data.tokenizer.base import SPECIAL_IDS, Tokenizer, find_roles

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
SPACE = "\u2581"  # SentencePiece writes a space like this; texts may contain it themselves
# Characters passed to SentencePiece at once, at most 4 KB: its BPE is slow on long texts.
UNIT_CHARACTERS = 1024


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    A model from elsewhere keeps its own normalization, so it may not be lossless, and its own
    special pieces. Missing special tokens are numbered after its last piece. ``as_trained_here``:
    no piece reaches over a line end, and no space is put before a text.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, special_ids: bytes | None = None):
        """``special_ids``: as in `ByteLevelBPETokenizer`, if files beside the model define more
        than its pieces do."""
        from sentencepiece import SentencePieceProcessor

        try:
            sp = SentencePieceProcessor(model_proto=model)
        except Exception:  # its message names a line of C++
            raise ValueError("not a SentencePiece model, or a damaged one") from None
        pieces = [sp.id_to_piece(index) for index in range(sp.vocab_size())]
        files = {"tokenizer.model": model}
        if special_ids is None:
            roles = find_roles(pieces, {"bos": ["<s>"], "eos": ["</s>"]})
        else:
            files[SPECIAL_IDS] = special_ids
            roles = self._read_roles(special_ids)
        names = {
            index: piece
            for index, piece in enumerate(pieces)
            if sp.is_control(index)
            or sp.is_unused(index)
            or sp.is_unknown(index)
            or index in roles.values()
        }
        content = [piece.replace(SPACE, " ").encode() for piece in pieces]
        byte_ids = [index for index in range(len(pieces)) if sp.is_byte(index)]
        for index in byte_ids:
            content[index] = bytes([int(pieces[index][1:-1], 16)])  # spelled <0x41>
        for index in names:
            content[index] = b"\xef\xbf\xbd" if sp.is_unknown(index) else b""
        super().__init__(content, roles, names, byte_ids, files)

        self._sp = sp
        self.pieces = len(pieces)
        # Models from elsewhere may put a space before each text: decoding removes it, and texts
        # must not be split.
        self._prefixed = sp.encode("a", out_type=str)[0].startswith(SPACE)
        breaks = ["\n", "\n", "\t"]
        self.as_trained_here = not self._prefixed and sp.encode("\n\n\t", out_type=str) == breaks
        self._space_ids = (
            [byte_ids[byte] for byte in SPACE.encode()] if len(byte_ids) == 256 else []
        )
        # A special piece that the model would find inside a text is cut after its first character.
        found = [
            pieces[index]
            for index in roles.values()
            if index < len(pieces) and index in sp.encode(pieces[index])
        ]
        self._cuts = re.compile(
            "|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in found)
        )

    def _encode(self, texts: list[str], threads: int) -> list[list[int]]:
        units_of = [self._units(text) for text in texts]
        encoded = iter(self._sp.encode(list(chain.from_iterable(units_of)), num_threads=threads))
        results = []
        for units in units_of:
            ids: list[int] = []
            for unit in units:
                unit_ids = next(encoded)
                ids += self._space_ids if unit == SPACE and self.as_trained_here else unit_ids
            results.append(ids)
        return results

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        text = super().decode(ids, skip_special)
        return text.removeprefix(" ") if self._prefixed else text

    def _units(self, text: str) -> list[str]:
        """Split a text into parts to encode one by one.

        For a model trained here no piece reaches over a cut, so the ids stay those of the whole.
        """
        if not self.as_trained_here:
            return self._cuts.split(text) if self._cuts.pattern else [text]
        units: list[str] = []
        for line in re.findall(f"{SPACE}|[^\n{SPACE}]*\n|[^\n{SPACE}]+", text):
            units += [line] if len(line) <= UNIT_CHARACTERS else split_line(line)
        return units


def split_line(line: str) -> Iterator[str]:
    """Yield parts of at most UNIT_CHARACTERS.

    A cut falls before a space if there is one, because no piece reaches over that.
    """
    start = 0
    while len(line) - start > UNIT_CHARACTERS:
        cut = line.rfind(" ", start + 1, start + UNIT_CHARACTERS + 1)
        while cut > start and line[cut - 1] == " ":
            cut -= 1
        cut = cut if cut > start else start + UNIT_CHARACTERS
        yield line[start:cut]
        start = cut
    yield line[start:]
