"""Numbers of the clients of a sampler"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "sampler_clients",
        sa.Column("sampler_id", sa.String(), nullable=False),
        sa.Column(
            "joined",
            sa.Integer(),
            nullable=False,
            comment="clients that have asked for a number; the first has none",
        ),
        sa.PrimaryKeyConstraint("sampler_id", name=op.f("pk_sampler_clients")),
    )


def downgrade() -> None:
    op.drop_table("sampler_clients")
