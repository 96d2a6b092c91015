"""Snapshots of runs, and what a replay is compared with"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "snapshots",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("seq_id", sa.BigInteger(), nullable=False, comment="the last operation that it contains"),
        sa.Column("step", sa.Integer(), nullable=False, comment="optimizer steps that it contains"),
        sa.Column("folder", sa.String(), nullable=False, comment="storage key"),
        sa.Column("checksums", sa.JSON(), nullable=False, comment="SHA-256 of each file"),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column(
            "damage", sa.String(), comment="why it could not be restored; none: not known to be damaged"
        ),
        sa.Column(
            "superseded_at",
            sa.Double(),
            comment="since when newer ones suffice; its files go some time later",
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_snapshots_run_id")),
        sa.PrimaryKeyConstraint("run_id", "seq_id", name=op.f("pk_snapshots")),
    )
    op.create_index(op.f("ix_snapshots_folder"), "snapshots", ["folder"])
    with op.batch_alter_table("runs") as batch:
        batch.add_column(
            sa.Column(
                "pruned_seq",
                sa.BigInteger(),
                nullable=False,
                server_default="0",
                comment="inputs from 1 to this one may be gone: snapshots cover them",
            )
        )
        batch.add_column(
            sa.Column(
                "replay_difference",
                sa.String(),
                comment="what the last replay that gave other numbers has shown",
            )
        )
    with op.batch_alter_table("futures") as batch:
        batch.add_column(
            sa.Column(
                "result_digest",
                sa.LargeBinary(),
                comment="128 bits of the result, of a deterministic engine",
            )
        )
        batch.add_column(sa.Column("measure", sa.Double(), comment="loss of a pass, gradient norm of a step"))


def downgrade() -> None:
    with op.batch_alter_table("futures") as batch:
        batch.drop_column("measure")
        batch.drop_column("result_digest")
    with op.batch_alter_table("runs") as batch:
        batch.drop_column("replay_difference")
        batch.drop_column("pruned_seq")
    op.drop_index(op.f("ix_snapshots_folder"), "snapshots")
    op.drop_table("snapshots")
