"""Several gateways: who they are, what engines are elsewhere"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("leases") as batch:
        batch.add_column(
            sa.Column("state", sa.String(), comment="what the engine does there, as its supervisor says")
        )
        batch.add_column(sa.Column("problem", sa.String(), comment="why it is not well"))
    op.create_table(
        "engine_facts",
        sa.Column("engine", sa.String(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False, comment="of the start that has told them"),
        sa.Column("info", sa.LargeBinary(), nullable=False, comment="engines.interface.EngineInfo, msgpack"),
        sa.Column("tokenizer_files", sa.LargeBinary(), nullable=False, comment="contents by name, msgpack"),
        sa.PrimaryKeyConstraint("engine", name="pk_engine_facts"),
    )
    op.create_table(
        "gateways",
        sa.Column("holder", sa.String(), nullable=False, comment="a gateway process, as leases name it"),
        sa.Column(
            "url", sa.String(), nullable=False, comment="where other gateways reach it; empty: nowhere"
        ),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("holder", name="pk_gateways"),
    )


def downgrade() -> None:
    op.drop_table("gateways")
    op.drop_table("engine_facts")
    with op.batch_alter_table("leases") as batch:
        batch.drop_column("problem")
        batch.drop_column("state")
