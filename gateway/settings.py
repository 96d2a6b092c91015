"""All settings of the gateway, each default once. The environment is read in this file only.

A setting comes from, in this order: an environment variable `TANDEM_<NAME>`, the TOML file that `TANDEM_CONFIG` names,
its default. A variable for a list or a table holds JSON. An unknown key or a value of the wrong type is refused.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import msgspec
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from engines.environment import for_engine
from engines.misfit import misfit_of
from engines.storage import FolderStorage
from gateway.engine_settings import BUILT_IN, EngineSettings, check_engines
from gateway.errors import ConfigurationError

MiB = 1 << 20
_PREFIX = "TANDEM_"
_SHORTEST_TOKEN_S = 900
_LONGEST_TOKEN_S = 7 * 86400
_SHORTEST_ADDRESS_S = 600
_SHORTEST_SILENCE_S = 300
_LONGEST_ADDRESS_S = 7 * 86400
_POSTGRES = "postgresql+asyncpg"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one gateway process."""

    data_dir: Path = Path("data")
    """Folder for the embedded database, checkpoints and what is being uploaded."""
    database_url: str = ""
    """SQLAlchemy URL: `postgresql+asyncpg://user@host/name`; empty: SQLite in `data_dir`."""
    database_wait_s: float = 30.0
    """Seconds for which a gateway that starts waits for a Postgres that does not answer; after that it ends."""
    sqlite_synchronous: Literal["FULL", "NORMAL"] = "FULL"
    """FULL: an accepted operation survives a power loss. NORMAL: it survives the death of any process."""
    engines: tuple[EngineSettings, ...] = (EngineSettings(name="tiny", base_model=BUILT_IN),)
    """The engine processes to start, and the base models they serve."""
    allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    """Host names by which local clients may call while no API keys are configured."""
    public_url: str = ""
    """What clients put before `/api/v1` to reach this gateway, for addresses that it hands out; empty: what the
    request that asks for one was sent to."""
    internal_url: str = ""
    """Where other gateways of the same database reach this one, `http://10.0.0.5:8000` say: they pass on to it OpenAI
    requests for engines that it has; empty: they answer those with 503."""
    download_url_s: float = 3600.0
    """Seconds that an address of a download is good for; clients ask for the next one 300 s before the end."""
    token_exchange: bool = True
    """Whether the official SDK is told to exchange its API key for short-lived tokens; its `whoami` needs them."""
    token_lifetime_s: float = 3600.0
    """Seconds that such a token is good for; at least 900: many SDKs ask for the next one 300 s before the end."""
    completion_queue: bool = True
    """Whether the official SDK is told to learn of finished samples in one waiting request for all of a sampler's,
    instead of one for each."""
    custom_loss_server_side: bool = True
    """Whether the official SDK is told to upload losses that it has traced, where every engine that trains computes
    them, instead of computing them itself between two passes."""
    hold_s: float = 30.0
    """Seconds that retrieve_future waits for a result before it answers `try_again`; at most 40."""
    gap_timeout_s: float = 600.0
    """Seconds after which operations that wait for a missing seq_id fail."""
    max_body_bytes: int = 64 * MiB
    """Largest request body, as sent."""
    max_decompressed_bytes: int = 256 * MiB
    """Largest request body after decompression."""
    body_memory_bytes: int = 256 * MiB
    """Bytes of the bodies of all requests that are in memory at a time, as sent, and as many decompressed."""
    max_import_bytes: int = 1024 * MiB
    """Largest adapter that can be imported, as a tar."""
    max_checkpoint_bytes: int = 1024 * 1024 * MiB
    """Bytes that all checkpoints of one owner, and weights that samplers have without one, may have; beyond, nothing
    more is saved, copied or imported."""
    max_queued_per_run: int = 20_000
    """Operations of one run that may wait."""
    max_queued_per_owner: int = 50_000
    """Operations of all runs of one owner that may wait for one engine."""
    max_queued_samples: int = 20_000
    """Samples of one owner that may wait for one engine."""
    max_queued_bytes: int = 4096 * MiB
    """Bytes that the inputs of all calls of one owner may have that wait for one engine."""
    announced_result_bytes: int = 1 * MiB
    """Results from this size on are announced, with their size, to clients that ask for that, before they are sent."""
    samples_in_engine: int = 256
    """Samples that are handed to an engine at a time; the rest wait in the gateway, owners in turn."""
    input_cache_bytes: int = 64 * MiB
    """Inputs kept in memory for each engine until it gets them; all are in the database as well."""
    result_cache_bytes: int = 64 * MiB
    """Results kept in memory for clients that are about to fetch them; all are in the database as well."""
    engine_start_timeout_s: float = 600.0
    """Seconds in which an engine process must have loaded its model."""
    engine_restart_delay_s: float = 0.5
    """Seconds before an engine that died is started again; doubles with each life in a row that has answered no call,
    up to a minute."""
    engine_owner_timeout_s: float = 8.0
    """Seconds without a sign of life from the gateway after which an engine process exits, whatever it is doing; on
    Postgres at most two thirds of `lease_s`, so that it has ended when another gateway takes the lease."""
    engine_silence_s: float = 15.0
    """Seconds without a sign of life from an engine process, in a call or not, after which it is killed and replaced;
    four times as long while it loads."""
    engine_hang_s: float = 600.0
    """Seconds in which one call or decoding step gets no further, after which the process is killed and replaced."""
    max_attempts: int = 2
    """Engines that may die over an operation before it fails."""
    drain_s: float = 10.0
    """Seconds in which a gateway that is to end finishes the calls at hand; the rest is done by its successor."""
    snapshot_steps: int = 20
    """Optimizer steps after which the server saves a run's state for its own recovery; 0: never so."""
    snapshot_s: float = 60.0
    """Seconds after which it does so at the next optimizer step; 0: not by time."""
    snapshot_keep_s: float = 600.0
    """Seconds for which older snapshots stay, for backups that copy the database first and the files after it."""
    snapshot_url: str = ""
    """Where snapshots are kept, as a URL of fsspec: `s3://bucket/prefix`; empty: in `data_dir`, beside checkpoints."""
    storage_url: str = ""
    """Where checkpoints, samplers' weights and snapshots are stored, as a URL of fsspec, for engines and gateways that
    have no folder in common; empty: in `data_dir`."""
    lease_s: float = 15.0
    """Seconds for which a gateway holds an engine's lease; renewed three times in each."""
    session_timeout_s: float = 86400.0
    """Seconds without a sign of life from its client after which a session ends; at least 300."""
    result_retention_s: float = 7 * 86400.0
    """Seconds for which a result can be fetched."""
    future_retention_s: float = 30 * 86400.0
    """Seconds for which calls are remembered that no log needs; at least `result_retention_s`."""
    unnamed_retention_s: float = 86400.0
    """Seconds for which weights that were saved without a name, and a sampler's of a deleted checkpoint, are kept after
    the end of the session, inflight ones after newer ones, and others without a name after newer ones and their last
    use; at least 300."""
    duty_s: float = 60.0
    """Seconds from one round of a background duty to the next: deleting what has expired, freeing what nobody needs."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Level of the gateway's log."""

    @property
    def storage_dir(self) -> Path:
        """The folder that storage keys are relative to; with `storage_url` that of this machine's copies."""
        return self.data_dir / ("copies" if self.storage_url else "storage")

    @property
    def storage(self) -> FolderStorage:
        """What is stored, by keys."""
        return FolderStorage(self.storage_dir, self.storage_url)

    @property
    def url(self) -> str:
        """The database's URL, also when it is the embedded one."""
        return self.database_url or f"sqlite:///{self.data_dir / 'tandem.db'}"

    @property
    def embedded(self) -> bool:
        """Whether the database is SQLite."""
        return self.url.startswith("sqlite")


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings. Raises ConfigurationError naming the setting and what is allowed."""
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    config = environ.get(_PREFIX + "CONFIG")
    if config:
        values = _read_toml(Path(config))
    known = {field.name: field for field in msgspec.structs.fields(Settings)}
    for variable, text in environ.items():
        name = variable.removeprefix(_PREFIX).lower()
        if not variable.startswith(_PREFIX) or variable in (_PREFIX + "CONFIG", *_CLIENT_VARIABLES):
            continue
        if name not in known:
            raise ConfigurationError(
                f"{variable} is no setting of Tandem; known are {', '.join(sorted(known))}"
            )
        values[name] = _from_text(variable, text) if name in _STRUCTURED else text
    try:
        settings = msgspec.convert(values, Settings, strict=False, dec_hook=_decoded)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"setting {misfit_of(error)}") from error
    return _checked(settings)


def _decoded(wanted: type, value: Any) -> Any:
    """A folder is written as text, in a variable and in TOML."""
    if wanted is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"expected {wanted.__name__}, got {type(value).__name__}")


_STRUCTURED = {"engines", "allowed_hosts"}
_CLIENT_VARIABLES = ("TANDEM_URL", "TANDEM_API_KEY")
"""Variables of the command line client, which a shell may hold too."""


def engine_environment(devices: str | None = None) -> dict[str, str]:
    """What an engine process sees of this one's environment: no setting of the gateway, so no password either; and of
    the GPUs only those that `devices` names.

    Its interpreter finds `engines`, installed there or not.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_PREFIX)}
    if devices is not None:
        kept["CUDA_VISIBLE_DEVICES"] = devices
    return for_engine(kept)


def _from_text(variable: str, text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{variable} must hold JSON: {error}") from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"TANDEM_CONFIG: cannot read {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"TANDEM_CONFIG: {path} is not TOML: {error}") from error


def _checked(settings: Settings) -> Settings:
    """What types cannot say."""
    check_engines(settings.engines)
    _check_database(settings)
    _check_numbers(settings)
    _check_times(settings)
    for name in ("max_body_bytes", "max_decompressed_bytes"):
        if getattr(settings, name) > settings.body_memory_bytes:
            raise ConfigurationError(
                f"body_memory_bytes is {settings.body_memory_bytes}; the largest body must fit: {name} is "
                f"{getattr(settings, name)}"
            )
    _check_retention(settings)
    _check_leases(settings)
    _check_what_clients_meet(settings)
    if settings.snapshot_url and settings.storage_url:
        raise ConfigurationError(
            "snapshot_url and storage_url are both set: with storage_url snapshots are stored there too; leave "
            "snapshot_url out"
        )
    return settings


def _check_database(settings: Settings) -> None:
    """What is not understood of the URL is not repeated: it may hold a password."""
    try:
        driver = make_url(settings.url).drivername
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            f"database_url cannot be understood; it is to be {_POSTGRES}://user:password@host/name, with what is "
            "special in user and password percent-encoded, or empty"
        ) from None
    if driver != _POSTGRES and driver.partition("+")[0] != "sqlite":
        raise ConfigurationError(
            f"database_url begins with {driver!r}; it must begin with {_POSTGRES}, or be empty: the embedded database"
        )
    if driver == _POSTGRES and find_spec("asyncpg") is None:
        raise ConfigurationError(
            "database_url is of a Postgres, for which asyncpg is needed: install the extra `postgres`, as in "
            "pip install -e '.[postgres]'"
        )


def _check_numbers(settings: Settings) -> None:
    for field in msgspec.structs.fields(Settings):  # no comparison below refuses what is no number
        if field.type is float and math.isnan(getattr(settings, field.name)):
            raise ConfigurationError(f"{field.name} is nan; it must be a number")
    for name in (
        "max_body_bytes",
        "max_decompressed_bytes",
        "max_import_bytes",
        "max_checkpoint_bytes",
        "max_queued_per_run",
        "max_queued_per_owner",
        "max_queued_samples",
        "max_queued_bytes",
        "samples_in_engine",
        "max_attempts",
    ):
        if getattr(settings, name) < 1:
            raise ConfigurationError(f"{name} is {getattr(settings, name)}; it must be at least 1")
    for name in (
        "database_wait_s",
        "announced_result_bytes",
        "input_cache_bytes",
        "result_cache_bytes",
        "engine_restart_delay_s",
        "snapshot_steps",
        "snapshot_s",
        "snapshot_keep_s",
    ):
        if getattr(settings, name) < 0:
            raise ConfigurationError(f"{name} is {getattr(settings, name)}; it must be at least 0")


def _check_retention(settings: Settings) -> None:
    for name in ("session_timeout_s", "unnamed_retention_s"):
        if getattr(settings, name) < _SHORTEST_SILENCE_S:
            raise ConfigurationError(
                f"{name} is {getattr(settings, name)}; it must be at least {_SHORTEST_SILENCE_S} seconds"
            )
    if not 0 < settings.result_retention_s <= settings.future_retention_s:
        raise ConfigurationError(
            f"result_retention_s is {settings.result_retention_s}; it must be above 0 and at most future_retention_s, "
            f"which is {settings.future_retention_s}"
        )


def _check_times(settings: Settings) -> None:
    for name in (
        "gap_timeout_s",
        "lease_s",
        "engine_start_timeout_s",
        "engine_owner_timeout_s",
        "duty_s",
        "drain_s",
    ):
        if getattr(settings, name) <= 0:
            raise ConfigurationError(f"{name} is {getattr(settings, name)}; it must be above 0 seconds")
    for name in ("engine_silence_s", "engine_hang_s"):
        if getattr(settings, name) < 1:
            raise ConfigurationError(f"{name} is {getattr(settings, name)}; it must be at least 1 second")


def _check_leases(settings: Settings) -> None:
    """A lease was renewed up to a third of it before its holder fell silent; two thirds later it may be taken."""
    if not settings.embedded and settings.engine_owner_timeout_s > settings.lease_s * 2 / 3:
        raise ConfigurationError(
            f"engine_owner_timeout_s is {settings.engine_owner_timeout_s} and lease_s is {settings.lease_s}; it must "
            "be at most two thirds of that, for the engine of a gateway that is silent must have ended when another "
            "one takes its lease"
        )


def _check_what_clients_meet(settings: Settings) -> None:
    if not 0 < settings.hold_s <= 40:
        raise ConfigurationError(f"hold_s is {settings.hold_s}; it must be above 0 and at most 40 seconds")
    if not _SHORTEST_TOKEN_S <= settings.token_lifetime_s <= _LONGEST_TOKEN_S:
        raise ConfigurationError(
            f"token_lifetime_s is {settings.token_lifetime_s}; it must be {_SHORTEST_TOKEN_S} to {_LONGEST_TOKEN_S} "
            "seconds"
        )
    if not _SHORTEST_ADDRESS_S <= settings.download_url_s <= _LONGEST_ADDRESS_S:
        raise ConfigurationError(
            f"download_url_s is {settings.download_url_s}; it must be {_SHORTEST_ADDRESS_S} to {_LONGEST_ADDRESS_S} "
            "seconds"
        )
    for name in ("public_url", "internal_url"):
        url = getattr(settings, name)
        if url and not url.startswith(("http://", "https://")):
            raise ConfigurationError(f"{name} is {url!r}; it must begin with http:// or https://")
