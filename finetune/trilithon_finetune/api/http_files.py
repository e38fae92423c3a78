"""The HTTP routes of files: uploads and downloads pass through in pieces."""

from __future__ import annotations

import asyncio
from typing import Any, BinaryIO

from trilithon_finetune.api import answers
from trilithon_finetune.api.checks import Checks
from trilithon_finetune.api.door import Door
from trilithon_finetune.api.frames import NOSNIFF, PAGE, busy, calm
from trilithon_finetune.api.requests import check_config, page_limit, parsed, purpose_of, report_of
from trilithon_finetune.api.schemas import ValidateBody
from trilithon_finetune.api.uploads import read_upload
from trilithon_finetune.jobs.records import File
from trilithon_server.http.endpoint import Route
from trilithon_server.http.exchange import Exchange

PIECE_BYTES = 256 << 10

_FILE = "/v1/files/{file_id}"
_UPLOAD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "purpose": {"enum": ["fine-tune", "evidence"], "description": "Before the file."},
        "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        "file": {"type": "string", "format": "binary"},
    },
    "required": ["purpose", "file"],
}


class HttpFiles:
    """Handlers over the door."""

    def __init__(self, door: Door, checks: Checks) -> None:
        self._door = door
        self._checks = checks

    def routes(self) -> tuple[Route, ...]:
        """The table."""
        return (
            Route(
                method="POST", path="/v1/files", handler=busy(self._door, self._upload), form=_UPLOAD, answer="File",
                summary="Store a file, in OpenAI's shape.",
            ),
            Route(
                method="GET", path="/v1/files", handler=calm(self._files), answer="Files",
                query={**PAGE, "purpose": {"enum": ["fine-tune", "fine-tune-results", "evidence"]}},
                more_errors=("503",), summary="Files, newest first.",
            ),
            Route(
                method="GET", path=_FILE, handler=calm(self._file), answer="File", more_errors=("503",),
                summary="One file.",
            ),
            Route(
                method="DELETE", path=_FILE, handler=busy(self._door, self._delete), answer="FileDeleted",
                more_errors=("409", "503"), summary="Remove a file that no running job reads.",
            ),
            Route(
                method="GET", path=f"{_FILE}/content", handler=calm(self._content),
                media="application/octet-stream", more_errors=("503",), summary="The bytes of a file.",
            ),
            Route(
                method="POST", path=f"{_FILE}/validate", handler=busy(self._door, self._validate), request=ValidateBody,
                answer="DatasetReport", summary="Everything that is wrong with a data file for a task.",
            ),
        )  # fmt: skip

    async def _upload(self, exchange: Exchange, tenant: str) -> None:
        upload = await read_upload(exchange, max_file_bytes=self._door.limits.max_file_bytes)
        file = await self._door.jobs.receive_file(
            upload.pieces,
            tenant=tenant,
            filename=upload.filename,
            purpose=purpose_of(upload.fields.get("purpose")),
            sha256=upload.fields.get("sha256"),
        )
        await exchange.respond_json(answers.file(file))

    async def _files(self, exchange: Exchange, tenant: str) -> None:
        query = exchange.query((*PAGE, "purpose"))
        page = await self._door.run(
            self._door.jobs.list_files,
            tenant=tenant,
            after=query.get("after"),
            limit=page_limit(query),
            purpose=purpose_of(query["purpose"], made=True) if "purpose" in query else None,
        )
        await exchange.respond_json(answers.page(page, answers.file))

    async def _file(self, exchange: Exchange, tenant: str) -> None:
        exchange.query(())
        file = await self._door.run(self._door.jobs.get_file, exchange.path_params["file_id"], tenant=tenant)
        await exchange.respond_json(answers.file(file))

    async def _delete(self, exchange: Exchange, tenant: str) -> None:
        file_id = exchange.path_params["file_id"]
        await self._door.run(self._door.jobs.delete_file, file_id, tenant=tenant)
        await exchange.respond_json({"object": "file", "id": file_id, "deleted": True})

    async def _content(self, exchange: Exchange, tenant: str) -> None:
        exchange.query(())
        file = await self._door.run(self._door.jobs.get_file, exchange.path_params["file_id"], tenant=tenant)
        source = await self._door.open_file(file.id, tenant=tenant)
        with source:
            await exchange.race(self._send(exchange, source, file))

    async def _send(self, exchange: Exchange, source: BinaryIO, file: File) -> None:
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"content-length", str(file.bytes).encode()),
            (b"content-disposition", b'attachment; filename="' + file.filename.encode("ascii", "replace") + b'"'),
            NOSNIFF,
            *exchange.common_headers(),
        ]
        exchange.started = True
        await exchange.send({"type": "http.response.start", "status": 200, "headers": headers})
        left = 0 if exchange.method == "HEAD" else file.bytes
        while left:
            piece = await self._door.run(source.read, min(PIECE_BYTES, left))
            left -= len(piece)
            async with asyncio.timeout(self._door.limits.slow_reader_s):
                await exchange.send({"type": "http.response.body", "body": piece, "more_body": left > 0})
        if file.bytes == 0 or exchange.method == "HEAD":
            await exchange.send({"type": "http.response.body", "body": b""})

    async def _validate(self, exchange: Exchange, tenant: str) -> None:
        body = await parsed(ValidateBody, exchange)
        config = check_config(body.model, body.task, exchange.path_params["file_id"], self._door.limits)

        async def work() -> None:
            data = await self._checks.validate(config, tenant=tenant, max_findings=body.max_findings)
            await exchange.respond_json(report_of(data))

        await exchange.race(work())
