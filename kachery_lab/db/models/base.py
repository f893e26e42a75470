"""The one MetaData that every table registers with.

Times are integer milliseconds since 1970 UTC. Columns hold NULL only where the table says so.
"""

from __future__ import annotations

from sqlalchemy import MetaData

# Named constraints are the only ones that a later migration can change.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)
