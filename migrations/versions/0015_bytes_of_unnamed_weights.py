"""What weights without a checkpoint occupy, and when they were last used; what is there already counts as nothing"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

SOLE = "(path is null or checkpoint_gone) and folder is not null and released_at is null"


def upgrade() -> None:
    with op.batch_alter_table("samplers") as batch:
        batch.add_column(
            sa.Column(
                "size_bytes",
                sa.BigInteger(),
                nullable=False,
                server_default="0",
                comment="of weights that are no checkpoint, or not any more",
            )
        )
        batch.add_column(
            sa.Column("sampled_at", sa.Double(), comment="when it was last used, to a minute; none: not yet")
        )
    where = sa.text(SOLE)
    op.create_index(
        "ix_samplers_sole_owner", "samplers", ["owner"], sqlite_where=where, postgresql_where=where
    )


def downgrade() -> None:
    op.drop_index("ix_samplers_sole_owner", "samplers")
    with op.batch_alter_table("samplers") as batch:
        batch.drop_column("sampled_at")
        batch.drop_column("size_bytes")
