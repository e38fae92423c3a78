"""
Generate the committed Python code of every .proto file: the wire contract's and the engine's internal stream.

    python clients/proto/generate.py            write the generated files
    python clients/proto/generate.py --check    exit 1 when they differ from what is committed

Run it with the oldest grpcio-tools that the project supports (generated code refuses an older runtime) and
mypy-protobuf installed beside it, whose stubs pass strict checking where protoc's own do not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]  # ships no stubs

ROOT = Path(__file__).resolve().parents[2]
API_PROTOS = ROOT / "clients" / "proto"
API_CODE = ROOT / "clients" / "python"
SERVER = ROOT / "server"
WIRE = "trilithon_server/engine/wire.proto"


def run_protoc(arguments: list[str]) -> None:
    """Run protoc in this process. Raises SystemExit when it complains."""
    # protoc looks for its mypy plugins on PATH; they are installed beside this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if protoc.main(["protoc", *arguments]) != 0:
        raise SystemExit(2)


def generate(api_out: Path, server_out: Path) -> list[tuple[Path, Path]]:
    """Write all generated code below the two folders; returns (generated, committed) paths."""
    protos = sorted(API_PROTOS.rglob("*.proto"))
    names = [str(path.relative_to(API_PROTOS)) for path in protos]
    services = [name for name, path in zip(names, protos, strict=True) if "\nservice " in path.read_text("utf-8")]
    run_protoc([f"-I{API_PROTOS}", f"--python_out={api_out}", f"--mypy_out=quiet:{api_out}", *names])
    run_protoc([f"-I{API_PROTOS}", f"--grpc_python_out={api_out}", f"--mypy_grpc_out=quiet:{api_out}", *services])
    run_protoc([f"-I{SERVER}", f"--python_out={server_out}", f"--mypy_out=quiet:{server_out}", WIRE])
    return [
        (path, committed / path.relative_to(out))
        for out, committed in ((api_out, API_CODE), (server_out, SERVER))
        for path in sorted(out.rglob("*.py*"))
    ]


def main(arguments: list[str]) -> int:
    """Generate in place, or compare with what is there."""
    parser = argparse.ArgumentParser(description="Generate the committed protobuf code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the committed code differs")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        api_out, server_out = Path(folder, "api"), Path(folder, "server")
        api_out.mkdir()
        server_out.mkdir()
        pairs = generate(api_out, server_out)
        stale = [(new, old) for new, old in pairs if not old.exists() or old.read_bytes() != new.read_bytes()]
        for new, old in stale:
            print(f"{'differs' if options.check else 'wrote'}: {old.relative_to(ROOT)}")
            if not options.check:
                old.parent.mkdir(parents=True, exist_ok=True)
                old.write_bytes(new.read_bytes())
    if options.check and stale:
        print("Run `python clients/proto/generate.py` and commit the result.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
