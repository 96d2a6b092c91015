"""What was sent under a number"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("futures") as batch:
        batch.add_column(
            sa.Column("digest", sa.LargeBinary(), comment="128 bits of what was sent; none: not known")
        )


def downgrade() -> None:
    with op.batch_alter_table("futures") as batch:
        batch.drop_column("digest")
