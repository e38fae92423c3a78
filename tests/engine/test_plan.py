"""Plans, outputs, frames and specs survive their way between processes; what is damaged or foreign is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilithon_parallel.config import ModelError
from trilithon_parallel.models.seq2seq_serving import Sources
from trilithon_server.engine.framing import MAX_FRAME_BYTES, FrameReader, FramingError, frame
from trilithon_server.engine.logprobs import TokenInfo
from trilithon_server.engine.memory import available_bytes, kv_bytes
from trilithon_server.engine.pace import DEADLINE_FACTOR, MIN_DEADLINE_S, Pace
from trilithon_server.engine.plan import (
    Encoding,
    Kind,
    Score,
    StepOutput,
    StepPlan,
    decode_output,
    decode_plan,
    digest,
    encode_output,
    encode_plan,
)
from trilithon_server.engine.sampler import Draw, Drawn
from trilithon_server.engine.spec import EngineSpec
from trilithon_server.engine.wire_pb2 import Pooling, Sampling, Submit

SMALL = st.integers(0, 2**40)
LISTS = st.lists(SMALL, max_size=5)


@given(
    entries=st.lists(st.tuples(SMALL, SMALL, LISTS), max_size=4),
    tokens=LISTS,
    copies=st.lists(st.tuples(SMALL, SMALL), max_size=3),
    masks=st.lists(st.one_of(st.none(), st.binary(min_size=1, max_size=9)), max_size=4),
    kind=st.sampled_from(list(Kind)),
    forgotten=LISTS,
)
def test_a_plan_comes_out_as_it_went_in(
    entries: list[tuple[int, int, list[int]]],
    tokens: list[int],
    copies: list[tuple[int, int]],
    masks: list[bytes | None],
    kind: Kind,
    forgotten: list[int],
) -> None:
    """Every field of a plan survives the encoding."""
    plan = StepPlan(
        7,
        kind,
        tokens=tokens,
        starts=[start for start, _, _ in entries],
        lengths=[length for _, length, _ in entries],
        tables=[table for _, _, table in entries],
        copies=copies,
        draws=[Draw(row, row + 1, mask) for row, mask in enumerate(masks)],
        scores=[Score(0, 3, 1, 5)] * len(copies),
        types=tokens,
        positions=tokens[::-1],
        pools=[Pooling(kind=Pooling.LAST, normalize=True)],
        encodings=[Encoding(tokens, table) for _, _, table in entries],
        reads=[Sources([length], table, [0.1, -2.5] if length % 2 else []) for _, length, table in entries],
        registrations=[(5, Submit(prompt=[1, 2], sampling=Sampling(seed=2**63)))],
        forgotten=forgotten,
        deadline_s=2.5,
    )
    header, payload = encode_plan(plan)

    assert header.tolist() == [7, payload.size, digest(payload.tobytes())]
    assert decode_plan(7, payload.tobytes()) == plan


INFOS = st.builds(
    TokenInfo,
    st.integers(0, 99),
    st.floats(-50, 0),
    st.integers(1, 99),
    st.lists(st.tuples(st.integers(0, 99), st.floats(-50, 0), st.integers(1, 99)), max_size=3).map(tuple),
)


@given(
    drawn=st.lists(st.builds(Drawn, st.integers(-2, 99), st.one_of(st.none(), INFOS)), max_size=4),
    scores=st.lists(st.one_of(st.none(), st.lists(INFOS, max_size=3)), max_size=3),
    vectors=st.lists(st.binary(max_size=16), max_size=3),
)
def test_an_output_comes_out_as_it_went_in(
    drawn: list[Drawn], scores: list[list[TokenInfo] | None], vectors: list[bytes]
) -> None:
    """Every field of an output survives the encoding, float by float."""
    output = StepOutput(3, drawn, scores, vectors, busy_s=0.25, model_s=0.125)
    _header, payload = encode_output(output)

    assert decode_output(3, payload.tobytes()) == output


@given(messages=st.lists(st.binary(max_size=40), max_size=6), cuts=st.lists(st.integers(1, 7), min_size=1))
def test_frames_are_found_however_they_arrive(messages: list[bytes], cuts: list[int]) -> None:
    """Any cutting of the stream gives the same messages."""
    stream = b"".join(frame(message) for message in messages)
    reader, found, at, turn = FrameReader(), list[bytes](), 0, 0
    while at < len(stream):
        size = cuts[turn % len(cuts)]
        found += reader.feed(stream[at : at + size])
        at, turn = at + size, turn + 1

    assert found == messages


def test_an_absurd_frame_is_refused_before_it_is_read() -> None:
    """A length beyond the bound ends the stream at once, in both directions."""
    with pytest.raises(FramingError, match="at most"):
        FrameReader().feed(b"\xff\xff\xff\xff")
    with pytest.raises(FramingError, match="at most"):
        frame(bytes(MAX_FRAME_BYTES + 1))


def test_a_spec_survives_its_file_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    """Unknown keys and impossible values are errors in words."""
    spec = EngineSpec(name="main", model_dir="m", tp=2, pp=3, kv_cache_bytes=5)
    path = tmp_path / "spec.json"
    path.write_text(spec.to_json(), encoding="utf-8")

    assert EngineSpec.load(path) == spec
    with pytest.raises(ValueError, match="unknown keys"):
        EngineSpec.from_json(json.dumps({"name": "a", "model_dir": "m", "colour": 1}))
    with pytest.raises(ValueError, match="`tp` must be at least 1"):
        EngineSpec(name="a", model_dir="m", tp=0)


def test_R11_the_kv_cache_takes_its_share_or_is_refused_with_the_sum() -> None:
    """The automatic size is a share of the rest; a size that was asked for fits or is refused."""
    common = {"weights": 100, "activations": 50, "overhead": 50, "bytes_per_block": 10, "min_blocks": 2}

    assert kv_bytes(**common, available=1000, asked=None, fraction=0.5, max_blocks=100) == 400
    assert kv_bytes(**common, available=1000, asked=None, fraction=0.5, max_blocks=7) == 70
    assert kv_bytes(**common, available=1000, asked=795, fraction=0.5, max_blocks=7) == 790
    for available, asked in ((1000, 900), (205, None), (100, None)):
        with pytest.raises(ModelError, match="memory must hold"):
            kv_bytes(**common, available=available, asked=asked, fraction=0.5, max_blocks=100)
    with pytest.raises(ModelError, match="at least 2 blocks"):
        kv_bytes(**common, available=1000, asked=15, fraction=0.5, max_blocks=100)


def test_available_memory_is_what_the_machine_says_at_most() -> None:
    """The figure is positive and within the machine's memory."""
    import torch

    total = next(int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines())

    assert 0 < available_bytes(torch.device("cpu")) <= total


def test_R3_deadlines_grow_with_the_work() -> None:
    """A long prefill publishes a long deadline; a short step the least one."""
    pace = Pace(slots=2)
    pace.warmed_up(100, seconds=50.0)

    assert pace.deadline_s(0) == 2 * MIN_DEADLINE_S
    assert pace.deadline_s(1000) == 2 * DEADLINE_FACTOR * 500.0
