"""How `make test` shares tests out among its processes."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

ONE_SERVER = ("adapters", "browser", "extract", "finetune_cli", "jobs_api", "openqa", "security", "server", "stories")
"""Folders whose files ask one server, which takes seconds to start: a process that runs one file runs all of them."""

FIRST = ("training", "equivalence", "finetune_cli", "life", "browser", "jobs_api", "server", "stories", "jobs", "heads")
"""Folders that take longest begin, so that what is left at the end is short."""


class Sharing(LoadFileScheduling):
    """By files, as `--dist loadfile`, but for the folders of `ONE_SERVER`."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        folder = file.rpartition("/")[0]
        return folder if folder.rpartition("/")[2] in ONE_SERVER else file


def rank(folder: str) -> int:
    """A folder's place: the lower the earlier."""
    return FIRST.index(folder) if folder in FIRST else len(FIRST)
