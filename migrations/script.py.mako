"""${message}

Rules (delete this list when they are kept):
- additive first: new tables and nullable columns now; what the old program still needs goes one release later
- one concern in one revision; moving data is a revision of its own
- changes to existing tables only in `with op.batch_alter_table(...)` (SQLite copies the table)
- autogenerate proposes, a person checks; try it on a copy of a real database, both ways
- then set HEAD in kachery_lab/db/migrate.py
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
