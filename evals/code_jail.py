"""Builds the sandbox's file system inside the namespaces of `unshare`, where bubblewrap is missing; runs a command.

    python code_jail.py ROOT TMP_BYTES MOUNTS COMMAND...

ROOT is an empty folder; MOUNTS a JSON list of [source, target], bound read-only at ROOT + target, where a source that
starts with '->' is the text of a symbolic link. The command starts with no capability, and with no way to gain one.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

RDONLY, NOSUID, NODEV, REMOUNT, BIND, MOVE, REC = 1, 2, 4, 32, 4096, 8192, 16384  # MS_* of mount(2)
LOCKED = 15  # the flags (read-only, no set-uid, no devices, no execution) that a remount may not drop
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38

libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2). Raises OSError."""
    if libc.mount(source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), data.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


def mounted_under(root: str) -> list[str]:
    """The mount points at and below a folder."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if f"{point}/".startswith(f"{root}/")]


def build(root: str, tmp_bytes: int, mounts: list[list[str]]) -> None:
    """Makes ROOT the root of the file system, with the mounts and a private /tmp, all else read-only or absent."""
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=0755")
    Path(root, "tmp").mkdir()
    mount("tmpfs", f"{root}/tmp", "tmpfs", NOSUID | NODEV, f"size={tmp_bytes},mode=0700")
    for source, target in mounts:
        place = Path(root + target)
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.startswith("->"):
            place.symlink_to(source[2:])
            continue
        place.mkdir(exist_ok=True) if Path(source).is_dir() else place.touch()
        mount(source, str(place), None, BIND | REC)
        for point in mounted_under(str(place)):
            mount("none", point, None, BIND | REMOUNT | RDONLY | os.statvfs(point).f_flag & LOCKED)
    mount("none", root, None, BIND | REMOUNT | RDONLY | NOSUID | NODEV)
    os.chdir(root)
    mount(root, "/", None, MOVE)
    os.chroot(".")
    os.chdir("/tmp")


def main() -> None:
    """Builds the root, gives up all privilege and becomes the command."""
    root, tmp_bytes, mounts, *command = sys.argv[1:]
    build(root, int(tmp_bytes), json.loads(mounts))
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
