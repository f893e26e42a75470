"""How Alembic reaches the database: through the connection that `kachery_lab.db.migrate` hands over.

On the command line it is `alembic -x database=COPY.sqlite3 ...`, for autogenerate and for trying a revision on a copy.
"""

from __future__ import annotations

from pathlib import Path

from alembic import context
from sqlalchemy import Connection

from kachery_lab.db.migrate import migration_transaction
from kachery_lab.db.models import metadata


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        # Alembic assumes that SQLite cannot undo DDL; it can, inside the one transaction that the caller has begun.
        transactional_ddl=True,
        render_as_batch=True,
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    raise SystemExit("SQL scripts (--sql) are not supported: batch changes need the database")
given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    database = context.get_x_argument(as_dictionary=True).get("database")
    if not database:
        raise SystemExit("name the database: alembic -x database=COPY.sqlite3 ...")
    with migration_transaction(Path(database)) as opened:
        run(opened)
