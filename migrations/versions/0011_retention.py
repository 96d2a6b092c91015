"""What is kept for how long: times of results, released samplers, and indexes of what may go"""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

INDEXES = {
    "ix_sessions_alive": ("sessions", "created_at", "finished_at is null"),
    "ix_runs_ended": ("runs", "last_request_at", "status in ('unloaded', 'failed')"),
    "ix_futures_spent": (
        "futures",
        "finished_at",
        "finished_at is not null and (status = 'failed' or kind not in "
        "('create_run', 'forward_backward', 'optim_step', 'load_weights'))",
    ),
    "ix_futures_folder": ("futures", "folder", "folder is not null"),
    "ix_samplers_unnamed": (
        "samplers",
        "session_id",
        "path is null and folder is not null and released_at is null",
    ),
}


def upgrade() -> None:
    # Results from before count as stored now. The default is for them only: PostgreSQL then need not write them again.
    with op.batch_alter_table("results") as batch:
        batch.add_column(
            sa.Column("stored_at", sa.Double(), nullable=False, server_default=f"{time.time():.3f}")
        )
    with op.batch_alter_table("results") as batch:
        batch.alter_column("stored_at", server_default=None)
    op.create_index(op.f("ix_results_stored_at"), "results", ["stored_at"])
    with op.batch_alter_table("samplers") as batch:
        batch.add_column(sa.Column("released_at", sa.Double(), comment="when unnamed weights were given up"))
    op.drop_index("ix_futures_folder", "futures")
    for name, (table, column, condition) in INDEXES.items():
        where = sa.text(condition)
        op.create_index(name, table, [column], sqlite_where=where, postgresql_where=where)
    op.create_index(op.f("ix_futures_created_at"), "futures", ["created_at"])
    op.execute(
        "DELETE FROM inputs WHERE request_id IN (SELECT request_id FROM futures WHERE finished_at is not null and "
        "(status = 'failed' or kind not in ('create_run', 'forward_backward', 'optim_step', 'load_weights')))"
    )


def downgrade() -> None:
    op.drop_index(op.f("ix_futures_created_at"), "futures")
    for name, (table, _, _) in INDEXES.items():
        op.drop_index(name, table)
    op.create_index(op.f("ix_futures_folder"), "futures", ["folder"])
    with op.batch_alter_table("samplers") as batch:
        batch.drop_column("released_at")
    op.drop_index(op.f("ix_results_stored_at"), "results")
    with op.batch_alter_table("results") as batch:
        batch.drop_column("stored_at")
