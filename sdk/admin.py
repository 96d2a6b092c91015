"""A small typed client of the admin API (`/admin/v1`): what a gateway holds and does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from sdk.adapter_tar import AdapterTar
from sdk.admin_records import (
    Checkpoint,
    Deletion,
    Engine,
    Future,
    Import,
    Metrics,
    Page,
    Replicas,
    Run,
    Sampler,
    SamplerComparison,
    Session,
    Snapshot,
    Step,
)
from sdk.answers import refusal, silence
from sdk.environment import DEFAULT_URL, takes_proxies
from sdk.exports import Exported, require_new, unpack

T = TypeVar("T")

_SCHEME = "tinker://"
_PAGE = 100
_CHUNK = 1 << 20
_STEPS_IN_A_PAGE = 1000


class AdminError(Exception):
    """The gateway refused, or there is none. The message is its own sentence; `status` is the HTTP status, None when
    nothing was answered."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class AdminClient:
    """The admin API of the gateway at `url`.

    `key` may be left out for a gateway on this machine that has no keys configured. Lists are iterators, newest first,
    that ask for the next page when they need it; a filter that is None filters nothing. Others' things are shown to an
    admin's key only. Every method raises AdminError.
    """

    def __init__(self, url: str = DEFAULT_URL, key: str | None = None, *, timeout_s: float = 60.0) -> None:
        self.url = url.rstrip("/")
        try:
            base = httpx.URL(f"{self.url}/admin/v1/")
        except httpx.InvalidURL as error:
            raise AdminError(silence(url, error)) from error
        self.host = base.host
        self._http = httpx.Client(
            base_url=base,
            headers={"X-API-Key": key} if key else {},
            timeout=timeout_s,
            trust_env=takes_proxies(base.host),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def runs(
        self,
        *,
        owner: str | None = None,
        status: str | None = None,
        base_model: str | None = None,
        session_id: str | None = None,
        page: int = _PAGE,
    ) -> Iterator[Run]:
        """Runs; `page` is how many are asked for at a time."""
        where = {"owner": owner, "status": status, "base_model": base_model, "session_id": session_id}
        return self._walk("runs", where, page, Page[Run])

    def run(self, run_id: str) -> Run:
        """One run."""
        return self._get(f"runs/{_segment(run_id)}", Run)

    def snapshots(self, run_id: str) -> list[Snapshot]:
        """The states of a run that the server keeps for its own recovery, newest first."""
        return self._get(f"runs/{_segment(run_id)}/snapshots", list[Snapshot])

    def steps(self, run_id: str, *, after: int = 0) -> Iterator[Step]:
        """Metrics of a run's optimizer steps above `after`, in order."""
        while True:
            where = {"after": after, "limit": _STEPS_IN_A_PAGE}
            steps = self._get(f"runs/{_segment(run_id)}/metrics", list[Step], where)
            yield from steps
            if len(steps) < _STEPS_IN_A_PAGE:
                return
            after = steps[-1].step

    def checkpoints(
        self,
        *,
        owner: str | None = None,
        run_id: str | None = None,
        kind: str | None = None,
        base_model: str | None = None,
        page: int = _PAGE,
    ) -> Iterator[Checkpoint]:
        """Checkpoints, without expired ones."""
        where = {"owner": owner, "run_id": run_id, "kind": kind, "base_model": base_model}
        return self._walk("checkpoints", where, page, Page[Checkpoint])

    def checkpoint(self, path: str) -> Checkpoint:
        """One checkpoint by its `tinker://` path."""
        return self._get(checkpoint_route(path), Checkpoint)

    def delete_checkpoint(self, path: str) -> None:
        """Delete a checkpoint for good. Runs that began at it and samplers made from it are not affected."""
        self._answer("DELETE", checkpoint_route(path))

    def export_checkpoint(self, path: str, folder: Path, *, base_model: str | None = None) -> Exported:
        """Write the adapter of a checkpoint into a new folder, in PEFT's layout: `adapter_config.json` and
        `adapter_model.safetensors`.

        Its configuration names the base model as it is served here, unless `base_model` says what the reader is to
        load. Raises ExportFailed, besides AdminError, when the folder is not new or cannot be written.
        """
        run_id, kind, name = checkpoint_segments(path)
        route = f"{self.url}/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}/archive"
        require_new(folder)
        location = self._answer("GET", route, moved=True).headers["location"]
        with tempfile.TemporaryFile() as archive:
            self._download(location, archive)
            archive.seek(0)
            return unpack(archive, folder, base_model)

    def _download(self, address: str, file: IO[bytes]) -> None:
        """From an address that needs no key, and therefore gets none."""
        host = httpx.URL(address).host
        try:
            with httpx.stream(
                "GET", address, timeout=self._http.timeout, trust_env=takes_proxies(host)
            ) as answer:
                if not answer.is_success:
                    answer.read()
                    raise AdminError(refusal(self.url, answer), answer.status_code)
                for chunk in answer.iter_bytes(_CHUNK):
                    file.write(chunk)
        except httpx.RequestError as error:
            raise AdminError(silence(self.url, error)) from error

    def delete_checkpoints(
        self,
        *,
        owner: str | None = None,
        run_id: str | None = None,
        kind: str | None = None,
        base_model: str | None = None,
        name_prefix: str | None = None,
        before: datetime | None = None,
        after: datetime | None = None,
        keep_last: int = 0,
        dry_run: bool = False,
    ) -> Deletion:
        """Delete checkpoints by what they are; with `dry_run` only say which.

        At least one condition besides `owner` is needed. Times have a zone. The newest `keep_last` of each run and kind
        stay. At most 1000 go at a time, the oldest first; `more` says that there are others.
        """
        where = {
            "owner": owner,
            "run_id": run_id,
            "kind": kind,
            "base_model": base_model,
            "name_prefix": name_prefix,
            "before": None if before is None else before.isoformat(),
            "after": None if after is None else after.isoformat(),
            "keep_last": keep_last or None,
            "dry_run": dry_run,
        }
        return self._ask("DELETE", "checkpoints", Deletion, where)

    def import_adapter(
        self, folder: Path, *, base_model: str, name: str, ttl_seconds: int | None = None
    ) -> Import:
        """Make a checkpoint, with weights alone, of an adapter in PEFT's format that was trained elsewhere.

        `folder` holds `adapter_config.json` and `adapter_model.safetensors`.
        """
        where = {"base_model": base_model, "name": name, "ttl_seconds": ttl_seconds}
        try:
            archive = AdapterTar(folder)
        except OSError as error:
            raise AdminError(f"{folder} cannot be read: {error.strerror or error}") from error
        return self._ask("POST", "checkpoints", Import, where, archive=archive)

    def samplers(
        self,
        *,
        owner: str | None = None,
        session_id: str | None = None,
        run_id: str | None = None,
        page: int = _PAGE,
    ) -> Iterator[Sampler]:
        """Samplers."""
        where = {"owner": owner, "session_id": session_id, "run_id": run_id}
        return self._walk("samplers", where, page, Page[Sampler])

    def sampler(self, sampler_id: str) -> Sampler:
        """One sampler."""
        return self._get(f"samplers/{_segment(sampler_id)}", Sampler)

    def promote_sampler(self, sampler_id: str, name: str, *, ttl_seconds: int | None = None) -> Checkpoint:
        """Make a checkpoint of unnamed weights, such as save_weights_and_get_sampling_client samples from."""
        body = {"name": name, "ttl_seconds": ttl_seconds}
        return self._ask("POST", f"samplers/{_segment(sampler_id)}/promote", Checkpoint, body=body)

    def compare_sampler(
        self, sampler_id: str, *, samples: int = 8, max_tokens: int = 32, prompt: list[int] | None = None
    ) -> SamplerComparison:
        """Have a sampler draw, and the training engine score what it has drawn."""
        body = {"samples": samples, "max_tokens": max_tokens, "prompt": prompt}
        return self._ask("POST", f"samplers/{_segment(sampler_id)}/compare", SamplerComparison, body=body)

    def sessions(self, *, owner: str | None = None, page: int = _PAGE) -> Iterator[Session]:
        """Sessions."""
        return self._walk("sessions", {"owner": owner}, page, Page[Session])

    def session(self, session_id: str) -> Session:
        """One session."""
        return self._get(f"sessions/{_segment(session_id)}", Session)

    def futures(
        self,
        *,
        owner: str | None = None,
        status: str | None = None,
        kind: str | None = None,
        run_id: str | None = None,
        engine: str | None = None,
        page: int = _PAGE,
    ) -> Iterator[Future]:
        """Accepted calls."""
        where = {"owner": owner, "status": status, "kind": kind, "run_id": run_id, "engine": engine}
        return self._walk("futures", where, page, Page[Future])

    def future(self, request_id: str) -> Future:
        """One accepted call."""
        return self._get(f"futures/{_segment(request_id)}", Future)

    def engines(self) -> list[Engine]:
        """The engine processes of this gateway."""
        return self._get("engines", Page[Engine]).items

    def engine(self, name: str) -> Engine:
        """One engine process."""
        return self._get(f"engines/{_segment(name)}", Engine)

    def replicas(self, engine: str) -> Replicas:
        """The replicas of an engine of the settings."""
        return self._get(f"engines/{_segment(engine)}/replicas", Replicas)

    def set_replicas(self, engine: str, smallest: int, largest: int) -> Replicas:
        """Other bounds of their number than the settings'; for an admin's key."""
        body = {"min": smallest, "max": largest}
        return self._ask("PUT", f"engines/{_segment(engine)}/replicas", Replicas, body=body)

    def reset_replicas(self, engine: str) -> Replicas:
        """The settings' bounds again; for an admin's key."""
        return self._ask("DELETE", f"engines/{_segment(engine)}/replicas", Replicas)

    def metrics(self) -> Metrics:
        """Counters of the gateway process; for an admin's key."""
        return self._get("metrics", Metrics)

    def _walk(self, route: str, where: dict[str, str | None], page: int, form: type[Page[T]]) -> Iterator[T]:
        cursor: str | None = None
        while True:
            answer = self._get(route, form, {**where, "limit": page, "cursor": cursor})
            yield from answer.items
            if answer.next_cursor is None:
                return
            cursor = answer.next_cursor

    def _get(self, route: str, form: type[T], where: dict[str, Any] | None = None) -> T:
        return self._ask("GET", route, form, where)

    def _ask(
        self,
        method: str,
        route: str,
        form: type[T],
        where: dict[str, Any] | None = None,
        *,
        body: dict[str, Any] | None = None,
        archive: AdapterTar | None = None,
    ) -> T:
        given = {name: value for name, value in (where or {}).items() if value is not None}
        response = self._answer(method, route, given, body=body, archive=archive)
        try:
            return msgspec.json.decode(response.content, type=form)
        except msgspec.DecodeError as error:
            raise AdminError(f"{self.url} answers as no gateway of this version does: {error}") from error

    def _answer(
        self,
        method: str,
        route: str,
        where: dict[str, Any] | None = None,
        *,
        body: dict[str, Any] | None = None,
        archive: AdapterTar | None = None,
        moved: bool = False,
    ) -> httpx.Response:
        """An answer that is a success, or with `moved` one that names another address."""
        content, headers = (None, {}) if archive is None else (archive.chunks(), archive.headers)
        try:
            response = self._http.request(
                method, route, params=where, json=body, content=content, headers=headers
            )
        except httpx.RequestError as error:
            raise AdminError(silence(self.url, error)) from error
        if not (response.has_redirect_location if moved else response.is_success):
            raise AdminError(refusal(self.url, response), response.status_code)
        return response


def _segment(text: str) -> str:
    """One segment of a route, whatever is in it."""
    return quote(text, safe=":")


def checkpoint_route(path: str) -> str:
    """Where a checkpoint is found. Raises AdminError for what is no checkpoint's path."""
    return "checkpoints/" + "/".join(checkpoint_segments(path))


def checkpoint_segments(path: str) -> list[str]:
    """Run, kind and name of a checkpoint, as they stand in routes. Raises AdminError."""
    segments = path.removeprefix(_SCHEME).split("/")
    if not path.startswith(_SCHEME) or len(segments) != 3 or not all(segments):
        raise AdminError(
            f"{path!r} is no checkpoint's path; one looks like {_SCHEME}RUN/weights/NAME "
            f"or {_SCHEME}RUN/sampler_weights/NAME"
        )
    return [_segment(segment) for segment in segments]
