"""Every exception of proxy/, grouped by who must act. Each carries its own status hint and machine-readable code."""

from __future__ import annotations


class IbidError(Exception):
    """Root of the family. `code` is stable and machine-readable; the message, for people, never quotes a secret."""

    status = 500
    code = "internal_error"
    should_retry: bool | None = None  # sent as x-should-retry when not None
    retry_after_s: int | None = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        param: str | None = None,
        should_retry: bool | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status
        if should_retry is not None:
            self.should_retry = should_retry
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class BadRequest(IbidError):
    """The client must change the request."""

    status = 400
    code = "bad_request"
    should_retry = False


class Busy(IbidError):
    """ibid is full or stopping; the client may try again."""

    status = 503
    code = "overloaded"
    retry_after_s = 1


class UpstreamError(IbidError):
    """The model server could not be reached, broke off, or answered outside its protocol."""

    status = 502
    code = "upstream_unreachable"


class CacheFault(IbidError):
    """Ours: store, index or embedder. Turns a lookup into a bypass and never reaches the client."""

    code = "cache_fault"


class ConfigError(IbidError):
    """The operator must act; raised at start, exit code 2."""

    code = "config_error"


class NotYet(ConfigError):
    """What a start needs is not there or not free yet, and may come by itself: exit code 75, started again later."""

    code = "not_yet"
