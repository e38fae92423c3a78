"""Where settings come from, which source wins, and what a wrong one is told."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from tiny import tiny_t5

from trilithon_server.config import ServeConfig, check_exposure, read_config, write_config
from trilithon_server.config_sources import ConfigError, Setting, best_dtype, load, resolve, show
from trilithon_server.flags import FLAGS, add_config_flags, environment_name, field_of, load_from_args, settings_table
from trilithon_server.preflight import ModelRefused, check_model

MODEL = "engines.0.model=m"


def _parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    return parser.parse_args(words)


def _violations(*sets: str, environ: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(sets=sets, environ=environ or {})
    return caught.value.violations


def test_each_source_wins_over_the_ones_before_it(tmp_path: Path) -> None:
    """Flags > --set > environment > later file > earlier file > default, and the origin says which one it was."""
    first, second = tmp_path / "a.yaml", tmp_path / "b.json"
    first.write_text("engines: [{model: m}]\nserver: {http_port: 1, grpc_port: 11, drain_seconds: 3s}\n")
    second.write_text(json.dumps({"server": {"http_port": 2}}))
    environ = {"TRILITHON_SERVER__HTTP_PORT": "3"}
    flag = [Setting("server.http_port", "5", "flag --http-port")]

    ports, origins = [], []
    for files, env, sets, flags in (
        ([first], {}, [], []),
        ([first, second], {}, [], []),
        ([first, second], environ, [], []),
        ([first, second], environ, ["server.http_port=4"], []),
        ([first, second], environ, ["server.http_port=4"], flag),
    ):
        loaded = load(files=files, environ=env, sets=sets, flags=flags)
        ports.append(loaded.config.server.http_port)
        origins.append(loaded.origins["server.http_port"])
        assert (loaded.config.server.grpc_port, loaded.config.server.drain_seconds) == (11, 3.0)

    assert ports == [1, 2, 3, 4, 5]
    assert origins == [
        "file a.yaml",
        "file b.json",
        "environment TRILITHON_SERVER__HTTP_PORT",
        "--set server.http_port",
        "flag --http-port",
    ]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("server.htp_port=1", 'server.htp_port is not a setting. Given: htp_port. Did you mean "server.http_port"?'),
        ("server.http_port=99999", "server.http_port must be at most 65535. Given: 99999."),
        ("server.http_port=http", "server.http_port must be a whole number. Given: http."),
        ("engines.0.tp=0", "engines.0.tp must be at least 1. Given: 0."),
        ("engines.0.quantization=int8", "engines.0.quantization must be none"),
        (
            "engines.0.dtype=int8",
            "engines.0.dtype must be one of 'auto', 'float32', 'bfloat16' or 'float16'. Given: int8.",
        ),
        ("engines.0.max_context=12Q", "engines.0.max_context must be a whole number with an optional unit"),
        ("server.drain_seconds=nan", "server.drain_seconds must be a time"),
        ("server.on_rank_loss=panic", "server.on_rank_loss must be one of 'restart' or 'exit'. Given: panic."),
        ("server=5", "server must be a mapping of settings. Given: 5."),
    ],
    ids=lambda value: value.partition(".")[2][:24] if "=" in value else "",
)
def test_R11_a_wrong_setting_gets_one_sentence(setting: str, sentence: str) -> None:
    """
    The sentence names the source, the setting, the rule and the value given.

    Inverse seen: with `extra` left at pydantic's default the unknown key raises nothing, and the first case fails.
    """
    (violation,) = _violations(MODEL, setting)

    assert violation.startswith(f"--set {setting.partition('=')[0]}: {sentence}")


def test_R11_all_violations_come_together() -> None:
    """Three mistakes in three sources are three sentences, not only the first."""
    found = _violations(MODEL, "limits.max_n=0", "server.tls_crt=x", environ={"TRILITHON_SERVER__GRPC_PORT": "-1"})

    assert len(found) == 3
    assert any(line.startswith("environment TRILITHON_SERVER__GRPC_PORT: ") for line in found)


def test_R11_a_repeated_key_in_a_file_is_refused(tmp_path: Path) -> None:
    """YAML readers take the last of two equal keys in silence; ours says which key and line."""
    file = tmp_path / "c.yaml"
    file.write_text("server:\n  http_port: 1\n  http_port: 2\n")

    with pytest.raises(ConfigError, match=r"c\.yaml must be YAML or JSON\. Given: the key 'http_port' twice, line 3"):
        load(files=[file], environ={})


def test_rules_over_several_fields() -> None:
    """A certificate without its key, and two listeners on one port, are refused with the fields named."""
    assert _violations(MODEL, "server.tls_cert=a.pem")[0].startswith("server.tls_key must be set")
    assert "must differ" in _violations(MODEL, "server.http_port=7", "server.grpc_port=7")[0]


def test_S4_another_address_needs_a_key_or_the_word_insecure(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    0.0.0.0 without a key is refused; a key, or --insecure, allows it; loopback needs neither.

    Inverse seen: with `check_exposure` returning None the first assertion fails.
    """
    monkeypatch.delenv("TRILITHON_API_KEYS", raising=False)
    assert "server.host must be a loopback address" in _violations(MODEL, "server.host=0.0.0.0")[0]
    for allowed in ("server.insecure=true", "server.api_keys_file=keys"):
        assert load(sets=[MODEL, "server.host=0.0.0.0", allowed], environ={}).config.server.host == "0.0.0.0"
    assert check_exposure(load(sets=[MODEL, "server.host=::1"], environ={}).config.server) is None
    monkeypatch.setenv("TRILITHON_API_KEYS", "secret")

    assert load(sets=[MODEL, "server.host=0.0.0.0"], environ={}).config.server.host == "0.0.0.0"


def test_open_values_are_filled_and_say_why(tmp_path: Path) -> None:
    """dtype, threads and batch size follow the machine, the name follows the directory; what was set stays set."""
    loaded = load(sets=[f"engines.0.model={tmp_path}", "engines.0.max_batch_tokens=1k"], environ={})

    engine = resolve(loaded, model_dir=Path).config.engines[0]
    text = show(resolve(loaded, model_dir=Path), origin=True)

    assert (tmp_path.name, best_dtype("cpu")[0], 1024) == (engine.served_name, engine.dtype, engine.max_batch_tokens)
    assert engine.num_threads is not None
    assert engine.num_threads >= 1
    assert best_dtype("cpu")[1] in text
    assert "server.http_port = 8000" in text
    assert "# default" in text


def test_R11_encoder_decoders_have_no_batch_invariant_mode(tmp_path: Path) -> None:
    """Left open it is off and says why; asked for, it is refused before anything starts."""
    model = f"engines.0.model={tiny_t5(tmp_path / 't5')}"
    usual = resolve(load(sets=[model], environ={}), model_dir=Path)
    asked = resolve(load(sets=[model, "engines.0.batch_invariant=true"], environ={}), model_dir=Path)

    assert usual.config.engines[0].batch_invariant is False
    assert "encoder-decoders have no such mode" in show(usual, origin=True)
    assert check_model(usual.config.engines[0]) == "encoder-decoder"
    with pytest.raises(ModelRefused, match="batch_invariant must be false for an encoder-decoder"):
        check_model(asked.config.engines[0])


def test_the_flag_list_is_frozen() -> None:
    """New knobs go to the tree only; whoever adds a flag changes this list on purpose."""
    everyday = """--tp --pp --dtype --device --backend --quantization --max-context --kv-cache-bytes --memory-fraction
        --max-batch-tokens --batch-invariant --served-name --chat-template --adapter --host --http-port --grpc-port
        --metrics-port --uds --api-keys-file --insecure --tls-cert --tls-key --tls-client-ca --public-ui --allow-origin
        --reflection --drain-seconds --on-rank-loss --log-format --jobs --jobs-database --job-slots"""

    assert everyday.split() == list(FLAGS)


def test_every_flag_names_a_setting_and_its_environment_variable() -> None:
    """Flags are made from the tree: each has the description, the default and the variable of its setting."""
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    help_text = " ".join(parser.format_help().split())

    for path in FLAGS.values():
        assert field_of(path).description
        assert environment_name(path) in help_text.replace(" ", "") or environment_name(path) in help_text
    assert all(description for _, _, _, description in settings_table())


def test_flags_reach_their_settings() -> None:
    """A value flag, a switch and its negation, and a list arrive typed."""
    args = _parse("m", "--tp", "2", "--no-reflection", "--insecure", "--allow-origin", "http://a, http://b")

    config = load_from_args(args).config

    assert (config.engines[0].tp, config.server.reflection, config.server.insecure) == (2, False, True)
    assert config.server.allow_origin == ("http://a", "http://b")


def test_a_flag_of_one_engine_is_refused_when_there_are_several(tmp_path: Path) -> None:
    """--tp with two engines in the file would change the first in silence, so it is an error."""
    file = tmp_path / "two.yaml"
    file.write_text("engines: [{name: a, model: x}, {name: b, model: y}]")

    with pytest.raises(ConfigError, match=r"--tp must not be used with several engines\. Given: 2 engines"):
        load_from_args(_parse("--config", str(file), "--tp", "2"))
    args = _parse("--config", str(file), "--set", "engines.1.tp=2")

    assert [engine.tp for engine in load_from_args(args).config.engines] == [1, 2]


def test_a_second_engine_is_set_beside_the_model_of_the_command(tmp_path: Path) -> None:
    """The model that is named first is entry 0, whichever source comes first; a gap is still refused."""
    args = _parse("models/a", "--set", "engines.1.model=models/b", "--set", "engines.1.name=b")
    engines = load_from_args(args).config.engines

    assert [engine.model for engine in engines] == ["models/a", "models/b"]
    with pytest.raises(ConfigError, match=r"engines\.2\.model must name one of 1 entries, or the next one\. Given: 2"):
        load_from_args(_parse("models/a", "--set", "engines.2.model=models/b"))


def test_the_tree_survives_its_way_to_the_front(tmp_path: Path) -> None:
    """What the supervisor writes is what the front reads, and only the owner may read the file."""
    config: ServeConfig = load(sets=[MODEL, "server.allow_origin=a,b", "limits.max_body_bytes=1MiB"], environ={}).config
    path = tmp_path / "config.json"
    write_config(config, path)

    assert config == read_config(path)
    assert path.stat().st_mode & 0o777 == 0o600
