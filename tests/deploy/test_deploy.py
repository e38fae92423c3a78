"""What `docker compose up` reads, held against the server that it starts: no container runs here."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from trilithon_server.cli import add_serve_arguments
from trilithon_server.config import LimitsConfig
from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.engine_client import EngineClient
from trilithon_server.flags import load_from_args
from trilithon_server.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy/grafana/dashboards/trilithon.json"
RULES = ROOT / "deploy/prometheus/rules.yml"
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice, which plain YAML takes in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]  # PyYAML
        assert len(keys) == len(set(keys)), f"a key is given twice near {node.start_mark}"
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader=_UniqueKeys)


def fill(text: str) -> str:
    """Compose's `${NAME:-default}` with nothing set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document: dict[str, Any] = read_yaml(ROOT / "docker-compose.yml")
    return document


@pytest.fixture(scope="module")
def served_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Every series name that a server with one engine exports."""
    metrics = Metrics(version="0")
    engine = EngineClient(name="main", socket_path=tmp_path_factory.mktemp("run") / "main.sock", limits=LimitsConfig())
    engine.hello, engine.losses = wire.Hello(tp=1, pp=1), {"killed": 1}
    engine.hello.startup_seconds["weights"] = 1.0
    metrics.watch_engine("m", engine)
    return {f"{family.name}{end}" for family in metrics.registry.collect() for end in _SUFFIXES[family.type]}


def dashboard_queries() -> list[tuple[str, str]]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])]


def rule_queries() -> list[tuple[str, str]]:
    groups = read_yaml(RULES)["groups"]
    return [(rule.get("record") or rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


@pytest.mark.parametrize(("title", "query"), [*dashboard_queries(), *rule_queries()])
def test_query_parses_and_reads_metrics_that_the_server_has(title: str, query: str, served_names: set[str]) -> None:
    """Every query is PromQL, and no series in it is a name that nobody exports. Seen red with `_totl` for `_total`."""
    promql_parser.parse(query.replace("$__rate_interval", "1m").replace("$model", "m"))
    recorded = {rule["record"] for group in read_yaml(RULES)["groups"] for rule in group["rules"] if "record" in rule}
    asked = set(re.findall(r"\btrilithon[_:][a-z0-9_:]*", query))

    assert asked <= served_names | recorded
    assert asked or "up{" in query


def test_the_dashboard_shows_every_metric(served_names: set[str]) -> None:
    """A metric that the server exports is on the dashboard, but for two that only carry labels."""
    text = " ".join(query for _, query in dashboard_queries())
    shown = {name for name in served_names if re.search(rf"\b{name}\b", text)}
    base = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in served_names}
    seen = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in shown}

    assert base - seen == {"trilithon_build_info", "trilithon_cache_config_info"}


def test_the_dashboard_is_what_its_script_writes() -> None:
    """The JSON is never edited by hand."""
    script = ROOT / "deploy/grafana/dashboard.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_panels_lie_side_by_side_within_the_grid() -> None:
    """No two panels overlap and none reaches past column 24."""
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken
        taken |= cells


def test_ports_are_published_on_loopback_only(compose: dict[str, Any]) -> None:
    """Nothing that compose starts can be reached from another machine. Seen red with "8000:8000"."""
    ports = {name: service.get("ports", []) for name, service in compose["services"].items()}

    assert set(ports) == {"server", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for published in ports.values() for port in published)
    assert not any("9464" in port for port in ports["server"])


def test_services_run_without_privileges(compose: dict[str, Any]) -> None:
    """A user that is not root, no capabilities, no way to gain any, an image of a stated version."""
    for name, service in compose["services"].items():
        assert not fill(service["user"]).startswith("0"), name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"])
        assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service)


def test_keys_come_from_secret_files(compose: dict[str, Any]) -> None:
    """No secret stands in the file or in an environment variable."""
    secrets = compose["secrets"]
    used = {secret for service in compose["services"].values() for secret in service.get("secrets", [])}
    text = (ROOT / "docker-compose.yml").read_text()

    assert used == set(secrets)
    assert all(set(secret) == {"file"} for secret in secrets.values())
    assert "TRILITHON_API_KEYS" not in text
    assert not re.search(r"PASSWORD: ", text)


def test_health_is_readiness(compose: dict[str, Any]) -> None:
    """The server's container is healthy when the server is ready, in compose and in the image alike."""
    assert "/readyz" in " ".join(compose["services"]["server"]["healthcheck"]["test"])
    assert "/readyz" in (ROOT / "deploy/Dockerfile").read_text()
    assert all("healthcheck" in service for service in compose["services"].values())


def test_the_server_takes_the_command_line(compose: dict[str, Any], tmp_path: Path) -> None:
    """Compose passes flags that exist, with values that the server's own settings accept."""
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    verb, *arguments = [fill(part) for part in compose["services"]["server"]["command"]]
    loaded = load_from_args(parser.parse_args(arguments))
    server = loaded.config.server

    assert verb == "serve"
    assert (server.host, server.http_port, server.grpc_port, server.metrics_port) == ("0.0.0.0", 8000, 8001, 9464)
    assert server.api_keys_file == "/run/secrets/api_keys"
    assert int(compose["services"]["server"]["stop_grace_period"].rstrip("s")) > server.drain_seconds


def test_every_mounted_file_is_there(compose: dict[str, Any]) -> None:
    """Bind mounts of the repository name what exists, read-only; the rest are declared volumes."""
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source, _, rest = fill(volume).partition(":")
            if source.startswith("./"):
                assert (ROOT / source).exists(), source
                assert rest.endswith(":ro")
            elif not source.startswith("~"):
                assert source in compose["volumes"]


def test_prometheus_scrapes_the_server_and_loads_the_rules(compose: dict[str, Any]) -> None:
    """The scrape target is the server's metrics listener, and every rule file exists."""
    config = read_yaml(ROOT / "deploy/prometheus/prometheus.yml")
    targets = [
        target for job in config["scrape_configs"] for group in job["static_configs"] for target in group["targets"]
    ]

    assert targets == ["server:9464"]
    assert [(ROOT / "deploy/prometheus" / name).exists() for name in config["rule_files"]] == [True]
    assert set(config) == {"global", "rule_files", "scrape_configs"}


def test_alerts_say_what_to_do() -> None:
    """Each alert has a severity, a sentence and an action."""
    rules = [rule for group in read_yaml(RULES)["groups"] for rule in group["rules"] if "alert" in rule]
    for rule in rules:
        assert rule["labels"]["severity"] in {"page", "warn"}
        assert set(rule["annotations"]) == {"summary", "action"}
    assert len({rule["alert"] for rule in rules}) == len(rules)


def test_grafana_is_provisioned_with_the_dashboard(compose: dict[str, Any]) -> None:
    """The data source's address is the Prometheus service, and the dashboards' folder is the mounted one."""
    provisioning = ROOT / "deploy/grafana/provisioning"
    source = read_yaml(provisioning / "datasources/prometheus.yml")["datasources"][0]
    folder = read_yaml(provisioning / "dashboards/trilithon.yml")["providers"][0]["options"]["path"]
    mounts = [fill(volume).split(":") for volume in compose["services"]["grafana"]["volumes"]]

    assert source["url"] == "http://prometheus:9090"
    assert ["./deploy/grafana/dashboards", folder, "ro"] in mounts


def test_the_image_is_built_from_what_exists_and_does_not_run_as_root() -> None:
    """Every COPY names something in the tree and in .dockerignore's exceptions; the last USER is not root."""
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    copied = [part for line in lines if line.startswith("COPY") and "--from" not in line for part in line.split()[1:-1]]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    users = [line.split()[1] for line in lines if line.startswith("USER")]

    assert copied
    assert all((ROOT / name).exists() for name in copied)
    assert set(copied) == kept
    assert users[-1].split(":")[0] not in {"root", "0"}
