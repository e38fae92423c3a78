"""From a server's URL to what a transport needs."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from trilithon._transport import Settings
from trilithon.errors import InvalidArgument, Violation

SCHEMES = ("http", "https", "grpc", "grpcs", "http+unix", "grpc+unix")
_DEFAULT_PORTS = {"http": 80, "https": 443, "grpc": 8001, "grpcs": 8001}


def settings_for(
    url: str,
    *,
    api_key: str | None = None,
    tls_ca: str | None = None,
    tls_cert: str | None = None,
    tls_key: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Settings:
    """
    Read a server's address.

    >>> settings_for("grpc://127.0.0.1:8001").target
    '127.0.0.1:8001'
    >>> settings_for("http+unix:///run/trilithon.sock").uds
    '/run/trilithon.sock'

    Raises:
        InvalidArgument: the URL has another scheme, lacks a host or a path, or carries what belongs elsewhere.
    """
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    if scheme not in SCHEMES:
        raise _invalid(url, f"must start with one of {', '.join(f'{known}://' for known in SCHEMES)}")
    if parts.username is not None or parts.password is not None:
        # Not shown: it holds a secret.
        raise _invalid("a URL with a user name", "must not hold a user name or password. Use `api_key`")
    if parts.query or parts.fragment:
        raise _invalid(url, "must not have a query or a fragment")
    protocol = scheme.split("+")[0].rstrip("s") if scheme != "https" else "http"
    uds, target = "", ""
    if scheme.endswith("+unix"):
        uds = unquote(parts.path)
        if parts.netloc or not uds:
            raise _invalid(url, f"must name a socket by its absolute path, as in {scheme}:///run/trilithon.sock")
        target = "http://localhost" if protocol == "http" else f"unix:{uds}"
    else:
        try:
            port = parts.port or _DEFAULT_PORTS[scheme]
        except ValueError:
            raise _invalid(url, "must have a port from 1 to 65535") from None
        if not parts.hostname:
            raise _invalid(url, "must name a host")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        path = parts.path.rstrip("/")
        if protocol == "grpc" and path:
            raise _invalid(url, "must have no path with gRPC")
        # People paste the base URL of OpenAI clients; our paths bring their own /v1.
        target = f"{scheme}://{host}:{port}{path.removesuffix('/v1')}" if protocol == "http" else f"{host}:{port}"
    tls = scheme in ("https", "grpcs")
    if not tls and (tls_ca or tls_cert or tls_key):
        raise _invalid(url, "must start with https:// or grpcs:// when TLS files are given")
    if bool(tls_cert) != bool(tls_key):
        raise InvalidArgument("`tls_cert` and `tls_key` must be given together.", code="invalid_value")
    return Settings(
        url=f"{scheme}://{parts.netloc}{parts.path}",
        scheme=protocol,
        target=target,
        uds=uds if protocol == "http" else "",
        tls=tls,
        api_key=api_key,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        headers={name.lower(): value for name, value in (headers or {}).items()},
    )


def _invalid(given: str, rule: str) -> InvalidArgument:
    violation = Violation(field="url", code="invalid_url", rule=rule, given=given, message=f"`url` {rule}.")
    return InvalidArgument(f"`url` {rule}. Given: {given!r}.", code="invalid_url", details=[violation])
