"""The size of each call's input, so that what waits can be bounded in bytes; of finished calls it is not needed"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("futures") as batch:
        batch.add_column(
            sa.Column(
                "input_bytes",
                sa.BigInteger(),
                nullable=False,
                server_default="0",
                comment="of its row in inputs",
            )
        )
    op.execute(
        "UPDATE futures SET input_bytes = coalesce("
        "(SELECT length(body) FROM inputs WHERE inputs.request_id = futures.request_id), 0) "
        "WHERE status IN ('queued', 'running')"
    )


def downgrade() -> None:
    with op.batch_alter_table("futures") as batch:
        batch.drop_column("input_bytes")
