"""
Who is asking: API keys, their tenants and scopes. Deny by default as soon as a key exists (bar S3).

A keys file, which nobody but its owner may read, holds one key a line; blank lines and `#` comments are skipped:

    sk-secret                        tenant=acme
    sha256:9f86d081884c7d65...       tenant=ops   scopes=user+admin   priority=10
    sk-another                       tenant=lab   requests=8   requests_per_minute=60   tokens_per_minute=20000

`sha256:` is the hash of a key, so that the key itself need not be on disk; `printf %s KEY | sha256sum` prints it. Keys
are held as hashes in memory and compared in constant time. `TRILITHON_API_KEYS` has the same lines, or several
separated by commas.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trilithon.errors import PermissionDenied, Unauthenticated
from trilithon_server.validation import nearest, shown

SCOPES = ("user", "admin")

PUBLIC_PATHS = ("/livez", "/readyz", "/startupz", "/health")
"""HTTP routes that need no key. The gRPC health service is the only public one there."""

PUBLIC_SERVICES = ("grpc.health.v1.Health",)

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
_NUMBERS = ("priority", "requests", "requests_per_minute", "tokens_per_minute")


class KeysError(ValueError):
    """The keys file is not usable; the message says which line and why, never the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """
    Who asks: what a key stands for.

    Args:
        tenant: partitions the prefix cache, abort and the request ids.
        scopes: of `SCOPES`.
        key_id: names the key in logs and limits without revealing it.
        max_priority: the largest `priority` that it may ask for.
        max_requests, requests_per_minute, tokens_per_minute: its own limits; None = the server's.
    """

    tenant: str
    scopes: frozenset[str] = frozenset({"user"})
    key_id: str = ""
    max_priority: int = 10
    max_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def require(self, scope: str) -> None:
        """
        Raises:
            PermissionDenied: the key lacks the scope.
        """
        if scope not in self.scopes:
            raise PermissionDenied(
                f"this key has the scopes {'+'.join(sorted(self.scopes))}; the call needs {scope}. Use another key.",
                code=f"{scope}_scope_required",
            )


LOCAL = Principal(tenant="local", scopes=frozenset(SCOPES), key_id="local")
"""Everybody, while the server has no key (it then listens on loopback only, unless `--insecure`)."""


class Keyring:
    """
    The keys that the server knows.

    >>> ring = Keyring.parse("sk-one tenant=acme")
    >>> ring.authenticate("Bearer sk-one").tenant
    'acme'
    """

    def __init__(self, keys: Mapping[bytes, Principal]) -> None:
        self._keys = dict(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    @classmethod
    def load(cls, path: Path | None, environment: str | None) -> Keyring:
        """
        Read the keys file and the environment's keys.

        Raises:
            KeysError: the file cannot be read, others may read it, or a line is wrong.
        """
        keys: dict[bytes, Principal] = {}
        if path is not None:
            try:
                mode = stat.S_IMODE(path.stat().st_mode)
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
                raise KeysError(f"{path} must be a readable text file. Given: {reason}. Name another file.") from None
            if mode & 0o077:
                raise KeysError(
                    f"{path} must be readable by its owner alone (mode 0600). Given: mode {mode:04o}. "
                    f"Run: chmod 600 {path}"
                )
            if os.name == "posix" and path.stat().st_uid not in (os.geteuid(), 0):
                raise KeysError(f"{path} must belong to the user who runs the server. Change its owner.")
            keys |= cls.parse(text, where=str(path))._keys
            if not keys:
                raise KeysError(f"{path} must hold at least one key. Given: none. Add a line, or leave the option out.")
        if environment:
            keys |= cls.parse(environment.replace(",", "\n"), where="TRILITHON_API_KEYS")._keys
        return cls(keys)

    @classmethod
    def parse(cls, text: str, *, where: str = "keys") -> Keyring:
        """
        Raises:
            KeysError: a line is wrong.
        """
        keys: dict[bytes, Principal] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.split("#", 1)[0].split()
            if words:
                digest, principal = _parse_line(words, f"{where}:{number}")
                if digest in keys:
                    raise KeysError(f"{where}:{number} repeats a key of an earlier line. Remove one of the two.")
                keys[digest] = principal
        return cls(keys)

    def authenticate(self, authorization: str | None, api_key: str | None = None) -> Principal:
        """
        The principal behind a request's `authorization: Bearer KEY` or `x-api-key: KEY`.

        Raises:
            Unauthenticated: there are keys and this is none of them.
        """
        if not self._keys:
            return LOCAL
        key = api_key
        if authorization is not None:
            scheme, _, rest = authorization.partition(" ")
            if scheme.lower() != "bearer":
                raise Unauthenticated('the authorization header must be "Bearer KEY".')
            key = rest.strip()
        if not key:
            raise Unauthenticated("no API key was given. Send it as `authorization: Bearer KEY` or `x-api-key: KEY`.")
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found: Principal | None = None
        for known, principal in self._keys.items():  # all of them: the time must not tell which one matched
            if hmac.compare_digest(known, digest):
                found = principal
        if found is None:
            raise Unauthenticated("this API key is not known here. Check it, or ask the operator for one.")
        return found


def _parse_line(words: list[str], where: str) -> tuple[bytes, Principal]:
    key, *options = words
    if key.startswith("sha256:"):
        match = _HASH.fullmatch(key)
        if match is None:
            raise KeysError(f"{where} a hashed key must be sha256: and 64 hexadecimal digits. Correct the line.")
        digest = bytes.fromhex(match[1])
    else:
        digest = hashlib.sha256(key.encode()).digest()
    given: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        known = ("tenant", "scopes", *_NUMBERS)
        if not equals or name not in known:
            hint = nearest(name, known)
            raise KeysError(f"{where} {shown(name)} is not an option. Allowed: {', '.join(known)}.{hint}")
        given[name] = value
    tenant = given.get("tenant", digest.hex()[:12])
    if not _NAME.fullmatch(tenant):
        raise KeysError(f"{where} tenant must be 1 to 64 letters, digits, '.', '_' or '-'. Given: {shown(tenant)}.")
    scopes = frozenset(given.get("scopes", "user").split("+"))
    if not scopes <= set(SCOPES):
        raise KeysError(f"{where} scopes must be user, admin or user+admin. Given: {shown(given['scopes'])}.")
    numbers: dict[str, int] = {}
    for name in _NUMBERS:
        if name in given:
            low, high = (-10, 10) if name == "priority" else (1, 1 << 40)
            try:
                numbers[name] = int(given[name])
            except ValueError:
                numbers[name] = low - 1
            if not low <= numbers[name] <= high:
                raise KeysError(
                    f"{where} {name} must be a whole number from {low} to {high}. Given: {shown(given[name])}."
                )
    principal = Principal(
        tenant=tenant,
        scopes=scopes,
        key_id=digest.hex()[:12],
        max_priority=numbers.get("priority", 10),
        max_requests=numbers.get("requests"),
        requests_per_minute=numbers.get("requests_per_minute"),
        tokens_per_minute=numbers.get("tokens_per_minute"),
    )
    return digest, principal
