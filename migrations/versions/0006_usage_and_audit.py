"""What owners have used, and what has been done"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_COUNTED = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("bucket", sa.BigInteger(), nullable=False, comment="the hour's first second"),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("session_id", sa.String(), nullable=False, comment="empty: none"),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("training_tokens", sa.BigInteger(), nullable=False),
        sa.Column("prefill_tokens", sa.BigInteger(), nullable=False, comment="of prompts, computed"),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False, comment="of prompts, found computed"),
        sa.Column("sampled_tokens", sa.BigInteger(), nullable=False),
        sa.Column("checkpoints", sa.BigInteger(), nullable=False, comment="saved"),
        sa.PrimaryKeyConstraint("bucket", "owner", "session_id", "base_model", name=op.f("pk_usage")),
    )
    op.create_table(
        "stored_bytes",
        sa.Column("interval_id", _COUNTED, nullable=False),
        sa.Column(
            "path",
            sa.String(),
            nullable=False,
            comment="of the checkpoint; one that is replaced begins anew",
        ),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("session_id", sa.String(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("stored_at", sa.Double(), nullable=False),
        sa.Column("removed_at", sa.Double(), nullable=True),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("interval_id", name=op.f("pk_stored_bytes")),
    )
    op.create_index(op.f("ix_stored_bytes_owner_stored_at"), "stored_bytes", ["owner", "stored_at"])
    op.create_index(op.f("ix_stored_bytes_path"), "stored_bytes", ["path"])
    op.create_table(
        "audit",
        sa.Column("entry_id", _COUNTED, nullable=False),
        sa.Column("owner", sa.String(), nullable=False, comment="whose thing it is about"),
        sa.Column("topic", sa.String(), nullable=False, comment="checkpoints, projects, organizations, runs"),
        sa.Column("event", sa.String(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("entry_id", name=op.f("pk_audit")),
    )
    op.create_index(op.f("ix_audit_owner_at"), "audit", ["owner", "at"])
    # what is stored already occupies its bytes since it was saved
    op.execute(
        "insert into stored_bytes (path, owner, session_id, base_model, size_bytes, stored_at, expires_at) "
        "select c.path, c.owner, r.session_id, c.base_model, c.size_bytes, c.created_at, c.expires_at "
        "from checkpoints c join runs r on r.run_id = c.run_id"
    )


def downgrade() -> None:
    op.drop_table("audit")
    op.drop_table("stored_bytes")
    op.drop_table("usage")
