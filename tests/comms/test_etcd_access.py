"""TLS and authentication: who may, who may not, and the sentences for it."""

from __future__ import annotations

import base64
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from etcd_server import EtcdNode
from store_samples import Heard, won

from ftrain.comms.errors import ConfigError, StoreRefusedError, StoreUnreachableError
from ftrain.comms.store.base import Leader
from ftrain.comms.store.etcd import EtcdOptions, open_etcd
from ftrain.comms.store.etcd.client import EtcdClient
from ftrain.comms.store.etcd.messages import AUTHENTICATE

pytestmark = pytest.mark.slow

USER, PASSWORD = "ftrain", "not-much-of-a-secret"
ROOT_PASSWORD = "none-either"
PREFIX = "/ftrain/job"


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def authority(folder: Path, name: str) -> None:
    """``name.pem`` vouches for what it signs with ``name.key``."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    names = ("-keyout", f"{name}.key", "-out", f"{name}.pem")
    openssl(folder, "req", "-x509", *key, *names, "-days", "2", "-subj", f"/CN={name}")


def certificate(folder: Path, name: str, by: str, alternative: str = "") -> None:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    names = ("-keyout", f"{name}.key", "-out", f"{name}.csr")
    openssl(folder, "req", *key, *names, "-subj", f"/CN={name}")
    (folder / "ext").write_text(f"subjectAltName={alternative or 'DNS:' + name}\n")
    signed = ("-CA", f"{by}.pem", "-CAkey", f"{by}.key", "-CAcreateserial", "-extfile", "ext")
    openssl(
        folder, "x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", "-days", "2", *signed
    )


@dataclass
class Secured:
    """A node that asks for certificates and passwords."""

    node: EtcdNode
    folder: Path
    context: ssl.SSLContext

    def options(self, **other: Any) -> EtcdOptions:
        """Those that let a client in, but for ``other``."""
        right = {
            "endpoints": (self.node.endpoint,),
            "prefix": PREFIX,
            "lease_s": 2,
            "ca": str(self.folder / "ca.pem"),
            "certificate": str(self.folder / "client.pem"),
            "key": str(self.folder / "client.key"),
            "user": USER,
            "password": PASSWORD,
        }
        return EtcdOptions(**(right | other))

    def launch(self) -> None:
        self.node.launch(f"{self.node.name}={self.node.peer}")

    def ask(self, path: str, **body: object) -> Any:
        return self.node.ask(path, self.context, **body)

    def add_user(self, name: str) -> None:
        """What an administrator may do at any time."""
        client = EtcdClient(self.options(user="root", password=ROOT_PASSWORD))
        request = AUTHENTICATE.request(name=name, password=PASSWORD)  # has the same two fields
        try:
            client.call(replace(AUTHENTICATE, path="/etcdserverpb.Auth/UserAdd"), request, 5.0)
        finally:
            client.close()


def _text(key: str) -> str:
    return base64.b64encode(key.encode()).decode()


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    authority(tmp_path, "ca")
    authority(tmp_path, "other-ca")
    certificate(tmp_path, "server", "ca", "IP:127.0.0.1")
    certificate(tmp_path, "client", "ca")
    certificate(tmp_path, "stranger", "other-ca")
    files = ("--cert-file", "server.pem", "--key-file", "server.key", "--trusted-ca-file", "ca.pem")
    options = [str(tmp_path / each) if "." in each else each for each in files]
    node = EtcdNode("n0", tmp_path, *options, "--client-cert-auth", scheme="https")
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    context.load_cert_chain(tmp_path / "client.pem", tmp_path / "client.key")
    found = Secured(node, tmp_path, context)
    try:
        found.launch()
        node.wait(context)
        found.ask("auth/user/add", name="root", password=ROOT_PASSWORD)
        found.ask("auth/user/grant", user="root", role="root")
        found.ask("auth/role/add", name="job")
        keys = {"key": _text(f"{PREFIX}/"), "range_end": _text(f"{PREFIX}0")}
        found.ask("auth/role/grant", name="job", perm={"permType": "READWRITE"} | keys)
        found.ask("auth/user/add", name=USER, password=PASSWORD)
        found.ask("auth/user/grant", user=USER, role="job")
        found.ask("auth/enable")
        yield found
    finally:
        node.kill()


def ask_once(options: EtcdOptions) -> None:
    store = open_etcd(options)
    try:
        store.leader(1.0)
    finally:
        store.close()


def test_a_term_with_certificates_and_passwords(secured: Secured) -> None:
    """Tokens end when the node starts again, and when an administrator changes something."""
    store, other = open_etcd(secured.options()), open_etcd(secured.options())
    try:
        heard = Heard()
        watch = other.watch_leader(heard)
        term = won(store, "a:1")
        term.save(b"1")
        heard.wait_for(Leader("a:1", term.number))
        secured.add_user("new")
        term.save(b"2")
        secured.node.kill()
        secured.launch()
        term.save(b"3")
        assert term.load() == b"3"
        time.sleep(3.0)  # longer than a lease: there is nothing to wait for when all is well
        assert term.assured_s() > 0
        assert not term.lost.is_set()
        term.resign()
        heard.wait_for(None)
        later = won(other, "b:1")
        heard.wait_for(Leader("b:1", later.number))
        assert watch.trouble is None
    finally:
        store.close()
        other.close()


def test_who_may_not_gets_a_sentence(secured: Secured) -> None:
    folder = secured.folder
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"password": "wrong"}, StoreRefusedError, "does not take the password of user 'ftrain'"),
        ({"user": "nobody"}, StoreRefusedError, "does not take the password of user 'nobody'"),
        ({"prefix": "/other"}, StoreRefusedError, "begins with /other/"),
        ({"ca": str(folder / "other-ca.pem")}, StoreRefusedError, "has a certificate that .*other"),
        (
            {
                "certificate": str(folder / "stranger.pem"),
                "key": str(folder / "stranger.key"),
            },
            StoreUnreachableError,
            "do not come to terms about TLS",
        ),
        (
            {"ca": "", "certificate": "", "key": ""},
            StoreUnreachableError,
            "did not answer within 1 s",
        ),
        ({"ca": str(folder / "missing.pem")}, ConfigError, "missing.pem can't be read"),
    ]
    for wrong, kind, said in cases:
        with pytest.raises(kind, match=said) as caught:
            ask_once(secured.options(**wrong))
        print(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_who_gives_no_name_is_the_one_of_the_certificate(secured: Secured) -> None:
    """etcd takes the certificate's common name for the user; there is none called so."""
    with pytest.raises(StoreRefusedError, match="does not let user"):
        ask_once(secured.options(user="", password=""))


def test_grpc_says_nothing_of_its_own(secured: Secured) -> None:
    """On the terminal, where its words would stand between those of the training."""
    code = (
        "import sys\n"
        "from ftrain.comms.store.etcd import EtcdOptions, open_etcd\n"
        "from ftrain.comms.errors import FtrainError\n"
        f"store = open_etcd(EtcdOptions(endpoints=({secured.node.endpoint!r},), prefix='x',"
        f" ca={str(secured.folder / 'other-ca.pem')!r}))\n"
        "try: store.leader(1.0)\n"
        "except FtrainError as error: print(type(error).__name__)\n"
        "store.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("StoreRefusedError\n", "")
