"""A small W&B server for the real client: it keeps what runs send, and can be ill in the ways that servers are."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal["silent"] | int | None


class Server(ThreadingHTTPServer):
    """`fault`: how it treats requests from now on: never answers, or answers with an HTTP error.

    `healthy`: it answers the question after its health all the same, as a proxy before it would.
    """

    daemon_threads = True

    def __init__(self, fault: Fault = None, healthy: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault, self.healthy = fault, healthy
        self.ended = threading.Event()
        self.run: dict[str, Any] = {}
        self.files: dict[str, list[str]] = {}
        self.ends: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []
        self.requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows logged, in the order the server has them."""
        return [json.loads(line) for line in self.files.get("wandb-history.jsonl", [])]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.files["wandb-summary.json"][-1])

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("file_stream"):
            return self._stream(body)
        query, sent = body["query"], body.get("variables") or {}
        if "upsertBucket" in query:
            self.run |= {key: value for key, value in sent.items() if value is not None}
            return {"upsertBucket": {"bucket": self._bucket(), "inserted": True}}
        if "upsertView" in query:
            self.reports.append(sent)
            return {"upsertView": {"view": sent | {"id": "report", "project": PROJECT}, "inserted": True}}
        if "query RunResumeStatus" in query:
            return {"model": PROJECT | {"bucket": self._bucket() if self.run else None}}
        return next((answer for name, answer in FIXED.items() if name in query), {})

    def _stream(self, body: dict[str, Any]) -> dict[str, Any]:
        for name, chunk in body.get("files", {}).items():
            lines = self.files.setdefault(name, [])
            lines[chunk["offset"] :] = chunk["content"]
        if "exitcode" in body or "preempting" in body:
            self.ends.append({key: body[key] for key in ("exitcode", "preempting", "complete") if key in body})
        return {}

    def _bucket(self) -> dict[str, Any]:
        return {
            "id": "run",
            "name": self.run["name"],
            "displayName": self.run.get("displayName"),
            "config": self.run.get("config"),
            "summaryMetrics": self.files.get("wandb-summary.json", ["{}"])[-1],
            "historyLineCount": len(self.files.get("wandb-history.jsonl", [])),
            "historyTail": json.dumps(self.files.get("wandb-history.jsonl", [])[-1:]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
            "project": PROJECT,
        }


PROJECT = {"id": "project", "name": "wush", "entity": {"id": "entity", "name": "entity"}}
FIXED: dict[str, dict[str, Any]] = {
    "createRunFiles": {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []}},
    "query Viewer": {"viewer": {"id": "user", "username": "user", "flags": "{}", "teams": {"edges": []}}},
    "query GetProjects": {"models": {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}},
}


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._reply(None if self.server.healthy else self.server.fault, b"")

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests += 1
        if self.server.fault is not None:
            return self._reply(self.server.fault, b'{"errors": [{"message": "no"}]}')
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        known = self.path.endswith(("graphql", "file_stream"))
        answer = self.server.answer(self.path, json.loads(content)) if known else {}
        self._reply(None, json.dumps({"data": answer}).encode())

    def _reply(self, fault: Fault, body: bytes) -> None:
        if fault == "silent":
            self.server.ended.wait()
            return
        self.send_response(fault or 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(fault: Fault = None, healthy: bool = False) -> Iterator[Server]:
    """A server that runs in a thread of this process."""
    server = Server(fault, healthy)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
