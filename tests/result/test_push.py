"""`cfsp push`, against a local stand-in for the hub that answers over HTTP."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import CheckpointError, OutputError, UsageError
from cfsp.result.push import push


@dataclass
class Hub:
    """What the stand-in was told, and what it shall answer."""

    repositories: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: list[str | None] = field(default_factory=list)
    refuses: int = 0


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """Yield a hub that the client talks to, with a token of its own."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            name = self.path.removeprefix("/api/models/").partition("?")[0]
            name, _, listed = name.partition("/tree/")
            name = name.partition("/revision/")[0]
            if name not in hub.repositories:
                return self.answer(404, {"error": "not found"})
            if listed:
                entries = [{"type": "file", "path": p, "size": 1, "oid": "0"} for p in hub.files]
                return self.answer(200, entries)
            private = hub.repositories[name]
            return self.answer(200, {"id": name, "private": private, "tags": [], "downloads": 0})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hub.tokens.append(self.headers.get("Authorization"))
            if hub.refuses:
                return self.answer(hub.refuses, {"error": "no"})
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                if name in hub.repositories:
                    return self.answer(409, {"error": "exists", "url": f"{address}/{name}"})
                hub.repositories[name] = asked.get("private", False) or (
                    asked.get("visibility") == "private"
                )
                return self.answer(200, {"url": f"{address}/{name}", "id": name})
            if "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return self.answer(200, {"files": files})
            if "/commit/" in self.path:
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        value = entry["value"]
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "deletedFile":
                        del hub.files[entry["value"]["path"]]
                url = f"{address}/me/small/commit/abc"
                return self.answer(200, {"commitUrl": url, "commitOid": "abc"})
            if self.path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            return self.answer(404, {"error": self.path})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def small(tmp_path, pruned) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "small"))


def test_a_directory_becomes_a_private_repository(small, hub, command):
    (small / ".half.partial-1").write_text("unfinished")
    out, err = command("push", small, "me/small")
    assert out.endswith("/me/small (private), commit abc\n")
    assert hub.repositories == {"me/small": True}
    assert set(hub.tokens) == {"Bearer hf_secret"}
    expected = {p.name: p.read_bytes() for p in small.iterdir() if not p.name.startswith(".")}
    assert hub.files == expected
    # A model of nobody's has neither base nor license, and the page would not show its lineage.
    assert "README.md names no base model" in err
    assert "README.md names no license" in err


def test_weights_of_an_earlier_upload_are_not_left_beside_the_new_ones(small, hub):
    """Transformers would read an old single file before new shards; vLLM reads every file."""
    hub.repositories["me/small"] = True
    foreign = ["notes.txt", "adapter_model.safetensors", "old/model-00001-of-00002.safetensors"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    hub.files |= dict.fromkeys([*foreign, *shards, "model.safetensors.index.json"], b"old")
    push(small, "me/small")
    assert hub.files["model.safetensors"] == (small / "model.safetensors").read_bytes()
    assert hub.files.keys() == {path.name for path in small.iterdir()} | set(foreign)
    # Weights of another kind replace none of these.
    (small / "model.safetensors").rename(small / "small.gguf")
    push(small, "me/small")
    assert {"model.safetensors", "small.gguf"} <= hub.files.keys()


def test_public_is_asked_for(small, hub):
    hub.repositories["me/small"] = False
    with pytest.raises(UsageError, match="me/small exists and is public; add --public"):
        push(small, "me/small")
    assert not hub.files
    assert not push(small, "me/small", public=True).private
    assert "model.safetensors" in hub.files


def test_what_cannot_be_uploaded_is_one_sentence(small, hub, tmp_path):
    with pytest.raises(UsageError, match="called OWNER/NAME, found 'a/b/c'"):
        push(small, "a/b/c")
    with pytest.raises(OutputError, match="has no weights to upload"):
        push(tmp_path / "nowhere", "me/small")
    hub.refuses = 403
    with pytest.raises(OutputError, match=r"refuses me/small \(403\); log in with a token"):
        push(small, "me/small")
    assert not hub.repositories


@pytest.mark.parametrize("name", ["notes.md", "graphs/deep/notes.md", "graphs"])
def test_nothing_from_elsewhere_is_uploaded(small, hub, tmp_path, name):
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "notes.md").write_text("secret")
    (small / name).parent.mkdir(parents=True, exist_ok=True)
    (small / name).symlink_to(secrets / "notes.md" if name.endswith(".md") else secrets)
    with pytest.raises(CheckpointError, match=f"{name} is a link to a "):
        push(small, "me/small")
    assert not hub.repositories


def test_offline_is_said(small, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE"):
        push(small, "me/small")


@pytest.mark.usefixtures("no_hub")
def test_a_hub_that_cannot_be_reached_is_one_sentence(small, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(OutputError, match=r"the hub cannot be reached \(.*refused\); check"):
        push(small, "me/small")


def test_the_card_shows_the_lineage(small, hub):
    card = small / "README.md"
    text = card.read_text()
    assert "pipeline_tag: text-generation" in text
    known = "base_model: some/model\nlicense: mit\n"
    card.write_text(text.replace("---\n", f"---\n{known}", 1))
    assert push(small, "small").notes == ()
    assert known.encode() in hub.files["README.md"]
