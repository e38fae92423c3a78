"""A real server with a catalogue: adapters by name over both protocols, aliases moved under load, tenants apart."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import pytest
from served import Server, serving
from tiny import tiny_llama
from tiny_adapters import tiny_adapter

from trilithon import Client, Conflict, FailedPrecondition, NotFound, PermissionDenied
from trilithon_parallel.config import load_config
from trilithon_parallel.lora.peft import read_adapter
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.catalog import Catalog, CatalogEntry
from trilithon_server.engine.identity import model_digest
from trilithon_server.text.template import load_template, template_digest

KEYS = {"user": "k" * 40, "other": "o" * 40, "admin": "a" * 40}


@dataclass
class World:
    """A server, its catalogue and what is in it."""

    server: Server
    catalog: Catalog
    base: Path
    first: CatalogEntry

    def client(self, key: str = "user", *, grpc: bool = False) -> Client:
        """A client with a key of tenant `one` (user, admin) or `two` (other)."""
        return Client(self.server.grpc_target if grpc else self.server.url, api_key=KEYS[key], max_retries=0)

    def text(self, model: str, key: str = "user", *, grpc: bool = False) -> str:
        """What a model says, greedily."""
        with self.client(key, grpc=grpc) as client:
            answer = client.generate("Once upon", model=model, temperature=0.0, max_tokens=8, ignore_eos=True)
            return answer.choices[0].text


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Adapters of tenant `one`, one of everyone's, one that the configuration names, and some that do not fit."""
    root = tmp_path_factory.mktemp("world")
    base = tiny_llama(root / "tiny", hidden=72, heads=9, groups=3)
    catalog = Catalog(root / "catalog")
    template = load_template(base)
    assert template is not None
    digest, config = model_digest(base), load_config(base)
    entries = []
    for number in range(4):
        path = tiny_adapter(root / f"adapter{number}", base, seed=number)
        entry = CatalogEntry(
            name=f"ft:tiny:faq:{number}",
            kind="adapter",
            base="tiny",
            base_digest=digest,
            path=path,
            digest=read_adapter(path, config=config).digest,
            tenant="one",
            job_id=f"ftjob-{number}",
            step=10 * number,
            template_digest=template_digest(template, load_tokenizer(base)),
            created=number,
        )
        entries.append(entry)
        catalog.register(entry)
    catalog.register(replace(entries[0], name="shared", tenant=""))
    catalog.register(replace(entries[1], name="elsewhere", base_digest="f" * 64))
    catalog.register(replace(entries[2], name="template", template_digest="e" * 64))
    catalog.register(replace(entries[3], name="gone", path=root / "nowhere", digest="9" * 64))
    keys = root / "keys"
    scopes = {"user": ("one", "user"), "other": ("two", "user"), "admin": ("one", "user+admin")}
    keys.write_text(
        "\n".join(
            f"sha256:{hashlib.sha256(KEYS[name].encode()).hexdigest()} tenant={tenant} scopes={scope}"
            for name, (tenant, scope) in scopes.items()
        )
    )
    keys.chmod(0o600)
    own = tiny_adapter(root / "own", base, seed=9)
    flags = ("--adapter", f"own={own}", "--set", f"server.catalog={catalog.root}", "--api-keys-file", str(keys))
    with serving(base, *flags, "--set", "engines.0.max_adapters=2") as server:
        yield World(server, catalog, base, entries[0])


@pytest.mark.parametrize("grpc", [False, True], ids=["http", "grpc"])
def test_E3_names_mean_the_same_over_both_protocols(world: World, grpc: bool) -> None:
    """Catalogue names, the configured adapter and the base answer, each in its own way, with no verb before."""
    names = ["tiny", "own", *(f"ft:tiny:faq:{number}" for number in range(4))]

    texts = [world.text(name, grpc=grpc) for name in names]

    assert len(set(texts)) == len(texts)
    assert texts == [world.text(name) for name in names]


def test_openai_client_lists_and_uses_adapters(world: World) -> None:
    """The openai package finds adapters in the list, retrieves one and completes with it."""
    with openai.OpenAI(base_url=f"{world.server.url}/v1", api_key=KEYS["user"], max_retries=0) as client:
        ids = [model.id for model in client.models.list()]
        one = client.models.retrieve("ft:tiny:faq:1")
        answer = client.completions.create(model="ft:tiny:faq:1", prompt="Once upon", max_tokens=8, temperature=0)
        said = client.chat.completions.create(
            model="ft:tiny:faq:1", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
        )

    assert ids[:2] == ["tiny", "own"]
    assert {"ft:tiny:faq:1", "shared"} <= set(ids)
    assert one.to_dict() | {"kind": "adapter", "base": "tiny", "job_id": "ftjob-1", "job_step": 10} == one.to_dict()
    assert answer.model == said.model == "ft:tiny:faq:1"


def test_header_and_grpc_adapter_field(world: World) -> None:
    """`x-trilithon-model` tells the step; `RequestMeta.adapter` names one on top of its own base alone."""
    from trilithon.api.v1 import common_pb2, generation_pb2, generation_pb2_grpc

    headers = {"authorization": f"Bearer {KEYS['user']}"}
    body = {"model": "ft:tiny:faq:2", "prompt": "Once", "max_tokens": 1}
    answer = httpx.post(f"{world.server.url}/v1/completions", json=body, headers=headers)
    assert answer.headers["x-trilithon-model"] == "ft:tiny:faq:2@20"

    import grpc

    with grpc.insecure_channel(world.server.grpc_target.removeprefix("grpc://")) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)

        def ask(**meta: str) -> str:
            request = generation_pb2.GenerateRequest(
                meta=common_pb2.RequestMeta(**meta), prompt=common_pb2.Prompt(text="Once")
            )
            request.stopping.max_tokens = 1
            return str(stub.Generate(request, metadata=[("authorization", f"Bearer {KEYS['user']}")]).model)

        assert ask(adapter="ft:tiny:faq:2") == ask(model="tiny", adapter="ft:tiny:faq:2") == "ft:tiny:faq:2"
        for meta in ({"model": "own", "adapter": "ft:tiny:faq:2"}, {"adapter": "nothing"}, {"adapter": "tiny"}):
            with pytest.raises(grpc.RpcError) as caught:
                ask(**meta)
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_S8_another_tenants_names_are_not_there(world: World) -> None:
    """What belongs to one tenant is 404 for another, in use, in the list and in the error's own list."""
    with world.client("other") as client:
        names = [model.id for model in client.models.list()]
        with pytest.raises(NotFound, match="no model") as caught:
            client.generate("Once", model="ft:tiny:faq:1", max_tokens=1)
        with pytest.raises(NotFound):
            client.models.get("ft:tiny:faq:1")
        client.generate("Once", model="shared", max_tokens=1)

    assert names == ["tiny", "own", "shared"]
    assert caught.value.code == "model_not_found"
    assert "ft:tiny:faq:0" not in str(caught.value)


@pytest.mark.parametrize("grpc", [False, True], ids=["http", "grpc"])
def test_S3_verbs_need_the_admin_scope(world: World, grpc: bool) -> None:
    """A user's key may use adapters, not load, unload or rename them."""
    with world.client(grpc=grpc) as client:
        for verb in (
            lambda: client.models.load("own"),
            lambda: client.models.unload("own"),
            lambda: client.models.set_alias("mine", "own"),
            lambda: client.models.delete_alias("mine"),
        ):
            with pytest.raises(PermissionDenied):
                verb()


@pytest.mark.parametrize("grpc", [False, True], ids=["http", "grpc"])
def test_load_and_unload(world: World, grpc: bool) -> None:
    """Loading makes an adapter ready, unloading available, and its next use ready again."""
    with world.client("admin", grpc=grpc) as client:
        assert client.models.load("ft:tiny:faq:3").state == "ready"
        assert client.models.unload("ft:tiny:faq:3", drain=True).requests_in_flight == 0
        assert client.models.get("ft:tiny:faq:3").state == "available"
        client.generate("Once", model="ft:tiny:faq:3", max_tokens=1)
        assert client.models.get("ft:tiny:faq:3").state == "ready"
    metrics = httpx.get(f"{world.server.url}/metrics", headers={"authorization": f"Bearer {KEYS['user']}"}).text
    assert 'trilithon_adapter_loads_total{model="tiny",result="ok"}' in metrics
    assert 'trilithon_adapters_loaded{model="tiny"}' in metrics
    assert "ft:tiny" not in metrics


def test_R11_what_cannot_be_served_says_why(world: World) -> None:
    """A wrong base, a wrong template and missing files are refused in one sentence each, and nothing else suffers."""
    for name, code, words in (
        ("elsewhere", "base_mismatch", "stands on `tiny`"),
        ("template", "template_mismatch", "was trained with chat template"),
        ("gone", "adapter_load_failed", "does not exist"),
    ):
        with world.client() as client, pytest.raises(FailedPrecondition, match=words) as caught:
            client.generate("Once", model=name, max_tokens=1)
        assert caught.value.code == code
        assert str(world.catalog.root.parent) not in str(caught.value)
    with world.client("admin") as client:
        with pytest.raises(FailedPrecondition, match="does not exist"):
            client.models.load("gone")
        assert client.models.load("template", allow_template_mismatch=True).state == "ready"
    assert world.text("template") == world.text("ft:tiny:faq:2")


def test_alias_is_compared_and_swapped(world: World) -> None:
    """An alias is made, moved from where it stands only, listed with its target, and answers as that."""
    with world.client("admin") as client:
        assert client.models.set_alias("swap", "ft:tiny:faq:0", expected_target="").alias_of == "ft:tiny:faq:0"
        with pytest.raises(Conflict, match="Expected: to be new"):
            client.models.set_alias("swap", "ft:tiny:faq:1", expected_target="")
        with pytest.raises(Conflict, match="never moves"):
            client.models.set_alias("tiny", "ft:tiny:faq:1")
        with pytest.raises(NotFound):
            client.models.set_alias("swap", "nothing")
        assert client.models.set_alias("swap", "tiny", expected_target="ft:tiny:faq:0").alias_of == "tiny"
        assert client.generate("Once", model="swap", max_tokens=1).model == "tiny"
        (row,) = client.models.list(kind="alias")
    assert (row.id, row.alias_of) == ("swap", "tiny")


@pytest.mark.parametrize("grpc", [False, True], ids=["http", "grpc"])
def test_an_alias_is_taken_away(world: World, grpc: bool) -> None:
    """From where it stands only, then it is nobody's name; the model that it stood for answers as before."""
    name = f"old-{'grpc' if grpc else 'http'}"
    with world.client("admin", grpc=grpc) as client:
        client.models.set_alias(name, "ft:tiny:faq:0")
        with pytest.raises(Conflict, match="Expected: to point to 'tiny'") as moved:
            client.models.delete_alias(name, expected_target="tiny")
        gone = client.models.delete_alias(name, expected_target="ft:tiny:faq:0")
        with pytest.raises(NotFound) as missing:
            client.models.delete_alias(name)
        with pytest.raises(NotFound):
            client.generate("Once", model=name, max_tokens=1)
        still = client.generate("Once", model="ft:tiny:faq:0", max_tokens=1)

    assert (gone.alias, gone.target) == (name, "ft:tiny:faq:0")
    assert (moved.value.code, missing.value.code) == ("version_conflict", "alias_not_found")
    assert still.model == "ft:tiny:faq:0"


def test_alias_moved_under_load(world: World) -> None:
    """
    While an alias moves to and fro under concurrent requests, none fails, and each is answered by one of the two
    versions from its first token to its last, as the answer's own name says.
    """
    names = ["ft:tiny:faq:0", "ft:tiny:faq:1"]
    expected = {name: world.text(name) for name in names}
    world.catalog.move_alias("busy", names[0], tenant="one")
    seen: list[tuple[str, str]] = []
    failed: list[BaseException] = []
    stop = threading.Event()

    def ask() -> None:
        with world.client() as client:
            while not stop.is_set():
                try:
                    answer = client.generate("Once upon", model="busy", temperature=0.0, max_tokens=8, ignore_eos=True)
                except BaseException as error:  # told by the main thread
                    failed.append(error)
                    return
                seen.append((answer.model, answer.choices[0].text))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    with world.client("admin") as client:
        moves = 0
        while not failed and (moves < 10 or len({model for model, _ in seen}) < 2) and moves < 2000:
            moves += 1
            client.models.set_alias("busy", names[moves % 2], expected_target=names[(moves + 1) % 2])
    stop.set()
    for thread in threads:
        thread.join(60)

    assert not failed
    assert {model for model, _ in seen} == set(names)
    assert all(text == expected[model] for model, text in seen)


def test_configured_adapter_must_exist(tmp_path: Path) -> None:
    """A server that is told of an adapter which is not there does not start, and says which."""
    base = tiny_llama(tmp_path / "tiny")

    with serving(base, "--adapter", f"x={tmp_path / 'none'}", wait=False) as server:
        code, output = server.process.wait(120), server.output()

    assert code == 2
    assert "adapter x must be a directory with adapter_config.json" in output
