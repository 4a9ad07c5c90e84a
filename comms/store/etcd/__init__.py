"""The coordinator's store in etcd, version 3.4 or newer.

grpc has threads of its own as soon as it is used, so importing this imports none of it, and a
process that forks ranks must not open such a store.
"""

from __future__ import annotations

from ftrain.comms.environment import quiet_grpc
from ftrain.comms.errors import UsageError
from ftrain.comms.store.base import CoordinatorStore
from ftrain.comms.store.etcd.options import EtcdOptions


def open_etcd(options: EtcdOptions) -> CoordinatorStore:
    """The store that ``options`` name; nothing is asked of it yet.

    Raises:
        UsageError: what it takes is not installed.
        ConfigError: a certificate or key can't be read.
    """
    try:
        with quiet_grpc():
            from ftrain.comms.store.etcd.store import EtcdStore
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"grpc", "google"}:
            raise
        raise UsageError(
            f"to keep the coordinator's state in etcd takes the module {error.name}: pip install"
            " ftrain[etcd]"
        ) from None
    return EtcdStore(options)
