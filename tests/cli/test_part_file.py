"""What a long run has done so far: read back after any cut, and never lost on the way."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest

from trilithon.cli._part_file import PartFile, ResumeError

RUN, MODELS = {"seed": 7}, {"reader": "Zoë"}
PIECES = [{"text": "naïve"}, {"text": "水車小屋 \u2028 👩\u200d🚀"}, {"text": "end"}]


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """A run that ended."""
    file = PartFile(tmp_path / "whole", RUN, restart=False)
    file.begin(MODELS)
    for piece in PIECES:
        file.add(piece)
    return file.path.read_bytes()


def test_R10_a_run_goes_on_from_any_byte(whole: bytes, tmp_path: Path) -> None:
    """
    In the middle of a line and of a character: the pieces before it are there, the cut one is gone, and what is added
    then makes the file of an undisturbed run. Inverses seen red: the cut part decoded, the cut part left in the file.
    """
    path = tmp_path / "cut"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        done = max(0, whole[:size].count(b"\n") - 1)
        file = PartFile(path, RUN, restart=False)
        found = list(file.pieces)
        file.begin(MODELS)
        for piece in PIECES[done:]:
            file.add(piece)

        assert found == PIECES[:done]
        assert path.read_bytes() == whole
    with pytest.raises(ResumeError):
        PartFile(path, {"seed": 8}, restart=False)


def test_R10_a_run_is_kept_where_nothing_can_be_written(whole: bytes, tmp_path: Path) -> None:
    """
    Reading what there is writes nothing, so a full disk, or a kill at that moment, loses no piece. Inverse seen red:
    the whole lines written again.
    """
    path = tmp_path / "cut"
    path.write_bytes(whole[:-5])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        pieces = PartFile(path, RUN, restart=False).pieces
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert pieces == PIECES[:2]
    assert PartFile(path, RUN, restart=False).pieces == PIECES[:2]


@pytest.mark.parametrize("line", [b"{half", b"\xff", b"[1]", b""])
def test_R10_a_damaged_line_is_told_with_its_number(whole: bytes, tmp_path: Path, line: bytes) -> None:
    """And the file stays as it is: the other pieces are good. Inverse seen red: the line read as it stands."""
    path = tmp_path / "damaged"
    lines = whole.split(b"\n")
    lines[2] = line
    path.write_bytes(b"\n".join(lines))

    with pytest.raises(ResumeError, match=re.escape("damaged:3 is damaged. Take the line out, or add --restart.")):
        PartFile(path, RUN, restart=False)
    assert path.read_bytes() == b"\n".join(lines)
