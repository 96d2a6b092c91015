"""An S3-compatible server of a test's own (moto's), and buckets on it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import httpx
import pytest

from tests.served import free_port


@contextmanager
def object_store() -> Iterator[str]:
    """Its address, while the block lasts."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            try:
                httpx.get(url, timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


def new_bucket(server: str, environment: pytest.MonkeyPatch) -> str:
    """The URL of a prefix in a new bucket; the environment says how it is reached."""
    environment.setenv("AWS_ENDPOINT_URL", server)
    environment.setenv("AWS_ACCESS_KEY_ID", "tests")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "tests")
    environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"tandem-{time.time_ns()}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}/some/prefix"
