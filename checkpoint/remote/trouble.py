"""What goes wrong with an object store: in one sentence, of a type, and tried again."""

from __future__ import annotations

import errno
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ftrain.checkpoint.remote.protocol.limits import Limits
from ftrain.comms.errors import (
    FtrainError,
    ObjectStoreError,
    StoreFullError,
    StoreMissingError,
    StoreRefusedError,
    StoreUnreachableError,
)

_T = TypeVar("_T")
_DETAIL_CHARACTERS_MAX = 200
_NEEDS_CHECKSUM_OFF = re.compile(r"HTTP status 411|MISSING_CONTENT_LENGTH|MissingContentLength")
_SDK_ERROR = re.compile(r"AWS Error (?P<what>.*)", re.DOTALL)

# By what pyarrow's messages contain: it raises OSError for nearly everything.  In this order.
_MISSING = re.compile(
    r"NO_SUCH_BUCKET|NoSuchBucket|INVALID_BUCKET_NAME|bucket does not exist", re.I
)
_FULL = re.compile(
    r"quota|InsufficientStorage|INSUFFICIENT_STORAGE|StorageFull|HTTP status 507|No space left",
    re.I,
)
_REFUSED = re.compile(
    r"ACCESS_DENIED|SIGNATURE_DOES_NOT_MATCH|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN"
    r"|UNRECOGNIZED_CLIENT|INVALID_SIGNATURE|MISSING_AUTHENTICATION|NOT_INITIALIZED"
    r"|EXPIRED|TIME_TOO_SKEWED|INVALID_TOKEN|HTTP status 40[13]|PERMISSION_DENIED|UNAUTHENTICATED"
    r"|AccessControlException|Could not create a OAuth2 access token"
    r"|UnsupportedAlgorithm"  # what rclone's server says to a request without a signature
)
_UNREACHABLE = re.compile(
    r"NETWORK_CONNECTION|curlCode|REQUEST_TIMEOUT|timed out|Connection refused|ConnectException"
    r"|could ?n.t connect|UNAVAILABLE|UnknownHostException",
    re.I,
)
_BUSY = re.compile(
    r"SLOW_DOWN|THROTTL|INTERNAL_FAILURE|INTERNAL_ERROR|SERVICE_UNAVAILABLE|HTTP status 5\d\d", re.I
)
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
}
_PLAIN_HTTP = "wrong version number"  # what TLS says when the answer is none of its own
_NO_HADOOP = re.compile(r"Unable to load lib(jvm|hdfs)")
_FULL_NUMBERS = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSED_NUMBERS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn what pyarrow says into an :class:`ObjectStoreError` of the right kind."""
    from pyarrow import ArrowException

    try:
        yield
    except FtrainError:
        raise
    except (OSError, ArrowException) as error:
        raise sentence(place, error) from error


def sentence(place: str, error: BaseException) -> ObjectStoreError:
    """What ``error`` means and what to do; ``place`` is the URI without anything secret."""
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    detail = _detail(error)
    if _MISSING.search(text):
        return StoreMissingError(
            f"the bucket of {place} does not exist ({detail}): make it, or correct the URI"
        )
    if number in _FULL_NUMBERS or _FULL.search(text):
        return StoreFullError(f"{place} is full ({detail}): make room there, or raise its quota")
    if number in _REFUSED_NUMBERS or _REFUSED.search(text):
        return StoreRefusedError(f"{place} refuses access ({detail}): {_give_access(place)}")
    if _UNREACHABLE.search(text):
        advice = "look at the network, and at the URI's endpoint"
        if _PLAIN_HTTP in text:
            advice = "if it has no TLS, write scheme=http into the URI"
        return StoreUnreachableError(f"{place} can't be reached ({detail}): {advice}")
    if _BUSY.search(text):
        return StoreUnreachableError(f"{place} can't serve now ({detail}): try again later")
    advice = "look at the store and at the URI"
    if _NEEDS_CHECKSUM_OFF.search(text):
        advice = "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required for it"
    elif _NO_HADOOP.search(text):
        advice = "install Java and Hadoop's libhdfs, and set JAVA_HOME, HADOOP_HOME and CLASSPATH"
    return ObjectStoreError(f"{place} can't be used ({detail}): {advice}")


def _give_access(place: str) -> str:
    """What to do when it is refused."""
    scheme = place.partition(":")[0]
    if scheme == "file":
        return "whoever runs this has to be allowed to list, read, write and delete there"
    where = f" ({_CREDENTIALS[scheme]})" if scheme in _CREDENTIALS else ""
    return (
        "give credentials that may list, read, write and delete there, where the store's own tools "
        f"look for them{where}"
    )


def _detail(error: BaseException) -> str:
    """The telling part of a message, in one line."""
    text = str(error)
    sdk = _SDK_ERROR.search(text)
    if sdk:
        text = sdk["what"]
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    lines = text.strip().splitlines() or [type(error).__name__]
    return lines[0][:_DETAIL_CHARACTERS_MAX].rstrip(" .")


class Retrying:
    """Does operations again that failed for a reason that may pass; each failure is told.

    Thread-safe.  The pauses are drawn, so that nodes that fail together do not come back together.
    """

    def __init__(self, limits: Limits, tell: Callable[[str], None]) -> None:
        self._limits = limits
        self._tell = tell
        self._random = random.Random()
        self._never = threading.Event()

    def run(self, what: str, action: Callable[[], _T]) -> _T:
        """What ``action`` returns; ``what`` it does, as in "reading x".

        Raises:
            ObjectStoreError: of the last attempt.
        """
        attempts = self._limits.attempts
        for attempt in range(1, attempts + 1):
            try:
                return action()
            except ObjectStoreError as error:
                if attempt == attempts or not error.transient:
                    raise
                pause_s = self._pause_s(attempt)
                self._tell(
                    f"{what} failed, attempt {attempt} of {attempts}, again in {pause_s:.1f} s: "
                    f"{error}"
                )
            self._never.wait(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def _pause_s(self, attempt: int) -> float:
        limits = self._limits
        longest = min(limits.pause_s_max, limits.pause_s * 2.0 ** (attempt - 1))
        return longest * (0.5 + self._random.random() / 2)
