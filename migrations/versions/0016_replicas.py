"""How many replicas of an engine there are to be"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "replicas",
        sa.Column(
            "engine",
            sa.String(),
            nullable=False,
            comment="its name in the settings, which is its first replica's",
        ),
        sa.Column("wanted", sa.Integer(), nullable=False, comment="how many there are to be"),
        sa.Column(
            "smallest", sa.Integer(), comment="bounds that an admin has set; none: those of the settings"
        ),
        sa.Column("largest", sa.Integer()),
        sa.PrimaryKeyConstraint("engine", name=op.f("pk_replicas")),
    )


def downgrade() -> None:
    op.drop_table("replicas")
