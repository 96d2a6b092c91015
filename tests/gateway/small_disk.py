"""A small disk of its own, which a test can fill, empty, and make read-only."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class SmallDisk:
    """A file system in memory, mounted at `folder`."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._size = f"size={megabytes}m"
        self._mount("-t", "tmpfs", "-o", f"{self._size},mode=0777", "tandem-test")

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Take all the room, but for some bytes."""
        free = os.statvfs(self.folder)
        with self._ballast.open("ab") as file:
            os.posix_fallocate(file.fileno(), file.tell(), free.f_bavail * free.f_frsize - leave)

    def empty(self) -> None:
        """Give back what `fill` took."""
        self._ballast.unlink()

    def set_read_only(self, read_only: bool) -> None:
        self._mount("-o", f"remount,{'ro' if read_only else 'rw'},{self._size}")

    def close(self) -> None:
        # lazily: whoever still has a file open, as a killed server may for a moment, keeps it
        subprocess.run(["umount", "-l", self.folder], check=True, capture_output=True)

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, self.folder], check=True, capture_output=True)


def may_mount() -> bool:
    """Whether this process may mount a file system: root outside a container mostly, others mostly not."""
    probe = Path(f"/tmp/small-disk-{os.getpid()}")
    try:
        SmallDisk(probe, 1).close()
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        if probe.exists():
            probe.rmdir()
    return True
