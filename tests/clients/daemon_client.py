"""kachery-client beside a server, in whose directory it looks before it asks anybody."""

from __future__ import annotations

from pathlib import Path

from tests.clients.environment import DAEMON_CLIENT, client_variables
from tests.clients.person import Person


class Client(Person):
    """Is told the port and the storage directory, and nothing else. Scripts have `kc`."""

    imports = "import kachery_client as kc\n"

    def __init__(self, storage: Path, port: int, private: Path) -> None:
        super().__init__(DAEMON_CLIENT, private, client_variables(storage, port, private))
        del self.variables["KACHERY_DAEMON_HOST"]
