"""Which file systems SQLite must not lie on: those whose locks other hosts cannot see."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

# f_type of statfs(2), from linux/magic.h and the file systems' own headers.
_NETWORK = {
    0x6969: "nfs",
    0x517B: "smb",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x00C36400: "ceph",
    0x5346414F: "afs",
    0x6B414653: "afs",
    0x73757245: "coda",
    0x01161970: "gfs2",
    0x7461636F: "ocfs2",
    0x0BD00BD0: "lustre",
    0x19830326: "beegfs",
    0x47504653: "gpfs",
}
_STATFS_BYTES = 512  # more than the structure has on any Linux; its first word is f_type


def network_file_system(path: Path) -> str | None:
    """The name of the network file system that an existing `path` lies on; None for a local one, or off Linux."""
    return _NETWORK.get(_magic(path))


def _magic(path: Path) -> int:
    if os.uname().sysname != "Linux":
        return 0
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(path), buffer) != 0:
        raise OSError(ctypes.get_errno(), "statfs failed", str(path))
    return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF
