"""How far a sampler's log-probs were from the trainer's, with the run, so that it outlives the gateway"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("runs") as batch:
        batch.add_column(
            sa.Column(
                "comparison",
                sa.JSON(),
                comment="how far a sampler's log-probs were from the trainer's when that was last asked for",
            )
        )


def downgrade() -> None:
    with op.batch_alter_table("runs") as batch:
        batch.drop_column("comparison")
