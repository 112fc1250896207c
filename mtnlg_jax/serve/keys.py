"""API keys: read from a file or the environment, kept as hashes, each with limits of its own."""

import dataclasses
import hashlib
import hmac
import math
import os
import stat
import time
from collections.abc import Mapping

from mtnlg_jax.serve.refusals import Refused, later

VARIABLE = "MTNLG_API_KEYS"
SHORTEST = 16
_LIMITS = ("concurrent", "per_minute")


@dataclasses.dataclass
class Account:
    """Who calls, and what they may use at once. ``inf`` is no limit."""

    name: str
    concurrent: float = math.inf  # requests at the same time
    per_minute: float = math.inf  # requests that begin within a minute
    running: int = 0
    # A bucket of per_minute requests, which fills evenly.
    left: float = math.inf
    filled: float = 0.0

    def enter(self) -> None:
        """Count a request. Raise Refused (429) if it is one too many."""
        if self.running >= self.concurrent:
            raise later(
                f"{self.running} requests of this API key run, its limit; wait for one to end, or "
                "ask for a higher limit",
                1,
                status=429,
                kind="rate_limit_error",
            )
        if math.isfinite(self.per_minute):
            now = time.monotonic()
            gained = (now - self.filled) * self.per_minute / 60
            # A new bucket is full.
            self.left = min(self.per_minute, self.left + gained)
            self.filled = now
            if self.left < 1:
                raise later(
                    f"this API key may begin {self.per_minute:g} requests a minute; wait, or ask "
                    "for a higher limit",
                    (1 - self.left) * 60 / self.per_minute,
                    status=429,
                    kind="rate_limit_error",
                )
            self.left -= 1
        self.running += 1

    def leave(self) -> None:
        self.running -= 1


class Keys:
    """The accounts by the hash of their key; without any, everybody is one account."""

    def __init__(self, accounts: Mapping[bytes, Account] | None = None):
        self._accounts = dict(accounts or {})
        self._everybody = Account("")

    def __bool__(self) -> bool:
        return bool(self._accounts)

    def account(self, authorization: str | None) -> Account:
        """Return the account of a header ``Authorization: Bearer KEY``.

        Raises Refused (401) on a missing or unknown key. Every hash is compared, each in constant
        time, so that the time of an answer says nothing about a key.
        """
        if not self._accounts:
            return self._everybody
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for digest, account in self._accounts.items():
            if hmac.compare_digest(digest, given):
                found = account
        if found is None or scheme.lower() != "bearer":
            raise Refused(
                "the API key is missing or unknown; send the header Authorization: Bearer KEY",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found


def load_keys(path: str | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """Return the keys of a file, one a line, and of MTNLG_API_KEYS, separated by commas.

    A key may be followed by name=NAME, concurrent=N and per_minute=N; # begins a comment.

    Raises ValueError on a file that others may read, a short or repeated key and a limit that is
    not a positive number. No message shows a key.
    """
    entries = [
        (f"entry {number} of {VARIABLE}", entry)
        for number, entry in enumerate(environment.get(VARIABLE, "").split(","), 1)
        if entry.strip()
    ]
    if path is not None:
        mode = os.stat(path).st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ValueError(
                f"{path} has mode {stat.S_IMODE(mode):o}, so others may read or change the API "
                f"keys; run chmod 600 {path}"
            )
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
        found = [
            (f"line {number} of {path}", line)
            for number, line in enumerate(lines, 1)
            if line.split("#")[0].strip()
        ]
        if not found:
            raise ValueError(f"{path} holds no API key; write one a line, or leave it out")
        entries += found
    accounts: dict[bytes, Account] = {}
    for number, (where, entry) in enumerate(entries, 1):
        digest, account = _read(where, entry.split("#")[0].split(), f"key{number}")
        if digest in accounts:
            raise ValueError(f"{where} repeats an API key; keep one of them")
        accounts[digest] = account
    return Keys(accounts)


def _read(where: str, words: list[str], name: str) -> tuple[bytes, Account]:
    key, *rest = words
    if len(key) < SHORTEST:
        raise ValueError(
            f"{where} has an API key of {len(key)} characters, and {SHORTEST} are the fewest; make "
            "one, for example with openssl rand -hex 24"
        )
    account = Account(name)
    for word in rest:
        field, _, value = word.partition("=")
        if field == "name" and value:
            account.name = value
            continue
        number = float(value) if value.replace(".", "", 1).isdigit() else 0.0
        if field not in _LIMITS or number < 1:
            raise ValueError(
                f"{where} has {word!r} behind its key; write name=NAME, concurrent=N or "
                "per_minute=N with N of at least 1"
            )
        setattr(account, field, number)
    return hashlib.sha256(key.encode()).digest(), account
