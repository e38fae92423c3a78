"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trilithon_parallel.data.publish import publish_folder


def test_R10_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    """While it is filled it is not there; afterwards it is, and nothing beside it."""

    def fill(aside: Path) -> None:
        (aside / "a").write_text("1")
        assert not (tmp_path / "f").exists()

    assert publish_folder(tmp_path / "f", fill)
    assert (tmp_path / "f" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["f"]


def test_R10_a_folder_that_cannot_be_filled_is_not_there(tmp_path: Path) -> None:
    """An error half way, as of a full disk, leaves no folder and no temporary name."""

    def fill(aside: Path) -> None:
        (aside / "a").write_text("1")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        publish_folder(tmp_path / "f", fill)
    assert os.listdir(tmp_path) == []


def test_the_first_of_two_stays(tmp_path: Path) -> None:
    """Who comes second is told so, and changes nothing."""

    def second(aside: Path) -> None:
        (aside / "a").write_text("second")
        assert publish_folder(tmp_path / "f", lambda inner: (inner / "a").write_text("first") and None)

    assert not publish_folder(tmp_path / "f", second)
    assert (tmp_path / "f" / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["f"]
