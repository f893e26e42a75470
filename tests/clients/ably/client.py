"""A process that runs the provider's library, and what the test says to it and hears from it."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.clients.ably.environment import HERE, library, node_binary

Tokens = Callable[[], Any]
"""Gives what the library takes for a token: token details, or a text; raises to refuse."""


class Refused(Exception):
    """The library reported an error to its caller."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error)
        self.code: int = error["code"]
        self.status: int = error["statusCode"]


class AblyClient:
    """Use with `with`. `events` holds all that came, in order, each with the time `at` of the monotonic clock."""

    def __init__(
        self,
        port: int | None,
        tokens: Tokens,
        *,
        binary: bool = True,
        package: str = "ably",
        preload: Path | None = None,
        env: Mapping[str, str] | None = None,
        directory: Path | None = None,
        **options: Any,
    ) -> None:
        """`port` None: the library is not told where to connect. `preload`: a module for `node --require`.
        `directory`: another place of packages than the installed one."""
        given = json.dumps({"package": package, "port": port, "binary": binary, "options": options})
        before = [] if preload is None else ["--require", str(preload)]
        self.events: list[dict[str, Any]] = []
        self.tokens_asked = 0
        self._tokens = tokens
        self._answers: dict[int, dict[str, Any]] = {}
        self._number = 0
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [node_binary(), *before, str(HERE / "client.mjs"), str(directory or library()), given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "NODE_NO_WARNINGS": "1", **(env or {})},
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> AblyClient:
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait(10)
        self._reader.join(10)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found = {**json.loads(line), "at": time.monotonic()}
            if found.get("event") == "token wanted":
                self._give_token()
            with self._changed:
                if "answer" in found:
                    self._answers[found["answer"]] = found
                else:
                    self.events.append(found)
                self._changed.notify_all()

    def _give_token(self) -> None:
        self.tokens_asked += 1
        try:
            self._say(do="token", details=self._tokens())
        except BrokenPipeError:
            # The program was told to end while its library asked.
            return
        except Exception as error:
            self._say(do="token", error={"message": str(error), "code": 40170, "statusCode": 401})

    def _say(self, **command: Any) -> int:
        assert self._process.stdin is not None
        with self._changed:
            self._number += 1
            self._process.stdin.write(json.dumps({"number": self._number, **command}) + "\n")
            self._process.stdin.flush()
            return self._number

    def call(self, do: str, *, seconds: float = 60.0, **fields: Any) -> Any:
        """A command of `client.mjs`, and its value. Raises Refused."""
        number = self._say(do=do, **fields)
        with self._changed:
            assert self._changed.wait_for(lambda: number in self._answers, seconds), f"no answer to {do}: {self.events}"
            answer = self._answers.pop(number)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["value"]

    def wait(self, *, seconds: float = 60.0, after: int = 0, **wanted: Any) -> dict[str, Any]:
        """The first event with these members, of those from number `after` on."""

        def found() -> dict[str, Any] | None:
            for one in self.events[after:]:
                if all(one.get(name) == value for name, value in wanted.items()):
                    return one
            return None

        with self._changed:
            assert self._changed.wait_for(lambda: found() is not None, seconds), f"not {wanted}: {self.events[-20:]}"
            event = found()
        assert event is not None
        return event

    def connected(self) -> AblyClient:
        """Waits until it is."""
        self.wait(event="connection", state="connected")
        return self

    def messages(self, channel: str | None = None) -> list[dict[str, Any]]:
        """The bodies that came."""
        return [
            message["body"]
            for event in list(self.events)
            if event["event"] == "message" and channel in (None, event["channel"])
            for message in json.loads(event["text"])["messages"]
        ]
