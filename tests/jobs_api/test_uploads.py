"""Uploads: streamed, bounded, and refused before work (S5, S10)."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from front_server import ACME
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs_server import JobsServer

from trilithon import Client
from trilithon.api.v1 import finetune_pb2 as pb
from trilithon.api.v1 import finetune_pb2_grpc
from trilithon.errors import InvalidArgument, TrilithonError
from trilithon_finetune.api.uploads import _Parts

MAX_BYTES = 1 << 20
METADATA = (("x-api-key", ACME),)
FIELD = b'--B\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
FILE = b'--B\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{}\n\r\n'
END = b"--B--\r\n"


def test_bytes_arrive_as_they_were(client: Client, served_jobs: JobsServer) -> None:
    """Any bytes come through, gzip among them, up to the limit and not beyond it."""
    packed = gzip.compress(b'{"messages": []}\n' * 100)
    largest = bytes(range(256)) * (MAX_BYTES // 256)

    for data in (packed, largest):
        file = client.files.upload(data, filename="rows.jsonl.gz")
        assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert served_jobs.jobs.file_path(file.id, tenant="acme").read_bytes() == data
    with pytest.raises(TrilithonError) as caught:
        client.files.upload(largest + b"x", filename="rows.jsonl")
    assert caught.value.code == "body_too_large"


def post(served_jobs: JobsServer, body: bytes, boundary: str = "B") -> Any:
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    return served_jobs.http.post("/v1/files", content=body, headers=headers)


@pytest.mark.parametrize(
    ("body", "code", "part"),
    [
        (FILE + END, "missing_parameter", "before the file"),
        (FIELD + END, "missing_parameter", "`file` must be set"),
        (FIELD + FIELD + FILE + END, "invalid_value", "come once"),
        (FIELD.replace(b"purpose", b"purposes") + FILE + END, "unknown_parameter", "purposes"),
        (FIELD.replace(b"fine-tune", b"vision") + FILE + END, "invalid_value", "fine-tune, evidence"),
        (FIELD + FILE.replace(b"a.jsonl", b"../a") + END, "invalid_filename", "filename"),
        (FIELD + FILE + FILE + END, "invalid_multipart", "last part"),
        (FIELD + FILE, "invalid_multipart", "within the file"),
        (FIELD + FILE.replace(b"{}\n", b"") + END, "empty", "at least 1 byte"),
        (FIELD.replace(b"fine-tune", b"x" * 2000) + FILE + END, "invalid_value", "at most 1024"),
        (b"nonsense", "invalid_multipart", "well formed"),
        (b"", "missing_parameter", "`file` must be set"),
    ],
)
def test_R11_broken_uploads_are_told_why(served_jobs: JobsServer, body: bytes, code: str, part: str) -> None:
    """Each kind of broken form has its code and a sentence, and leaves nothing behind."""
    before = len(list((served_jobs.jobs.paths.root / "files").iterdir()))

    answer = post(served_jobs, body)

    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code), error
    assert part in error["message"]
    assert len(list((served_jobs.jobs.paths.root / "files").iterdir())) == before


def test_S5_an_upload_is_refused_by_its_length_before_it_is_sent(served_jobs: JobsServer) -> None:
    """A length beyond the limit is answered with 413 while not a byte of the file has been sent."""
    head = (
        "POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + ACME + "\r\n"
        "content-type: multipart/form-data; boundary=B\r\ncontent-length: 99999999\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served_jobs.server.http_port), timeout=30) as connection:
        connection.sendall(head.encode())
        answer = connection.recv(4096)

    assert answer.startswith(b"HTTP/1.1 413")


def test_S5_a_stalled_upload_is_ended(served_jobs: JobsServer) -> None:
    """A client that sends half a file and then nothing is told so, and its bytes are forgotten."""
    head = (
        "POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + ACME + "\r\n"
        "content-type: multipart/form-data; boundary=B\r\ncontent-length: 5000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served_jobs.server.http_port), timeout=60) as connection:
        connection.sendall(head.encode() + FIELD + FILE.removesuffix(b"\n\r\n"))
        answer = connection.recv(4096)

    assert answer.startswith(b"HTTP/1.1 504")
    assert b"body_timeout" in answer
    assert not list((served_jobs.jobs.paths.root / "files").glob(".upload-*"))


@pytest.mark.parametrize(
    ("parts", "code", "status"),
    [
        ([], "MISSING_PARAMETER", grpc.StatusCode.INVALID_ARGUMENT),
        ([b"x"], "MISSING_PARAMETER", grpc.StatusCode.INVALID_ARGUMENT),
        ([{"bytes": 5}, b"1234"], "SIZE_MISMATCH", grpc.StatusCode.INVALID_ARGUMENT),
        ([{"bytes": 3}, b"1234"], "SIZE_MISMATCH", grpc.StatusCode.INVALID_ARGUMENT),
        ([{"sha256": "0" * 64}, b"1234"], "DIGEST_MISMATCH", grpc.StatusCode.INVALID_ARGUMENT),
        ([{}, {}], "INVALID_VALUE", grpc.StatusCode.INVALID_ARGUMENT),
        ([{"bytes": 1 << 40}, b"1"], "BODY_TOO_LARGE", grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_R11_broken_streams_are_told_why(
    served_jobs: JobsServer, parts: list[Any], code: str, status: grpc.StatusCode
) -> None:
    """A stream of chunks that breaks a rule has its code, and leaves nothing behind."""

    def messages() -> Iterator[pb.UploadFileRequest]:
        for part in parts:
            if isinstance(part, bytes):
                yield pb.UploadFileRequest(chunk=part)
            else:
                yield pb.UploadFileRequest(
                    header=pb.FileHeader(**{"filename": "a.jsonl", "purpose": "fine-tune", **part})
                )

    before = len(list((served_jobs.jobs.paths.root / "files").iterdir()))
    with served_jobs.channel() as channel:
        stub = finetune_pb2_grpc.FinetuneServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.UploadFile(messages(), metadata=METADATA, timeout=30)

    error: Any = caught.value
    assert error.code() == status
    trailing = dict(error.trailing_metadata())
    assert code.encode() in trailing["grpc-status-details-bin"]
    assert len(list((served_jobs.jobs.paths.root / "files").iterdir())) == before


def test_S9_bytes_that_are_no_message_are_the_senders_mistake(served_jobs: JobsServer) -> None:
    """A client stream of garbage is INVALID_ARGUMENT, not INTERNAL."""
    with served_jobs.channel() as channel:
        call = channel.stream_unary("/trilithon.api.v1.FinetuneService/UploadFile", lambda b: b, lambda b: b)
        with pytest.raises(grpc.RpcError) as caught:
            call(iter([b"\xff\xff\xff"]), metadata=METADATA, timeout=30)

    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]  # the stubs lack it


@settings(deadline=None, max_examples=200)
@given(
    data=st.binary(max_size=200),
    cuts=st.lists(st.integers(0, 400), max_size=6),
)
def test_a_form_survives_any_split(data: bytes, cuts: list[int]) -> None:
    """Wherever the network cuts the bytes, the same fields and file come out."""
    if b"\r\n--B" in b"\r\n" + data:
        data = data.replace(b"--B", b"--C")
    body = FIELD + FILE.replace(b"{}\n", data) + END
    parts = _Parts(b"B")

    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    for start, end in itertools.pairwise(edges):
        parts.feed(body[start:end])

    assert [bytes(part.data) for part in parts.parts] == [b"fine-tune", data]
    assert [part.name for part in parts.parts] == ["purpose", "file"]
    assert parts.finished


def test_a_boundary_of_any_length_is_answered() -> None:
    """A boundary longer than any client sends is refused with a reason."""
    with pytest.raises((InvalidArgument, ValueError)):
        _Parts(b"x" * 10_000)
