"""Starlette with what every room finds through its request: the node and the bound on JSON in memory."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.types import ASGIApp

from kachery_lab.http.bodies import JsonBudget
from kachery_lab.node import Node


class Application(Starlette):
    """The middleware that it is given, and no other: `middleware.Errors` answers exceptions, once."""

    def __init__(self, node: Node, **more: Any) -> None:
        super().__init__(**more)
        self.node = node
        limits = node.settings
        self.budget = JsonBudget(max(limits.max_json_total, limits.max_json), largest=limits.max_json)
        self.public_url_missed = False
        """Whether the log has told that KACHERY_LAB_PUBLIC_URL is missing."""

    def build_middleware_stack(self) -> ASGIApp:
        app: ASGIApp = self.router
        for kind, arguments, options in reversed(self.user_middleware):
            app = kind(app, *arguments, **options)
        return app
