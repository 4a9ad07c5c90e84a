"""From a URI to pyarrow's file system, with timeouts, and without secrets in any message."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from ftrain.checkpoint.remote.protocol.limits import Limits
from ftrain.checkpoint.remote.trouble import explained
from ftrain.comms.errors import ConfigError

_EXAMPLES = "s3://bucket/prefix, gs://bucket/prefix, hdfs://host:port/path or file:///path"
_S3_OPTIONS = frozenset({"endpoint_override", "scheme", "region", "tls_ca_file_path"})
_BUCKETS = frozenset({"s3", "gs", "gcs"})
_SCHEMES = _BUCKETS | {"hdfs", "viewfs", "file"}
_USER_OF_URI = re.compile(r"(?<=://).*@", re.DOTALL)
_SDK_ATTEMPTS = 3  # of one request; the whole operation is tried again as well


@dataclass(frozen=True, slots=True)
class Filesystem:
    """An opened file system, and where in it the URI points."""

    fs: Any  # pyarrow.fs.FileSystem
    root: str  # path of the URI in it, without a slash at the end
    is_bucket: bool  # an object appears complete or not at all; there are no folders


def place_name(uri: str) -> str:
    """The URI for messages and records: no user, password or option in it.

    Raises:
        ConfigError: no URI of a kind that is known.
    """
    try:
        parts = urlsplit(uri)
        _ = parts.port  # ValueError if it is none
    except ValueError:
        parts = urlsplit("")._replace(path=uri)
    if parts.scheme not in _SCHEMES:
        given = _USER_OF_URI.sub("", uri).partition("?")[0]
        encode = " with %2F for each / in a secret" if "@" in parts.path else ""
        raise ConfigError(
            f"'{given}' is no place for checkpoints: write a URI such as {_EXAMPLES}{encode}"
        )
    if not (parts.hostname or parts.scheme in {"file", "hdfs"}):
        raise ConfigError(f"{parts.scheme}:// without a bucket: write {_EXAMPLES}")
    if parts.scheme == "file" and not parts.path.strip("/"):
        raise ConfigError("file:// without a path: write file:///path")
    host = parts.netloc.rpartition("@")[2]
    if parts.scheme == "file" and host:
        raise ConfigError(f"file://{host} would be a host: write file:/// and the absolute path")
    if parts.scheme in _BUCKETS and ":" in host:  # it may be a secret, cut off at its slash
        raise ConfigError(
            f"a {parts.scheme}:// URI with a colon in the bucket's name: write the server's address"
            " as ?endpoint_override=host:port, and a slash in a secret as %2F"
        )
    return urlunsplit((parts.scheme, host, unquote(parts.path).rstrip("/"), "", ""))


def open_filesystem(uri: str, limits: Limits) -> Filesystem:
    """The file system that a URI names; nothing is asked of it yet.

    Raises:
        ConfigError: the URI or one of its options is wrong.
        ObjectStoreError: it can't be used from here.
    """
    name = place_name(uri)
    scheme = urlsplit(uri).scheme
    with explained(name):
        if scheme == "s3":
            return _s3(uri, limits)
        from pyarrow import ArrowInvalid, fs

        if scheme in {"gs", "gcs"}:
            uri = _with_option(uri, "retry_limit_seconds", str(limits.request_timeout_s))
        try:
            filesystem, root = fs.FileSystem.from_uri(uri)
        except ArrowInvalid as error:
            why = str(error).replace(uri, name)
            raise ConfigError(f"{name} is no URI that can be used: {why}") from None
        return Filesystem(filesystem, root.rstrip("/"), scheme in {"gs", "gcs"})


def _s3(uri: str, limits: Limits) -> Filesystem:
    """pyarrow's own reading of such a URI can't set timeouts."""
    from pyarrow import fs

    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query))
    unknown = sorted(options.keys() - _S3_OPTIONS)
    if unknown:
        known = ", ".join(sorted(_S3_OPTIONS))
        raise ConfigError(f"{place_name(uri)}: no option is called {unknown[0]}, use {known}")
    if parts.username and parts.password:
        options["access_key"] = unquote(parts.username)
        options["secret_key"] = unquote(parts.password)
    filesystem = fs.S3FileSystem(
        **options,
        connect_timeout=limits.connect_timeout_s,
        request_timeout=limits.request_timeout_s,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_SDK_ATTEMPTS),
        background_writes=False,  # else as much is kept in memory as the network is slower
        allow_delayed_open=True,  # what is small is one request
    )
    bucket = parts.netloc.rpartition("@")[2]
    return Filesystem(filesystem, (bucket + unquote(parts.path)).rstrip("/"), is_bucket=True)


def _with_option(uri: str, name: str, value: str) -> str:
    parts = urlsplit(uri)
    if name in dict(parse_qsl(parts.query)):
        return uri
    query = "&".join(filter(None, (parts.query, f"{name}={value}")))
    return urlunsplit(parts._replace(query=query))
