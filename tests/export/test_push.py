"""A push over HTTP, to a hub of a few lines that keeps what it is sent: huggingface_hub's own client at work."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import HfApi

from efficientllm.errors import UsageError
from efficientllm.export.push import push_folder

NAME = "me/compact"
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository; `files` is None before it is made."""

    files: dict[str, bytes] | None = None
    refuses = False

    def do_GET(self) -> None:
        files = Hub.files
        if files is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in self.path:
            self.answer(200, [{"type": "file", "path": name, "size": 1, "oid": COMMIT} for name in files])
        else:
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, {"id": NAME, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/api/repos/create"):
            known, Hub.files = Hub.files, Hub.files or {}
            self.answer(409 if known is not None else 200, {"url": f"{self.server_url}/{NAME}", "id": NAME})
        elif "/preupload/" in self.path:
            names = [each["path"] for each in json.loads(body)["files"]]
            self.answer(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path and Hub.refuses:
            self.answer(403, {"error": f"not for {self.headers['Authorization'].split()[1]}"})
        elif "/commit/" in self.path:
            self.commit([json.loads(line) for line in body.splitlines()])
        else:
            self.answer(200, {})

    def commit(self, lines: list[dict[str, Any]]) -> None:
        assert Hub.files is not None
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                Hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del Hub.files[value["path"]]
        url = f"{self.server_url}/{NAME}/commit/{COMMIT}"
        self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    @property
    def server_url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[HfApi]:
    Hub.files, Hub.refuses = None, False
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield HfApi(endpoint=f"http://127.0.0.1:{server.server_address[1]}", token="hf_secret")
        server.shutdown()


def test_a_second_push_replaces_the_weights_of_the_first(hub: HfApi, tmp_path: Path) -> None:
    said: list[str] = []
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    for name in (*shards, "config.json"):
        (tmp_path / name).write_bytes(name.encode())
    assert push_folder(tmp_path, NAME, private=True, api=hub, say=said.append).endswith(NAME)
    assert Hub.files == {name: name.encode() for name in (*shards, "config.json")}
    assert not said
    assert Hub.files is not None
    Hub.files["notes.md"] = b"somebody's own"
    for name in shards:
        (tmp_path / name).unlink()
    (tmp_path / "model.safetensors").write_bytes(b"whole")
    push_folder(tmp_path, NAME, private=True, api=hub, say=said.append)
    assert Hub.files.keys() == {"config.json", "model.safetensors", "notes.md"}
    assert len(said) == 1
    assert "me/compact exists already" in said[0]


def test_a_refusal_never_shows_the_token(hub: HfApi, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    Hub.refuses = True
    with pytest.raises(UsageError, match="cannot push to me/compact") as error:
        push_folder(tmp_path, NAME, private=False, api=hub)
    assert "***" in str(error.value)
    assert "hf_secret" not in str(error.value)
