"""Every address of the room; `/probe`, `/stats` and `/halt` themselves."""

from __future__ import annotations

import html

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from kachery_lab import __version__
from kachery_lab.errors import Forbidden, InvalidInput
from kachery_lab.http.context import node_of
from kachery_lab.http.describe import Handler
from kachery_lab.http.protocols.daemon2021 import channels, feeds, files, mutables, tasks
from kachery_lab.http.protocols.daemon2021.auth import browser_class, local_class
from kachery_lab.http.protocols.daemon2021.errors import answers
from kachery_lab.http.protocols.daemon2021.translate import Answer, body_of


async def probe(request: Request) -> Response:
    """GET is open; POST needs a code."""
    if request.method == "POST":
        browser_class(request)
        async with body_of(request):
            pass
    node = node_of(request)
    return Answer(
        {
            "success": True,
            "daemonVersion": f"kachery-lab-{__version__}",
            "nodeId": node.identity.node_id,
            "kacheryStorageDir": str(node.settings.advertised),
        }
    )


async def stats(request: Request) -> Response:
    """Counters since start, as JSON or as a small page."""
    browser_class(request)
    form = request.query_params.get("format", "json")
    if form not in ("json", "html") or set(request.query_params) - {"format"}:
        raise InvalidInput("expected no parameter but format=json or format=html")
    node = node_of(request)
    counters = {
        "nodeId": node.identity.node_id,
        "totalBytesSent": node.stats.bytes_sent,
        "totalBytesReceived": node.stats.bytes_received,
        "totalMessagesSent": node.stats.messages_sent,
    }
    if form == "json":
        return Answer({"success": True, "format": "json", "stats": counters})
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in counters.items())
    page = f"<!doctype html><meta charset=utf-8><title>kachery-lab</title><h1>Since start</h1><table>{rows}</table>"
    return HTMLResponse(page, headers={"content-security-policy": "default-src 'none'"})


async def halt(request: Request) -> Response:
    """Stop as on SIGTERM, after the answer."""
    local_class(request)
    node = node_of(request)
    if not node.settings.allow_halt:
        raise Forbidden("/halt is switched off here", hint="KACHERY_LAB_ALLOW_HALT=true allows it")
    return Answer({"success": True}, background=BackgroundTask(node.stop))


def routes() -> list[BaseRoute]:
    """Every address of this room."""
    posts: dict[str, Handler] = {
        "/store": files.store,
        "/storeFile": files.store_file,
        "/linkFile": files.link_file,
        "/loadFile": files.load_file,
        "/downloadFileData": files.download_file_data,
        "/uploadFile": channels.upload_file,
        "/createSignedFileUploadUrl": channels.create_signed_file_upload_url,
        "/feed/createFeed": feeds.create_feed,
        "/feed/deleteFeed": feeds.delete_feed,
        "/feed/getFeedId": feeds.get_feed_id,
        "/feed/getFeedInfo": feeds.get_feed_info,
        "/feed/appendMessages": feeds.append_messages,
        "/feed/getNumLocalMessages": feeds.get_num_local_messages,
        "/feed/watchForNewMessages": feeds.watch_for_new_messages,
        "/mutable/get": mutables.get,
        "/mutable/set": mutables.set_,
        "/mutable/delete": mutables.delete,
        "/task/registerTaskFunctions": tasks.register_task_functions,
        "/task/updateTaskStatus": tasks.update_task_status,
        "/task/createSignedTaskResultUploadUrl": tasks.create_signed_task_result_upload_url,
        "/task/requestTask": tasks.request_task,
        "/task/waitForTaskResult": tasks.wait_for_task_result,
    }
    return [
        Route("/probe", answers(probe), methods=["GET", "POST"]),
        Route("/stats", answers(stats), methods=["GET"]),
        Route("/halt", answers(halt), methods=["GET"]),
        *(Route(path, answers(handler), methods=["POST"]) for path, handler in posts.items()),
    ]
