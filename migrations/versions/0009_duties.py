"""What the gateways do in the background"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "duties",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("holder", sa.String(), comment="the gateway process that performs it now"),
        sa.Column("expires_at", sa.Double(), nullable=False, comment="of the holder's lease"),
        sa.Column("last_run_at", sa.Double(), comment="when it was last finished, or failed"),
        sa.Column("last_seconds", sa.Double()),
        sa.Column("last_done", sa.BigInteger(), comment="things removed, ended or freed then"),
        sa.Column("last_error", sa.String(), comment="of the newest failure, however long ago"),
        sa.Column("failed_at", sa.Double()),
        sa.Column("runs", sa.BigInteger(), nullable=False),
        sa.Column("failures", sa.BigInteger(), nullable=False),
        sa.Column("done", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_duties")),
    )


def downgrade() -> None:
    op.drop_table("duties")
