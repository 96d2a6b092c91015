"""Samplers that follow their run"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("samplers") as batch:
        batch.add_column(
            sa.Column(
                "inflight_seq",
                sa.BigInteger(),
                comment="seq_id of the save of an inflight sampler: all of a run sample the highest one's folder",
            )
        )
        batch.create_index(batch.f("ix_samplers_run_id_inflight_seq"), ["run_id", "inflight_seq"])


def downgrade() -> None:
    with op.batch_alter_table("samplers") as batch:
        batch.drop_index(batch.f("ix_samplers_run_id_inflight_seq"))
        batch.drop_column("inflight_seq")
