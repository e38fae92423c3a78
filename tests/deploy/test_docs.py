"""The documentation, held against the code and against itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def test_reference_tables_are_what_the_code_says() -> None:
    """`make docs` would change nothing. Seen red with a default changed in the settings tree."""
    command = [sys.executable, ROOT / "docs/generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file of the repository, and a heading of it where it has a fragment."""
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", page.read_text()):
        if target and "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page: Path) -> None:
    """Blocks marked as Python parse; those that call a server are run against one in tests/browser/test_snippets.py."""
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=lambda page: page.name)
def test_prose_has_one_sentence_per_line(page: Path) -> None:
    """Outside tables and code, a full stop followed by another sentence starts a new line, so that diffs read well."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    prose = [
        line for line in text.splitlines() if not line.startswith(("|", "#", "-", "<", " ")) and not line[:1].isdigit()
    ]

    assert [line for line in prose if re.search(r"[a-z)`]\. [A-Z]", line)] == []


def test_every_page_is_in_the_list() -> None:
    """docs/README.md names every page."""
    index = (ROOT / "docs/README.md").read_text()

    assert [page.name for page in PAGES if page.parent.name == "docs" and page.name != "README.md"] == sorted(
        set(re.findall(r"\(([a-z-]+\.md)\)", index))
    )
