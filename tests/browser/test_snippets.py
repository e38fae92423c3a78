"""The code of README and docs, run against a real server under its real ports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser.pages import Server

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"


ELSEWHERE = re.compile(r"fine_tuning|/v1/files|client\.(files|jobs|retrieval|openqa)")
"""Code that needs a server with jobs and a data file, or with an encoder: `finetune_cli` and `openqa` run it."""

ANSWERED = ('"choices"', '"candidates"', "event: finished")
"""One of these stands in an answer that is no error."""


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, code) of every block of a language that talks to a server, but for what makes jobs."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [
        (page.name, code) for page in pages for code in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)
    ]
    return [(page, code) for page, code in found if "127.0.0.1:800" in code and not ELSEWHERE.search(code)]


def here(code: str, server: Server) -> str:
    """The same code with this server's ports and model, and shorter answers."""
    code = code.replace("127.0.0.1:8000", server.origin.removeprefix("http://"))
    code = code.replace("127.0.0.1:8001", f"127.0.0.1:{server.grpc_port}")
    # Whole numbers only: a port may well hold the same digits.
    return re.sub(r"\b(48|32)\b", "8", code.replace(MODEL, server.model))


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: value if value.endswith(".md") else "")
def test_python_snippets_run(page: str, code: str, server: Server, tmp_path: Path) -> None:
    """Pasted into a file and run, a snippet exits with 0 and prints an answer."""
    file = tmp_path / "snippet.py"
    file.write_text(here(code, server))
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(("page", "code"), blocks("console"), ids=lambda value: value if value.endswith(".md") else "")
def test_curl_lines_run(page: str, code: str, server: Server) -> None:
    """Each curl line of a console block, up to its end or that of its quotes, is answered without an error."""
    lines = re.findall(r"^\$ (curl (?:[^'\n\\]|\\\n|'[^']*')*)", here(code, server), re.M)
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False, env={**os.environ}
        )
        assert done.returncode == 0, done.stderr
        assert any(mark in done.stdout for mark in ANSWERED), done.stdout
