"""Samplers whose checkpoint has been deleted: their weights are given up some time after the end of their sessions"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

UNNAMED = "path is null and folder is not null and released_at is null"
SOLE = "(path is null or checkpoint_gone) and folder is not null and released_at is null"


def upgrade() -> None:
    op.drop_index("ix_samplers_unnamed", "samplers")
    with op.batch_alter_table("samplers") as batch:
        batch.add_column(
            sa.Column(
                "checkpoint_gone",
                sa.Boolean(),
                nullable=False,
                server_default=sa.false(),
                comment="whether what stood under its path was deleted or replaced",
            )
        )
    op.execute(
        "UPDATE samplers SET checkpoint_gone = true WHERE path IS NOT NULL AND folder IS NOT NULL AND NOT EXISTS "
        "(SELECT 1 FROM checkpoints c WHERE c.path = samplers.path AND c.folder = samplers.folder)"
    )
    _index("ix_samplers_sole", SOLE)


def downgrade() -> None:
    op.drop_index("ix_samplers_sole", "samplers")
    with op.batch_alter_table("samplers") as batch:
        batch.drop_column("checkpoint_gone")
    _index("ix_samplers_unnamed", UNNAMED)


def _index(name: str, condition: str) -> None:
    where = sa.text(condition)
    op.create_index(name, "samplers", ["session_id"], sqlite_where=where, postgresql_where=where)
