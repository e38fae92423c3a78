"""Nobody in without a key (S3), over a wire that others cannot read (S4), into what others hold (S8)."""

from __future__ import annotations

import re
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from front_server import ACME, ADMIN, MODEL, OTHER, Front, bearer
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from served import COMMAND, serving
from tiny import tiny_llama

from trilithon_server.auth import PUBLIC_PATHS, Keyring, KeysError
from trilithon_server.grpc.server import REFLECTION_V1, SERVICES
from trilithon_server.http.app import ROUTES


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_S3_every_route_wants_a_key(front: Front, route: Any) -> None:
    """
    Without a key every route but the public list is 401; an admin route is 403 for a user's key.

    Inverse check: `access="public"` on one route makes its case fail, and the import of `http.app` as well.
    """
    path = re.sub(r"{\w+}", "x", route.path)

    nobody = front.http.request(route.method, path)
    stranger = front.http.request(route.method, path, headers=bearer("sk-unknown"))

    if route.path in PUBLIC_PATHS:
        assert nobody.status_code == 200
        return
    for answer in (nobody, stranger):
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.json()["error"]["code"] == "invalid_api_key"
    if route.access == "admin":
        user = front.http.request(route.method, path, headers=bearer(ACME))
        assert (user.status_code, user.json()["error"]["code"]) == (403, "admin_scope_required")


def all_methods() -> list[tuple[str, str]]:
    pool = descriptor_pool.Default()
    named = [
        (f"/{service}/{method.name}", service)
        for service in SERVICES
        for method in pool.FindServiceByName(service).methods
    ]
    reflections = ("grpc.reflection.v1alpha.ServerReflection", REFLECTION_V1)
    return [*named, *((f"/{name}/ServerReflectionInfo", name) for name in reflections)]


@pytest.mark.parametrize("method", all_methods(), ids=lambda pair: pair[0])
def test_S3_every_rpc_wants_a_key(front: Front, method: tuple[str, str]) -> None:
    """Without a key every RPC but health is UNAUTHENTICATED, reflection included; admin ones need the admin scope."""
    path, service = method

    def status(*metadata: tuple[str, str]) -> grpc.StatusCode:
        call = front.channel.stream_stream(path, lambda b: b, lambda b: b)
        try:
            list(call(iter([b""]), metadata=metadata, timeout=20))
        except grpc.RpcError as error:
            return error.code()  # type: ignore[no-any-return, attr-defined]  # the stubs do not say so
        return grpc.StatusCode.OK

    assert status() == grpc.StatusCode.UNAUTHENTICATED
    assert status(("authorization", "Bearer sk-unknown")) == grpc.StatusCode.UNAUTHENTICATED
    assert status(("x-api-key", ACME)) != grpc.StatusCode.UNAUTHENTICATED
    if service.endswith("AdminService"):
        assert status(("authorization", f"Bearer {ACME}")) == grpc.StatusCode.PERMISSION_DENIED


def test_R3_health_is_public_and_names_every_service(front: Front) -> None:
    """`grpc.health.v1` answers Check and Watch without a key, for the server and for each service."""
    stub = health_pb2_grpc.HealthStub(front.channel)
    serving_now = health_pb2.HealthCheckResponse.SERVING

    # It follows readiness by up to a quarter of a second: Watch tells when.
    watches = [stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=30) for name in ("", *SERVICES)]
    for watch in watches:
        assert any(answer.status == serving_now for answer in watch)
        watch.cancel()
    for name in ("", *SERVICES):
        assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == serving_now


def test_reflection_lists_the_services(front: Front) -> None:
    """With a key, reflection names every service and gives the files that define them."""
    stub = reflection_pb2_grpc.ServerReflectionStub(front.channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    files = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICES[0])

    metadata = (("x-api-key", ACME),)
    v1 = front.channel.stream_stream(
        f"/{REFLECTION_V1}/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )

    listed, file = list(stub.ServerReflectionInfo(iter([ask, files]), metadata=metadata))
    (listed_by_v1,) = list(v1(iter([ask]), metadata=metadata))

    assert listed_by_v1 == listed
    assert {item.name for item in listed.list_services_response.service} >= set(SERVICES)
    assert file.file_descriptor_response.file_descriptor_proto


def test_S3_keys_are_hashed_and_never_logged(front: Front) -> None:
    """The keyring holds digests alone, the log holds no key, and a hashed key in the file works like the key."""
    front.generate(prompt="x", max_tokens=1)

    for key in (ACME, OTHER, ADMIN):
        assert key not in front.server.output()
    ring = Keyring.parse("sha256:2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90 tenant=t")
    assert ring.authenticate("Bearer alice").tenant == "t"
    assert "alice" not in repr(vars(ring))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("sha256:12 tenant=a", "64 hexadecimal digits"),
        ("k tenant=a b", "is not an option"),
        ("k scope=admin", 'Did you mean "scopes"'),
        ("k scopes=root", "must be user, admin or user+admin"),
        ("k priority=99", "from -10 to 10"),
        ("k tenant=a\nk tenant=b", "repeats a key"),
    ],
)
def test_R11_keys_file_mistakes_name_the_line(text: str, part: str) -> None:
    """A bad line is named with its number and what is allowed; the key itself is not repeated."""
    with pytest.raises(KeysError, match=r"keys:\d+ .*") as caught:
        Keyring.parse(text)

    assert part in str(caught.value)


def test_S3_a_keys_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """Mode 0600 is checked; the message says how to set it."""
    path = tmp_path / "keys"
    path.write_text("k")
    path.chmod(0o644)

    with pytest.raises(KeysError, match="chmod 600"):
        Keyring.load(path, None)


def test_S8_another_key_misses_the_prefix_cache(front: Front) -> None:
    """
    The same prompt hits under its own key and misses under another tenant's, and under another salt.

    Inverse check: a salt without the tenant makes the second key hit.
    """
    prompt = "A prompt that is longer than one block of the cache, so that its beginning can be found again. " * 2

    def cached(key: str, **more: Any) -> int:
        return int(front.generate(key, prompt=prompt, max_tokens=1, **more)["usage"]["cached_tokens"])

    assert cached(ACME) == 0
    assert cached(ACME) > 0
    assert cached(OTHER) == 0
    assert cached(ACME, cache_salt="mine") == 0
    assert cached(ACME, bypass_cache=True) == 0


def certificate(folder: Path, name: str, *, signer: str | None = None) -> tuple[Path, Path]:
    """A key and a certificate for 127.0.0.1, signed by `signer` or by itself."""
    key, cert = folder / f"{name}.key", folder / f"{name}.pem"
    signed = ["-CA", str(folder / f"{signer}.pem"), "-CAkey", str(folder / f"{signer}.key")] if signer else []
    constraint = "critical,CA:FALSE" if signer else "critical,CA:TRUE"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-keyout", str(key), "-out", str(cert), "-subj", f"/CN={name}", *signed,
         "-addext", "subjectAltName=IP:127.0.0.1", "-addext", f"basicConstraints={constraint}"],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, cert


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A server with mutual TLS, and the folder with everybody's certificates."""
    folder = tmp_path_factory.mktemp("tls")
    certificate(folder, "authority")
    key, cert = certificate(folder, "server", signer="authority")
    certificate(folder, "client", signer="authority")
    certificate(folder, "stranger")
    flags = ["--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(folder / "authority.pem")]
    with serving(tiny_llama(folder / MODEL), *flags, wait=False) as server:
        with httpx.Client(verify=tls_context(folder, "client")) as friend:
            _eventually(lambda: friend.get(f"https://127.0.0.1:{server.http_port}/livez"))
        yield server, folder


def tls_context(folder: Path, who: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(folder / "authority.pem"))
    if who is not None:
        context.load_cert_chain(folder / f"{who}.pem", folder / f"{who}.key")
    return context


def test_S4_mutual_tls_over_http(mutual: tuple[Any, Path]) -> None:
    """Only a client whose certificate the authority signed is answered; plain HTTP is not."""
    server, folder = mutual
    url = f"https://127.0.0.1:{server.http_port}/livez"

    with httpx.Client(verify=tls_context(folder, "client")) as friend:
        assert friend.get(url).status_code == 200
    for who in (None, "stranger"):
        with httpx.Client(verify=tls_context(folder, who)) as other, pytest.raises(httpx.TransportError):
            other.get(url)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{server.http_port}/livez")


def test_S4_mutual_tls_over_grpc(mutual: tuple[Any, Path]) -> None:
    """The same over gRPC."""
    server, folder = mutual
    roots = (folder / "authority.pem").read_bytes()

    def check(who: str | None) -> Any:
        pair = [(folder / f"{who}.{kind}").read_bytes() for kind in ("key", "pem")] if who else [None, None]
        credentials = grpc.ssl_channel_credentials(roots, *pair)
        with grpc.secure_channel(f"127.0.0.1:{server.grpc_port}", credentials) as channel:
            return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)

    assert check("client").status in (1, 2)
    for who in (None, "stranger"):
        with pytest.raises(grpc.RpcError) as refused:
            check(who)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]  # the stubs do not say so


def _eventually(ask: Any) -> Any:
    """The listener is there before the engine, and a moment after the process."""
    for _ in range(600):
        try:
            return ask()
        except httpx.ConnectError:
            subprocess.run(["sleep", "0.1"], check=True)
    raise AssertionError("nobody listens")


def test_S4_another_address_without_a_key_is_refused(tmp_path: Path) -> None:
    """Binding elsewhere than loopback without a key is refused before anything listens, and the way out is named."""
    model = tiny_llama(tmp_path / MODEL)

    run = subprocess.run(
        [*COMMAND, "serve", str(model), "--host", "0.0.0.0"], capture_output=True, text=True, timeout=60
    )

    assert run.returncode == 2
    assert "--insecure" in run.stderr + run.stdout
