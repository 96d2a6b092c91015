"""Losses that clients have traced"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "custom_losses",
        sa.Column("loss_id", sa.String(), nullable=False, comment="a function of session and number"),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("session_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column(
            "body", sa.LargeBinary(), nullable=False, comment="engines.graphs.CustomLoss; empty when refused"
        ),
        sa.Column("error", sa.String(), nullable=True, comment="why it was refused"),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.session_id"], name=op.f("fk_custom_losses_session_id")
        ),
        sa.PrimaryKeyConstraint("loss_id", name=op.f("pk_custom_losses")),
    )
    with op.batch_alter_table("custom_losses", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_custom_losses_session_id"), ["session_id"], unique=False)


def downgrade() -> None:
    op.drop_table("custom_losses")
