"""The catalogue: names that never change their meaning, aliases that move one at a time, and tenants apart."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from trilithon_server.catalog import Catalog, CatalogConflict, CatalogEntry, CatalogError


def _entry(name: str, *, tenant: str = "", digest: str = "d", created: int = 0) -> CatalogEntry:
    return CatalogEntry(
        name=name, kind="adapter", base="base", base_digest="b", path=Path("/files"), digest=digest, tenant=tenant,
        created=created,
    )  # fmt: skip


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """An empty one."""
    return Catalog(tmp_path / "models")


def test_empty_catalogue_needs_no_directory(catalog: Catalog) -> None:
    """Reading makes nothing."""
    assert catalog.get("x", tenant="t") is None
    assert catalog.entries(tenant=None) == []
    assert catalog.aliases(tenant="t") == []
    assert not catalog.root.exists()


def test_names_are_immutable(catalog: Catalog) -> None:
    """Registering again is no change; another digest under the name is refused, and so is an alias of that name."""
    entry = _entry("ft:base:faq:1")
    catalog.register(entry)
    catalog.register(replace(entry, created=9))

    assert catalog.entries(tenant="") == [entry]
    with pytest.raises(CatalogConflict, match="means digest d already"):
        catalog.register(replace(entry, digest="other"))
    with pytest.raises(CatalogConflict, match="never moves"):
        catalog.move_alias(entry.name, "ft:x", tenant="")
    catalog.move_alias("faq", entry.name, tenant="")
    with pytest.raises(CatalogConflict, match="is an alias"):
        catalog.register(_entry("faq"))


def test_names_never_reach_the_file_system(catalog: Catalog, tmp_path: Path) -> None:
    """A name with slashes and dots is a name; what is malformed is refused."""
    catalog.register(_entry("../../etc/passwd"))

    assert catalog.get("../../etc/passwd", tenant="t") == _entry("../../etc/passwd")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]
    for name in ("", "a\nb", " a", "x" * 257):
        with pytest.raises(ValueError, match="must have 1 to 256 printable characters"):
            catalog.register(_entry(name))
    with pytest.raises(ValueError, match="absolute path"):
        catalog.register(replace(_entry("a"), path=Path("relative")))


def test_tenants_see_their_own_before_everyones(catalog: Catalog) -> None:
    """A tenant's entries and aliases are its own; everyone's are everybody's; its own name comes first."""
    catalog.register(_entry("shared", digest="all", created=1))
    catalog.register(_entry("shared", tenant="one", digest="own", created=2))
    catalog.register(_entry("private", tenant="one", created=3))
    catalog.move_alias("faq", "private", tenant="one")

    mine, others = catalog.get("shared", tenant="one"), catalog.get("shared", tenant="two")
    assert mine is not None
    assert others is not None
    assert (mine.digest, others.digest) == ("own", "all")
    assert catalog.get("faq", tenant="one") == catalog.get("private", tenant="one")
    assert catalog.get("private", tenant="two") is None
    assert catalog.get("faq", tenant="two") is None
    assert [entry.digest for entry in catalog.entries(tenant="one")] == ["all", "own", "d"]
    assert len(catalog.entries(tenant=None)) == 3
    assert catalog.aliases(tenant="two") == []


def test_alias_moves_by_compare_and_swap(catalog: Catalog) -> None:
    """An alias moves only from where it is expected; versions count the moves."""
    for name in ("a", "b"):
        catalog.register(_entry(name, digest=name))

    assert catalog.move_alias("faq", "a", tenant="", expected="").version == 1
    with pytest.raises(CatalogConflict, match=r"points to 'a'\. Expected: to be new"):
        catalog.move_alias("faq", "b", tenant="", expected="")
    with pytest.raises(CatalogConflict, match="points to 'a'"):
        catalog.move_alias("faq", "b", tenant="", expected="b")
    assert catalog.move_alias("faq", "b", tenant="", expected="a").version == 2
    assert catalog.move_alias("faq", "b", tenant="").version == 2
    found = catalog.get("faq", tenant="t")
    assert found is not None
    assert found.digest == "b"
    with pytest.raises(CatalogConflict, match="does not exist"):
        catalog.move_alias("new", "a", tenant="", expected="a")
    with pytest.raises(CatalogConflict, match="Move the alias first"):
        catalog.remove("b", tenant="")
    assert catalog.remove("a", tenant="")
    assert not catalog.remove("a", tenant="")


def test_an_alias_is_taken_away_by_compare(catalog: Catalog) -> None:
    """An alias goes only from where it is expected to point, and only its own tenant's; the model stays."""
    for tenant in ("", "t"):
        catalog.register(_entry("a", digest="a", tenant=tenant))
        catalog.move_alias("faq", "a", tenant=tenant)

    with pytest.raises(CatalogConflict, match=r"points to 'a'\. Expected: to point to 'b'"):
        catalog.remove_alias("faq", tenant="t", expected="b")
    gone = catalog.remove_alias("faq", tenant="t", expected="a")

    assert gone is not None
    assert (gone.name, gone.target, gone.tenant) == ("faq", "a", "t")
    left = catalog.alias("faq", tenant="t")
    assert left is not None
    assert left.tenant == ""  # everyone's shows again
    assert catalog.remove_alias("faq", tenant="t") is None
    assert catalog.get("a", tenant="t") is not None
    assert catalog.move_alias("faq", "a", tenant="t", expected="").version == 1


def test_damaged_file_is_named(catalog: Catalog) -> None:
    """A file that is not the catalogue's is an error that names it, never a missing model."""
    catalog.register(_entry("a"))
    (file,) = (catalog.root / "entries").iterdir()
    file.write_text('{"name": "a", "surprise": 1}')

    with pytest.raises(CatalogError, match=file.name):
        catalog.get("a", tenant="")


RACE = """
import sys
from pathlib import Path
from trilithon_server.catalog import Catalog, CatalogConflict, CatalogEntry

catalog, number, done = Catalog(Path(sys.argv[1])), sys.argv[2], 0
while done < 25:
    alias = catalog.alias("counter", tenant="t")
    catalog.register(CatalogEntry(name=f"process-{number}", kind="adapter", base="base", base_digest="b",
                                  path=Path("/files"), digest="d", tenant="t"))
    try:
        catalog.move_alias("counter", str(int(alias.target) + 1), tenant="t", expected=alias.target)
    except CatalogConflict:
        continue
    done += 1
"""


def test_processes_race_for_an_alias(catalog: Catalog) -> None:
    """
    Four processes count with one alias: not one move is lost, and no reader ever meets half a file.

    Seen to fail without the lock.
    """
    catalog.move_alias("counter", "0", tenant="t")
    processes = [subprocess.Popen([sys.executable, "-c", RACE, str(catalog.root), str(n)]) for n in range(4)]
    codes = [process.wait(120) for process in processes]

    assert codes == [0, 0, 0, 0]
    alias = catalog.alias("counter", tenant="t")
    assert alias is not None
    assert (alias.target, alias.version) == ("100", 101)
    assert len(catalog.entries(tenant="t")) == 4
    assert not list(catalog.root.glob("*/.tmp-*"))
