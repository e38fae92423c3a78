"""What `trilithon serve --jobs` runs: the front that serves jobs too, and a worker beside the server."""

from __future__ import annotations

from pathlib import Path

from trilithon_finetune.paths import StorePaths
from trilithon_server.config import ServeConfig
from trilithon_server.config_sources import ConfigError
from trilithon_server.engine.companions import python_module
from trilithon_server.extension import Companion, Launch

FRONT_MODULE = "trilithon_finetune.api.front"
WORKER_MODULE = "trilithon_finetune.jobs.worker"


def launch(config: ServeConfig) -> Launch:
    """
    The processes of a server with jobs.

    Args:
        config: with `jobs.store` set; the catalogue of models becomes the store's own unless another is named.
    Raises:
        ConfigError: the store cannot be made.
    """
    assert config.jobs.store is not None
    root = Path(config.jobs.store).expanduser().absolute()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"jobs.store must be a directory. Given: {root} ({error.strerror})."]) from None
    jobs = config.jobs.model_copy(update={"store": str(root)})
    server = config.server
    if server.catalog is None:
        server = server.model_copy(update={"catalog": str(StorePaths(root).models)})
    config = config.model_copy(update={"jobs": jobs, "server": server})
    return Launch(
        config=config,
        front_module=FRONT_MODULE,
        companions=(_worker(config, root),) if jobs.slots else (),
    )


def _worker(config: ServeConfig, root: Path) -> Companion:
    arguments = ["--store", str(root), "--slots", str(config.jobs.slots)]
    if config.jobs.database is not None:
        arguments += ["--database", config.jobs.database]
    for engine in config.engines:
        arguments += ["--model", f"{engine.served_name or engine.name}={engine.model}"]
    if config.server.concepts is not None:
        arguments += ["--concepts", config.server.concepts]
    return Companion(name="worker", argv=python_module(WORKER_MODULE, *arguments))
