"""Deaths of engines over a future"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "futures",
        sa.Column(
            "deaths",
            sa.Integer(),
            nullable=False,
            server_default="0",
            comment="engines that died while they performed it",
        ),
    )


def downgrade() -> None:
    op.drop_column("futures", "deaths")
