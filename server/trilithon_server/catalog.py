"""
The catalogue: which finetuned models exist, and which name points to which of them.

    ROOT/
      lock                   held while something is written
      entries/SHA256.json    one model that a job made; written once, never changed
      aliases/SHA256.json    one name that moves

Plain files that several processes share: a job's worker registers what it made, servers read it at the next request.
A file is written aside and renamed into place, so a reader sees the old one or the new one and needs no lock; writers
take turns by a lock on one file. Names may hold any character (`ft:base:suffix:job`), so files are called by the
SHA-256 of tenant and name and no name reaches the file system.

A model's name is immutable: it means one digest for ever. An alias points to a name and moves by compare-and-swap.
An entry belongs to a tenant, and the empty tenant's entries belong to everyone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

__all__ = ["Alias", "Catalog", "CatalogConflict", "CatalogEntry", "CatalogError"]

MAX_NAME_CHARS = 256


class CatalogError(Exception):
    """A file of the catalogue cannot be read or written; the message names it."""


class CatalogConflict(Exception):
    """A name is taken, or an alias points elsewhere than expected; the message says which and to what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """
    A model that a job made.

    Attributes:
        name: what requests call it; 1 to 256 characters.
        kind: `adapter`: a PEFT directory beside the base; `model`: a whole model directory.
        base: served name of the base model.
        base_digest: of the base that it was trained on, as `engine.startup.model_digest` computes it.
        path: the directory, absolute.
        digest: of the weights; the identity of this version.
        tenant: whose it is; empty: everyone's.
        task: that it was trained for.
        job_id, step: where it comes from; empty and 0 for one that was made elsewhere.
        template_digest: of the chat template that it was trained with; empty where none was used.
        created: Unix seconds.
    """

    name: str
    kind: Literal["adapter", "model"]
    base: str
    base_digest: str
    path: Path
    digest: str
    tenant: str = ""
    task: str = ""
    job_id: str = ""
    step: int = 0
    template_digest: str = ""
    created: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """
    A name that points to a model and may be moved.

    Attributes:
        name: the alias itself.
        target: the model's name.
        version: moves so far, from 1.
        tenant: whose it is; empty: everyone's.
    """

    name: str
    target: str
    version: int
    tenant: str = ""


class Catalog:
    """
    The catalogue in `root`, a directory that is made when it is first written to.

    Everything here is short file work; all methods may be called from several processes and threads at once.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    # -- models ---------------------------------------------------------------------------------------------

    def register(self, entry: CatalogEntry) -> None:
        """
        Add a model; again with the same digest is no change.

        Raises:
            CatalogConflict: the name means another digest, or is an alias.
            ValueError: the name or a field is malformed.
        """
        _check_name(entry.name)
        if not entry.path.is_absolute() or not entry.digest:
            raise ValueError(f"a catalogue entry needs an absolute path and a digest. Given: {entry}.")
        with self._writing():
            known = self._entry(entry.tenant, entry.name)
            if known is not None:
                if known.digest == entry.digest and known.kind == entry.kind:
                    return
                message = f"the model name {entry.name!r} means digest {known.digest} already. Given: {entry.digest}."
                raise CatalogConflict(f"{message} Names of models never change their meaning; choose another name.")
            if self._alias(entry.tenant, entry.name) is not None:
                raise CatalogConflict(f"{entry.name!r} is an alias. A model needs a name of its own.")
            _write(self._file("entries", entry.tenant, entry.name), {**asdict(entry), "path": str(entry.path)})

    def get(self, name: str, *, tenant: str) -> CatalogEntry | None:
        """The model of that name or alias which the tenant may use: its own before everyone's; None when none is."""
        for owner in _owners(tenant):
            entry = self._entry(owner, name)
            if entry is not None:
                return entry
            alias = self._alias(owner, name)
            if alias is not None:
                return next(filter(None, (self._entry(item, alias.target) for item in _owners(tenant))), None)
        return None

    def entries(self, *, tenant: str | None) -> list[CatalogEntry]:
        """What the tenant may use, oldest first; None: every tenant's."""
        found = self._all("entries", CatalogEntry)
        mine = [entry for entry in found if tenant is None or entry.tenant in _owners(tenant)]
        return sorted(mine, key=lambda entry: (entry.created, entry.name, entry.tenant))

    def remove(self, name: str, *, tenant: str) -> bool:
        """
        Forget a model of exactly that tenant; its directory stays. False when there is none.

        Raises:
            CatalogConflict: an alias points to it.
        """
        with self._writing():
            if self._entry(tenant, name) is None:
                return False
            holding = [item for item in self._all("aliases", Alias) if item.target == name and item.tenant == tenant]
            if holding:
                raise CatalogConflict(f"the alias {holding[0].name!r} points to {name!r}. Move the alias first.")
            self._file("entries", tenant, name).unlink()
            return True

    # -- aliases --------------------------------------------------------------------------------------------

    def alias(self, name: str, *, tenant: str) -> Alias | None:
        """The alias of that name which the tenant may use."""
        return next(filter(None, (self._alias(owner, name) for owner in _owners(tenant))), None)

    def aliases(self, *, tenant: str | None) -> list[Alias]:
        """The aliases that the tenant may use, by name; None: every tenant's."""
        found = self._all("aliases", Alias)
        mine = [alias for alias in found if tenant is None or alias.tenant in _owners(tenant)]
        return sorted(mine, key=lambda alias: (alias.name, alias.tenant))

    def move_alias(self, name: str, target: str, *, tenant: str, expected: str | None = None) -> Alias:
        """
        Point an alias to a model, making it when it is new. Whether the target exists is the caller's to check: it
        may be a model that the catalogue does not hold.

        Args:
            expected: where it must point now; empty: it must be new; None: wherever it points.
        Raises:
            CatalogConflict: it points elsewhere, or the name is a model's.
            ValueError: a name is malformed, or the target is the alias itself.
        """
        _check_name(name)
        _check_name(target)
        if name == target:
            raise ValueError(f"an alias must point to another name. Given: {name!r} for both.")
        with self._writing():
            if self._entry(tenant, name) is not None:
                raise CatalogConflict(f"{name!r} is a model's name and never moves. Choose another alias.")
            known = self._alias(tenant, name)
            points = known.target if known is not None else ""
            if expected is not None and points != expected:
                now = f"points to {points!r}" if points else "does not exist"
                meant = f"to point to {expected!r}" if expected else "to be new"
                raise CatalogConflict(f"the alias {name!r} {now}. Expected: {meant}. Read it again, then decide.")
            if known is not None and points == target:
                return known
            version = known.version + 1 if known is not None else 1
            alias = Alias(name=name, target=target, version=version, tenant=tenant)
            _write(self._file("aliases", tenant, name), asdict(alias))
            return alias

    def remove_alias(self, name: str, *, tenant: str, expected: str | None = None) -> Alias | None:
        """
        Forget an alias of exactly that tenant; the model that it points to stays. None when there is none.

        Args:
            expected: where it must point now; None: wherever it points.
        Raises:
            CatalogConflict: it points elsewhere.
        """
        with self._writing():
            known = self._alias(tenant, name)
            if known is None:
                return None
            if expected not in (None, known.target):
                now = f"the alias {name!r} points to {known.target!r}"
                raise CatalogConflict(f"{now}. Expected: to point to {expected!r}. Read it again, then decide.")
            self._file("aliases", tenant, name).unlink()
            return known

    # -- files ----------------------------------------------------------------------------------------------

    def _file(self, kind: Literal["entries", "aliases"], tenant: str, name: str) -> Path:
        digest = hashlib.sha256(tenant.encode() + b"\0" + name.encode()).hexdigest()
        return self.root / kind / f"{digest}.json"

    def _entry(self, tenant: str, name: str) -> CatalogEntry | None:
        return _read(self._file("entries", tenant, name), CatalogEntry)

    def _alias(self, tenant: str, name: str) -> Alias | None:
        return _read(self._file("aliases", tenant, name), Alias)

    def _all(self, kind: Literal["entries", "aliases"], record: type[_Record]) -> list[_Record]:
        found = (_read(path, record) for path in sorted((self.root / kind).glob("*.json")))
        return [item for item in found if item is not None]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            for part in (self.root, self.root / "entries", self.root / "aliases"):
                part.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CatalogError(f"the catalogue {self.root} cannot be written: {error.strerror}.") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


_Record = TypeVar("_Record", CatalogEntry, Alias)


def _owners(tenant: str) -> tuple[str, ...]:
    """Whose entries a tenant may use, its own first."""
    return (tenant, "") if tenant else ("",)


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable() or name != name.strip():
        rule = f"must have 1 to {MAX_NAME_CHARS} printable characters and no space at an end"
        raise ValueError(f"a model's name {rule}. Given: {name[:64]!r}.")


def _read(path: Path, record: type[_Record]) -> _Record | None:
    try:
        values: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CatalogError(f"{path} is not a readable catalogue file: {error}.") from None
    known = {item.name for item in fields(record)}
    if not isinstance(values, dict) or not values.keys() <= known:
        raise CatalogError(f"{path} is not a catalogue file of this version.")
    if "path" in values:
        values["path"] = Path(values["path"])
    try:
        return record(**values)
    except TypeError as error:
        raise CatalogError(f"{path} is not a catalogue file of this version: {error}.") from None


def _write(path: Path, values: dict[str, Any]) -> None:
    """Write beside, then rename: a reader never sees half a file, and a crash leaves the old one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(values, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
