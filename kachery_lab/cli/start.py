"""`kachery-lab start`: run the node until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import socket
import sys
from typing import Any
from urllib.parse import urlsplit

import click
import structlog
import uvicorn

from kachery_lab.app import AdminSocket, create_app, create_figurl_app
from kachery_lab.cli.options import server_options
from kachery_lab.errors import StartRefused
from kachery_lab.http.deadlines import EdgeLimits
from kachery_lab.http.descriptors import OPERATOR_CONNECTIONS, fit_connections
from kachery_lab.http.server import build_server
from kachery_lab.node import Node, open_node
from kachery_lab.observability import logging
from kachery_lab.settings import Settings, load_settings

log = structlog.get_logger(__name__)


@click.command()
@server_options
def start(**flags: Any) -> None:
    """Run the node. SIGTERM finishes running requests and ends with exit code 0."""
    run_server(load_settings(flags))


def run_server(settings: Settings) -> None:
    """Open the node, listen, serve until told to stop. Raises StartRefused."""
    # Every file's mode is stated where it is made; a strict umask would hide blobs from clients that mount them.
    os.umask(0o022)
    logging.configure(settings.log_format, settings.log_level)
    settings = fit_connections(settings)
    # Before the node is opened: a port that is taken must not cost a volume check.
    sockets = listen(settings.bind, settings.port)
    figurl = listen_figurl(settings)
    node = open_node(settings)
    log.info("self-check", **node.report)
    if node.report["warning"]:
        log.warning(node.report["warning"])
    click.echo(welcome(node, sockets))
    if figurl:
        click.echo(f"figurl on this machine finds the zone `default` at port {figurl[0].getsockname()[1]}.\n")
    if not all(_is_loopback(address) for address in settings.figurl_bind):
        log.warning("whoever reaches the figurl port has the roles of its user", bind=settings.figurl_bind)
    sys.stdout.flush()
    # A thread that comes back from the disk waits at most so long for the interpreter; the default of 5 ms is longer
    # than a flush takes.
    sys.setswitchinterval(0.0005)
    # What start has made stays: collections need not look at it again.
    gc.collect()
    gc.freeze()
    # Requests leave few cycles: to look for them after each 700 new objects costs more than they take.
    gc.set_threshold(20_000, 20, 20)
    asyncio_run(_serve(node, sockets, figurl))


def asyncio_run(work: Any) -> None:
    """Run on uvloop."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


def plain_http(settings: Settings) -> list[str]:
    """Where codes and tokens travel readable, beyond this machine."""
    found = []
    public = settings.public_url or ""
    if not all(_is_here(address) for address in settings.bind):
        if not public.startswith("https://") and not settings.trusted_proxies:
            found.append("tokens and codes of other machines reach this server over plain http")
    elif public.startswith("http://") and not _is_here(urlsplit(public).hostname or ""):
        found.append("KACHERY_LAB_PUBLIC_URL is plain http: tokens sent there can be read on the way")
    hub = urlsplit(settings.hub_url or "")
    if hub.scheme == "http" and not _is_here(hub.hostname or ""):
        found.append("KACHERY_LAB_HUB_URL is plain http: addresses of private buckets can be read on the way")
    return found


def _is_here(host: str) -> bool:
    return host == "localhost" or host == "::1" or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


async def _serve(node: Node, sockets: list[socket.socket], figurl: list[socket.socket]) -> None:
    for reason in plain_http(node.settings):
        log.warning(reason, hint="Keep it in a trusted network, or put TLS in front")
    app = create_app(node)
    limits = EdgeLimits(max_connections=node.settings.max_connections)
    server = build_server(app, limits=limits, cors_origins=node.settings.cors_origins)
    operator = build_server(AdminSocket(app), limits=EdgeLimits(max_connections=OPERATOR_CONNECTIONS), cors_origins=())
    local = build_server(create_figurl_app(node), limits=limits, cors_origins=node.settings.figurl_origins)
    operator.config.lifespan = local.config.lifespan = "off"
    _catch_signals(node, server)
    for one in (server, operator, local):
        # uvicorn would raise the signal again after a clean end, and the exit code would not be 0.
        one.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    halting = asyncio.create_task(_stop_when_told(node, server))
    others = [asyncio.create_task(_serve_operator(node, operator, server))]
    if figurl:
        others.append(asyncio.create_task(_serve_with(server, local, figurl)))
    try:
        await server.serve(sockets=sockets)
    finally:
        operator.should_exit = local.should_exit = True
        halting.cancel()
        await asyncio.gather(*others, halting, return_exceptions=True)


async def _serve_with(server: uvicorn.Server, other: uvicorn.Server, sockets: list[socket.socket]) -> None:
    """A further listener, from when the server has started the node."""
    while not server.started:  # noqa: ASYNC110 (uvicorn has a flag and no event)
        await asyncio.sleep(0.01)
    await other.serve(sockets=sockets)


def _catch_signals(node: Node, server: uvicorn.Server) -> None:
    """The first SIGTERM or SIGINT finishes running requests; a second one does not wait for them."""

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True
        node.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)


async def _stop_when_told(node: Node, server: uvicorn.Server) -> None:
    await node.stopping.wait()
    server.should_exit = True


async def _serve_operator(node: Node, operator: uvicorn.Server, server: uvicorn.Server) -> None:
    """The admin socket, 0600, for as long as the server runs."""
    while not server.started:  # noqa: ASYNC110 (uvicorn has a flag and no event)
        await asyncio.sleep(0.01)
    path = str(node.metadata.admin_socket)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        # Nobody can connect before `listen`. The umask is left alone: blobs are being made meanwhile.
        os.chmod(path, 0o600)
    except OSError as error:
        # Paths of sockets are short (107 bytes); the server works without one, its CLI then stops it first.
        log.warning("there is no admin socket", path=path, reason=str(error))
        listener.close()
        return
    try:
        await operator.serve(sockets=[listener])
    finally:
        listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def listen_figurl(settings: Settings) -> list[socket.socket]:
    """Bound sockets of the listener for figurl, none when it is off. Raises StartRefused."""
    if not settings.figurl_port:
        return []
    if settings.figurl_user is None:
        raise StartRefused(
            "KACHERY_LAB_FIGURL_PORT is set, and no user whose roles it has", hint="Set KACHERY_LAB_FIGURL_USER"
        )
    return listen(settings.figurl_bind, settings.figurl_port, "KACHERY_LAB_FIGURL_PORT", "KACHERY_LAB_FIGURL_BIND")


def _is_loopback(address: str) -> bool:
    return address in ("127.0.0.1", "::1", "localhost")


def listen(
    addresses: tuple[str, ...],
    port: int,
    port_setting: str = "KACHERY_DAEMON_PORT",
    bind_setting: str = "KACHERY_LAB_BIND",
) -> list[socket.socket]:
    """Bound sockets. An address family that the machine does not have is left out as long as another one works.

    Raises StartRefused.
    """
    sockets: list[socket.socket] = []
    problems: list[str] = []
    for address in addresses:
        try:
            family, kind, _, _, place = socket.getaddrinfo(
                address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            bound = socket.socket(family, kind)
        except OSError as error:
            problems.append(f"{address}: {error.strerror or error}")
            continue
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            bound.bind(place)
        except OSError as error:
            bound.close()
            if error.errno in (98, 13):
                for other in sockets:
                    other.close()
                raise StartRefused(
                    f"port {port} on {address} cannot be used: {error.strerror}",
                    hint=f"Choose another with {port_setting}, or stop what uses it",
                ) from None
            problems.append(f"{address}: {error.strerror}")
            continue
        # Port 0 is chosen once and then the same for all addresses.
        port = bound.getsockname()[1]
        bound.set_inheritable(False)
        sockets.append(bound)
    if not sockets:
        raise StartRefused("no address to listen on: " + "; ".join(problems), hint=f"Set {bind_setting}")
    return sockets


def welcome(node: Node, sockets: list[socket.socket]) -> str:
    """What a person wants to know first."""
    port = sockets[0].getsockname()[1]
    lines = [
        "kachery-lab is running.",
        "",
        f"  node id   {node.identity.node_id}",
        f"  label     {node.identity.label}",
        f"  owner     {node.identity.owner or '(none; set --owner)'}",
        f"  storage   {node.storage.root}",
        f"  metadata  {node.metadata.root}",
        f"  URL       http://localhost:{port}",
        "",
        "For a client on this machine:",
        "",
        f"  export KACHERY_DAEMON_PORT={port}",
        f"  export KACHERY_STORAGE_DIR={node.settings.advertised}",
        "",
    ]
    if all(_is_loopback(address) for address in node.settings.bind):
        lines += [
            "Only this machine can reach it. To open it to the lab, on a trusted network:",
            "",
            "  KACHERY_LAB_BIND=0.0.0.0,:: KACHERY_LAB_AUTH_GROUP=<group> kachery-lab start",
            "",
        ]
    return "\n".join(lines)
