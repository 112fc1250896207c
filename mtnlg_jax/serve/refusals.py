"""The one way in which the server says no: OpenAI's error shape, with the way out in the text."""

from collections.abc import Mapping
from typing import Any

RETRY = "Retry-After"


class Refused(Exception):
    """A request that is answered with an error.

    ``param``: the field at fault, if it is one. ``kind``: OpenAI's type of the error.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.kind = kind
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def later(message: str, seconds: float, *, status: int = 503, kind: str = "unavailable") -> Refused:
    """Return a refusal that passes by itself, with Retry-After in whole seconds, at least 1."""
    return Refused(
        message, status=status, kind=kind, headers={RETRY: str(max(1, round(seconds + 0.5)))}
    )


def not_found(message: str, code: str | None = None, param: str | None = None) -> Refused:
    return Refused(message, param, status=404, kind="not_found_error", code=code)
