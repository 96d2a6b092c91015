"""The database behind one class."""

from __future__ import annotations

import asyncio
import time

from gateway.store.audit import AuditStore
from gateway.store.checkpoints import CheckpointStore
from gateway.store.custom_losses import CustomLossStore
from gateway.store.database import Database
from gateway.store.deposits import DepositStore
from gateway.store.duties import DutyStore
from gateway.store.engine_facts import EngineFactStore
from gateway.store.futures import FutureStore
from gateway.store.gateways import GatewayStore
from gateway.store.keys import KeyStore
from gateway.store.leases import LeaseStore
from gateway.store.records import ApiKey
from gateway.store.replicas import ReplicaStore
from gateway.store.retention import RetentionStore
from gateway.store.runs import RunStore
from gateway.store.samplers import SamplerStore
from gateway.store.secrets import SecretStore
from gateway.store.sessions import SessionStore
from gateway.store.snapshots import SnapshotStore
from gateway.store.usage import UsageStore

_ASKED_EVERY_S = 1.0
_TRIED_WITHIN_S = 3.0


class Store:
    """One attribute for each kind of record. Methods raise StoreUnavailable when the database does not answer."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.keys = KeyStore(database)
        self.sessions = SessionStore(database)
        self.runs = RunStore(database)
        self.futures = FutureStore(database)
        self.checkpoints = CheckpointStore(database)
        self.deposits = DepositStore(database)
        self.samplers = SamplerStore(database)
        self.snapshots = SnapshotStore(database)
        self.custom_losses = CustomLossStore(database)
        self.leases = LeaseStore(database)
        self.replicas = ReplicaStore(database)
        self.retention = RetentionStore(database)
        self.duties = DutyStore(database)
        self.engine_facts = EngineFactStore(database)
        self.gateways = GatewayStore(database)
        self.secrets = SecretStore(database)
        self.usage = UsageStore(database)
        self.audit = AuditStore(database)
        self._asked: asyncio.Task[list[ApiKey]] | None = None
        self._asked_at = float("-inf")
        self._trial: asyncio.Task[None] | None = None
        self._tried_at = float("-inf")

    async def answers(self) -> None:
        """Raises StoreUnavailable when the database does not answer; it is asked once a second at most."""
        now = time.monotonic()
        if self._asked is None or now - self._asked_at > _ASKED_EVERY_S:
            self._asked_at = now
            self._asked = asyncio.create_task(self.keys.all())
        await asyncio.shield(self._asked)

    async def problem(self) -> str | None:
        """Why nothing can be stored at present; None: nothing is known to be wrong. After a failure it is tried with
        some bytes whether that has passed, once a second at most."""
        if self.database.storing.problem is None:
            return None
        now = time.monotonic()
        if self._trial is None or (self._trial.done() and now - self._tried_at > _ASKED_EVERY_S):
            self._tried_at = now
            self._trial = asyncio.create_task(self.database.try_to_store())
        await asyncio.wait({self._trial}, timeout=_TRIED_WITHIN_S)
        return self.database.storing.problem

    def start(self) -> None:
        """Start accepting writes; call it in the running loop."""
        self.database.start()

    async def close(self) -> None:
        """Finish the writes under way and close every connection."""
        await self.database.close()
