"""Text of a given form: a JSON schema, a regular expression or a grammar, by llguidance.

A grammar is compiled once, before anything is written. `Grammar.row` gives the state of one row
that is checked on the host. `Grammar.rows` gives the ``constraint`` of `generate`, also for beams
and look-up speculation, where rows are copied and guesses are taken back.
"""

# Shapes: B rows, S positions, V vocabulary

import collections
import json
import threading
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

KINDS = ("json_schema", "regex", "grammar")
MOST_CHARACTERS = 1 << 16
_KEPT = 32  # compiled grammars
_STATES = 512  # states of rows that `Grammar.rows` keeps
# Values of these keywords are names with schemas behind them, not keywords.
_NAMED = ("properties", "$defs", "definitions", "dependentSchemas")
# Values of these are data.
_DATA = ("enum", "const", "default", "examples")


class Grammars:
    """Compile grammars for one tokenizer. Safe to call from several threads."""

    def __init__(self, tokenizer, vocabulary: int, ends: Iterable[int] = ()):
        """Read the vocabulary, which takes some tenths of a second.

        Args:
          vocabulary: the width of the model's logits.
          ends: further ids that may end a text, such as those of a chat template.

        Raises ValueError if llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError:
            raise ValueError(
                "grammars and JSON schemas need the package llguidance; install mtnlg_jax[grammar]"
            ) from None
        self._library = llguidance
        self._vocabulary = vocabulary
        size = min(tokenizer.vocab_size, vocabulary)
        self.ends = tuple(
            dict.fromkeys(each for each in (*tokenizer.eos_ids, *ends) if 0 <= each < size)
        )
        # llguidance wants an end. One that the model cannot write leaves nothing to write.
        self._size = size + (not self.ends)
        wrapped = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, size, self.ends))
        self._tokens = llguidance.LLTokenizer(
            wrapped, n_vocab=self._size, eos_token=list(self.ends or (size,))
        )
        self._made: collections.OrderedDict[tuple[str, str], Grammar] = collections.OrderedDict()
        self._lock = threading.Lock()

    def compile(self, kind: str, source: Any) -> "Grammar":
        """Return a grammar.

        Args:
          kind: one of KINDS.
          source: a JSON schema (an object or its text), a regular expression of the whole text, or
            a grammar in Lark's notation (llguidance's) or llama.cpp's GBNF.

        Raises ValueError with the library's words if it cannot be compiled, and if no text has
        that form.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r} of grammar; choose from {', '.join(KINDS)}")
        text = source if isinstance(source, str) else json.dumps(source)
        if len(text) > MOST_CHARACTERS:
            raise ValueError(
                f"the {kind} has {len(text)} characters, and {MOST_CHARACTERS} are the most; "
                "write a smaller one"
            )
        with self._lock:
            if (kind, text) in self._made:
                self._made.move_to_end((kind, text))
                return self._made[kind, text]
        matcher = self._matcher(kind, text)
        made = Grammar(matcher, self._size, self._vocabulary, self.ends)
        if not made.row().allowed().any() and not matcher.is_accepting():
            raise ValueError(
                f"no text has the form of the {kind}, so nothing could be written; correct it"
            )
        with self._lock:
            self._made[kind, text] = made
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
        return made

    def _matcher(self, kind: str, text: str):
        library = self._library
        try:
            if kind == "json_schema":
                schema = json.loads(text)
                _check_schema(schema)
                source = library.LLMatcher.grammar_from_json_schema(text)
            elif kind == "regex":
                source = library.LLMatcher.grammar_from_regex(text)
            else:
                # GBNF writes root ::= ..., Lark start: ...
                lark = library.gbnf_to_lark.any_to_lark(text) if "::=" in text else text
                source = library.LLMatcher.grammar_from_lark(lark)
            matcher = library.LLMatcher(self._tokens, source, log_level=0)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the {kind} cannot be used: {_line(error)}; correct it") from None
        if matcher.is_error():
            raise ValueError(f"the {kind} cannot be used: {_line(matcher.get_error())}; correct it")
        return matcher


class Grammar:
    """A compiled grammar."""

    def __init__(self, matcher, size: int, vocabulary: int, ends: tuple[int, ...]):
        self._start = matcher
        self._size = size
        self._vocabulary = vocabulary
        self._ends = ends

    def row(self) -> "GrammarRow":
        """Return the state of a new row, a `decode.constraint.Constraint`."""
        return GrammarRow(self._start.deep_copy(), self._size, self._vocabulary, self._ends)

    def rows(self) -> Callable:
        """Return the ``constraint`` of `generate`: (tokens_BS, lengths_B, prompts_B) -> (B, V).

        The state of a row follows from its tokens, so rows may be copied, dropped and taken back.
        """
        return SwitchedGrammar().of(self)

    def look(self) -> Callable[..., np.ndarray]:
        """Return `rows` as a function of arrays on the host."""
        states: collections.OrderedDict[tuple[int, ...], GrammarRow] = collections.OrderedDict()
        states[()] = self.row()

        def after(written: tuple[int, ...]) -> GrammarRow:
            if written not in states:
                # The parent is nearly always known: rows grow by one token.
                known = next(n for n in range(len(written), -1, -1) if written[:n] in states)
                state = states[written[:known]].copy()
                for token in written[known:]:
                    state.accept(token)
                states[written] = state
                if len(states) > _STATES:
                    oldest = next(key for key in states if key)
                    del states[oldest]
            return states[written]

        def look(tokens_BS, lengths_B, prompts_B):
            pairs = zip(np.asarray(tokens_BS), prompts_B.tolist(), lengths_B.tolist(), strict=True)
            rows = [after(tuple(row[start:stop].tolist())) for row, start, stop in pairs]
            return np.stack([row.allowed() for row in rows])

        return look

    @property
    def vocabulary(self) -> int:
        """The width of the model's logits."""
        return self._vocabulary


class SwitchedGrammar:
    """The ``constraint`` of `generate` for one grammar after another.

    A constraint is a static argument: each new function compiles the steps again and keeps them.
    This one stays the same function, so a server compiles for the first grammar alone.
    """

    def __init__(self):
        self._look: Callable[..., np.ndarray] | None = None
        self._vocabulary = 0

    def of(self, grammar: Grammar) -> Callable:
        """Return the constraint, which asks ``grammar`` until the next call of this method."""
        self._look = grammar.look()
        self._vocabulary = grammar.vocabulary
        return self._constrain

    def _constrain(self, tokens_BS, lengths_B, prompts_B):
        shape = jax.ShapeDtypeStruct((tokens_BS.shape[0], self._vocabulary), bool)
        return jax.pure_callback(self._ask, shape, tokens_BS, lengths_B, prompts_B)

    def _ask(self, tokens_BS, lengths_B, prompts_B) -> np.ndarray:
        assert self._look is not None
        return self._look(tokens_BS, lengths_B, prompts_B)


class GrammarRow:
    """The state of one row under a grammar."""

    def __init__(self, matcher, size: int, vocabulary: int, ends: tuple[int, ...]):
        self._matcher = matcher
        self._size = size
        self._vocabulary = vocabulary
        self._ends = ends
        self._words = np.zeros((size + 31) // 32, np.int32)
        self._over = False

    def copy(self) -> "GrammarRow":
        other = GrammarRow(self._matcher.deep_copy(), self._size, self._vocabulary, self._ends)
        other._over = self._over
        return other

    def allowed(self) -> np.ndarray:
        """Return which ids may come next, bool (V,); an end only where the text is complete."""
        allowed_V = np.zeros(self._vocabulary, bool)
        if self._over or self._matcher.is_stopped():
            # Complete, or off the grammar after an end: only an end is left.
            allowed_V[list(self._ends)] = True
            return allowed_V
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._matcher.is_error():
            raise ValueError(
                f"the grammar gave up: {_line(self._matcher.get_error())}; write a simpler one"
            )
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")
        width = min(self._size, self._vocabulary)
        allowed_V[:width] = bits[:width]
        return allowed_V

    def accept(self, token: int) -> None:
        """Note that ``token`` was written."""
        if self._over or self._matcher.is_stopped() or token in self._ends:
            self._over = True
        elif not self._matcher.consume_token(token):
            # A guess that will be rejected, or padding of a row that has ended.
            self._over = True


class _Vocabulary:
    """A tokenizer as llguidance reads it."""

    def __init__(self, tokenizer, size: int, ends: tuple[int, ...]):
        self._tokenizer = tokenizer
        self.eos_token_id = ends[0] if ends else size
        self.bos_token_id = None
        # Names of their own for tokens without text: \xff begins no UTF-8.
        self.tokens = [
            b"\xff<%d>" % index
            if tokenizer.is_special[index] or not tokenizer.token_bytes(index)
            else tokenizer.token_bytes(index)
            for index in range(size)
        ]
        if not ends:
            self.tokens.append(b"\xff<end>")
        special = [index for index in range(size) if tokenizer.is_special[index]]
        self.special_token_ids = special + ([] if ends else [size])

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode(text)


def _check_schema(schema: Any) -> None:
    """Raise ValueError on what llguidance reads and gets wrong."""
    if isinstance(schema, list):
        for each in schema:
            _check_schema(each)
    if not isinstance(schema, dict):
        return
    if "patternProperties" in schema:
        raise ValueError("patternProperties is not supported; name the properties")
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            for each in value.values():
                _check_schema(each)
        elif key not in _DATA:
            _check_schema(value)


def _line(error: object) -> str:
    """Return a message as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
