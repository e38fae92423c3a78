"""Data files are read strictly, and whatever they hold becomes findings, never an exception or a full memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon_finetune.data.findings import Finding
from trilithon_finetune.data.reading import Limits, Row, read_rows
from trilithon_finetune.data.strict_json import MAX_DEPTH

SMALL = Limits(row=64, document=256, expanded=4096, ratio=20, ratio_from=1024, block=16)


def _read(content: bytes, *, name: str = "train.jsonl", limits: Limits = SMALL) -> list[Row | Finding]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return list(read_rows(path, limits=limits))


def _told(content: bytes, **settings: object) -> list[tuple[str, int, str]]:
    found = _read(content, **settings)  # type: ignore[arg-type]  # passed on
    return [(item.code, item.line, item.message) for item in found if isinstance(item, Finding)]


def test_rows_keep_their_lines() -> None:
    """A byte-order mark, CRLF, U+2028 in a text and empty lines at the end change neither rows nor their numbers."""
    content = '\ufeff{"a": 1}\r\n{"a": "x\u2028y"}\n{"a": 3}\n\n\r\n'.encode()

    assert [Row(1, {"a": 1}), Row(2, {"a": "x\u2028y"}), Row(3, {"a": 3})] == _read(content)


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b'{"a": "\xff"}', "E-DATA-002", "is not UTF-8: 0xff at byte 8 of the row (byte 16 of the file)."),
        (b'{"a": "\\ud800"}', "E-DATA-002", "cannot be UTF-8: \\ud800 is half of a surrogate pair."),
        (b'{"a" 1}', "E-DATA-003", "is not JSON: Expecting ':' delimiter at column 6."),
        (b'{"a": 1} {', "E-DATA-003", "is not JSON: Extra data at column 10."),
        (b'{"a": NaN}', "E-DATA-003", "holds NaN, which is not JSON."),
        (b'{"a": {"b": 1, "b": 2}}', "E-DATA-003", 'has the key "b" twice in one object.'),
        (b'{"a": "\0"}', "E-DATA-003", "holds a NUL byte at byte 8 of the row (byte 16 of the file)."),
        (b'{"a": "\\u0000"}', "E-DATA-003", "holds NUL (\\u0000)."),
        (b'{"a": ' + b"[" * 32 + b"]" * 32 + b"}", "E-DATA-005", "has 71 bytes, at most 64 allowed."),
        (b"[1, 2]", "E-DATA-004", "must be an object. Given: [1, 2]."),
        (b'"text"', "E-DATA-004", 'must be an object. Given: "text".'),
        (b"", "E-DATA-003", "is empty, not JSON."),
        (b" \n\n", "E-DATA-003", "is empty (3 lines), not JSON."),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("E-") else None,
)
def test_S10_R11_a_bad_row_is_one_finding(content: bytes, code: str, message: str) -> None:
    """
    Each kind of bad row is one finding with its line and what is wrong there, and the rows around it are read.

    Inverse check: without `object_pairs_hook` the key that stands twice fails here.
    """
    found = _read(b'{"a": 1}\n' + content + b'\n{"a": 2}\n')

    assert [(code, 2, message)] == [(f.code, f.line, f.message) for f in found if isinstance(f, Finding)]
    assert [row.value for row in found if isinstance(row, Row)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 100_000])
def test_S10_nesting_has_an_end(depth: int) -> None:
    """Rows may nest 32 deep, the row itself counted; deeper ones are refused, however deep."""
    row = b'{"a": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
    found = _told(row, limits=Limits())

    assert found == ([] if depth <= MAX_DEPTH else [("E-DATA-003", 1, "is nested deeper than 32 lists and objects.")])


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        (b"", "train.jsonl", [("E-DATA-001", 0, "has no rows.")]),
        (b"\n\n", "train.jsonl", [("E-DATA-001", 0, "has no rows.")]),
        (
            '{"a": 1}\n'.encode("utf-16"),
            "train.jsonl",
            [("E-DATA-002", 0, "is UTF-16: byte 0 of the file is not UTF-8. Save it as UTF-8.")],
        ),
        (b"a,b\n", "t.csv", [("E-DATA-003", 0, "is a .csv file by its name, which is not read.")]),
    ],
    ids=["empty", "blank", "utf-16", "csv"],
)
def test_R11_a_file_that_is_none_is_one_finding(content: bytes, name: str, told: list[tuple[str, int, str]]) -> None:
    """A file that holds no rows at all is one finding, not one a line."""
    assert told == _told(content, name=name)


def test_gzip_is_read_by_its_bytes() -> None:
    """A compressed file gives the rows of the plain one, members one behind another, whatever its name."""
    plain = b'{"a": 1}\n{"a": 2}\n'
    packed = gzip.compress(plain[:12]) + gzip.compress(plain[12:])

    assert _read(plain) == _read(packed) == _read(packed, name="train.jsonl.gz")


def test_S10_a_gzip_bomb_is_refused() -> None:
    """
    A file that expands beyond the ratio or the absolute limit is refused when it does; nothing is read on.

    Inverse check: without the limits all of its rows are read.
    """
    rows = b'{"a": "' + b"x" * 50 + b'"}\n'
    bomb = gzip.compress(rows * 2000)
    by_ratio = _told(bomb, limits=SMALL)
    by_size = _told(bomb, limits=Limits(expanded=4096, ratio=10**6, block=16))

    assert [("E-DATA-005", 0)] == [found[:2] for found in by_ratio] == [found[:2] for found in by_size]
    assert "20 times are allowed" in by_ratio[0][2]
    assert "more than 4,096" in by_size[0][2]


def test_R11_broken_gzip_names_the_line() -> None:
    """A compressed file that breaks off, or is damaged, gives its sound rows and then one finding with the line."""
    rows = b"".join(b'{"a": %d}\n' % i for i in range(200))
    packed = gzip.compress(rows)
    cut = _read(packed[: len(packed) // 2])
    damaged = _told(packed[:40] + b"\xff" * 8 + packed[48:])

    assert isinstance(cut[-1], Finding)
    assert cut[-1].message.startswith("is not sound gzip: it breaks off in line ")
    assert damaged[-1][2].startswith("is not sound gzip: ")


def test_S10_a_huge_line_is_counted_not_held(tmp_path: Path) -> None:
    """
    A line of 256 MB is one finding; the row behind it is read; the process never holds more than some blocks.

    Inverse check: with a file read line by line (`for line in file`) the peak is above 256 MB.
    """
    path = tmp_path / "train.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n')
        file.seek(256 << 20)
        file.write(b'\n{"a": 3}\n')
    script = (
        "import sys; from pathlib import Path\n"
        "from trilithon_finetune.data.reading import read_rows\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) << 10\n"
        "before = peak()\n"
        "found = [(getattr(i, 'code', 'row'), i.line) for i in read_rows(Path(sys.argv[1]))]\n"
        "print([found, peak() - before])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    found, grown = json.loads(done.stdout.replace("(", "[").replace(")", "]").replace("'", '"'))

    assert found == [["row", 1], ["E-DATA-005", 2], ["row", 3]]
    assert grown < 32 << 20


@settings(deadline=None)
@given(content=st.binary(max_size=300))
def test_S10_any_bytes_give_rows_and_findings(content: bytes) -> None:
    """Whatever a file holds, reading it ends, raises nothing, and tells of every line at most once."""
    for limits in (SMALL, Limits(block=16)):
        found = _read(content, limits=limits)
        lines = [item.line for item in found if item.line]
        assert lines == sorted(set(lines))


LINES = st.lists(
    st.one_of(
        st.dictionaries(st.text(max_size=4), st.one_of(st.integers(), st.text(max_size=8), st.none()), max_size=3).map(
            lambda row: json.dumps(row).encode()
        ),
        st.binary(max_size=90).map(lambda raw: raw.replace(b"\n", b"")),
    ),
    max_size=8,
)


@settings(deadline=None)
@given(lines=LINES, ends=st.sampled_from([b"\n", b"\r\n"]), block=st.integers(3, 50))
def test_reading_does_not_depend_on_blocks(lines: list[bytes], ends: bytes, block: int) -> None:
    """Rows and findings are the same however the file is cut into blocks, packed or plain."""
    content = b'{"first": 1}' + ends + ends.join(lines)
    whole = _read(content, limits=Limits(row=64))

    assert whole == _read(content, limits=Limits(row=64, block=block))
    assert whole == _read(gzip.compress(content), limits=Limits(row=64, block=block))
