"""An adapter's two files as the tar that a gateway imports, made while it is sent."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

FILES = ("adapter_config.json", "adapter_model.safetensors")

_CHUNK = 1 << 20
_END = bytes(2 * tarfile.BLOCKSIZE)


class AdapterTar:
    """The tar of a folder in PEFT's format. Raises OSError when a file cannot be read."""

    def __init__(self, folder: Path) -> None:
        self._files = [folder / name for name in FILES]
        self._sizes = [path.stat().st_size for path in self._files]

    @property
    def headers(self) -> dict[str, str]:
        """What describes the body."""
        whole = len(_END) + sum(tarfile.BLOCKSIZE + size + _padding(size) for size in self._sizes)
        return {"Content-Type": "application/x-tar", "Content-Length": str(whole)}

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the body."""
        for path, size in zip(self._files, self._sizes, strict=True):
            entry = tarfile.TarInfo(path.name)
            entry.size = size
            yield entry.tobuf(tarfile.GNU_FORMAT)
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    yield chunk
            yield bytes(_padding(size))
        yield _END


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
