"""A run's folder is handed on: with a card of measured numbers, to the hub or by hand."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from tithe import TitheError
from tithe.app.cli import app
from tithe.app.train.sharing import by_hand, check_repo, push
from workplace import run

Edit = Callable[..., Path]


def test_the_card_holds_what_was_measured(edit: Edit, workplace: Path) -> None:
    result = run(edit(("epochs = 2", "steps = 3")))
    card = (workplace / "out" / "README.md").read_text()
    head, body = card.split("---\n")[1:]
    assert "tags: [text-classification, fish]" in head
    assert f"| accuracy, test split | {result['metrics']['test']['accuracy']:.4f} |" in body
    assert f"{result['trainable']['total']:,} of {result['trainable']['model']:,} weights" in body
    assert "tithe.apply(model, 'delta.safetensors')" in body
    assert f"torch {result['versions']['torch']}" in body


def test_without_a_token_the_way_by_hand_is_told(edit: Edit, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    path = edit(("epochs = 2", "steps = 1"))
    told = CliRunner().invoke(app, ["train", str(path), "--push", "me/films"])
    assert told.exit_code == 0
    assert by_hand(workplace / "out", "me/films") in told.stderr
    assert "hf upload me/films" in told.stderr
    told = CliRunner().invoke(app, ["train", str(path), "--set", "run.output=other", "--push", "me//films"])
    assert told.exit_code == 2
    assert not (workplace / "other").exists()


@pytest.mark.parametrize("name", ["a/b/c", "a b", "-x", "me/x..y"])
def test_a_name_that_is_none_is_refused_at_once(name: str) -> None:
    with pytest.raises(TitheError, match="--push"):
        check_repo(name)


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for; what is committed is kept."""

    commits: ClassVar[list[list[dict[str, object]]]] = []
    refuses = False

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refuses:
            self._answer({"error": "You don't have the rights"}, 403)
        elif self.path == "/api/repos/create":
            self._answer({"url": "https://huggingface.co/me/films", "name": "me/films", "id": "me/films"})
        elif "/preupload/" in self.path:
            files = json.loads(sent)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            self.commits.append([json.loads(line) for line in sent.splitlines()])
            self._answer(
                {
                    "commitUrl": "https://huggingface.co/me/films/commit/1111111",
                    "commitOid": "1" * 40,
                    "pullRequestUrl": None,
                }
            )
        else:
            self._answer({})

    def do_GET(self) -> None:
        self._answer({"sha": "1" * 40, "id": "me/films", "siblings": [], "name": "me", "type": "user"})

    def _answer(self, data: object, code: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Generator[type[_Hub]]:
    """A hub on this machine, and a token for it."""
    import huggingface_hub
    from huggingface_hub import constants

    _Hub.commits, _Hub.refuses = [], False
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    inner = huggingface_hub.HfApi
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: inner(endpoint=address, token="hf_token"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield _Hub
    server.shutdown()
    server.server_close()
    thread.join()


def _files(folder: Path) -> None:
    for name in (
        "delta.safetensors",
        "result.json",
        "README.md",
        "model/config.json",
        "checkpoints/step-1/state.json",
        "tensorboard/events",
        "history/0.safetensors",
        ".lock",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the content of {name}")


def test_the_folder_is_pushed_without_what_is_of_use_here_alone(hub: type[_Hub], tmp_path: Path) -> None:
    _files(tmp_path)
    assert push(tmp_path, "me/films") is not None
    ((_, *files),) = hub.commits
    sent = {str(file["value"]["path"]): base64.b64decode(file["value"]["content"]).decode() for file in files}  # pyright: ignore
    assert sorted(sent) == ["README.md", "delta.safetensors", "model/config.json", "result.json"]
    assert sent["model/config.json"] == "the content of model/config.json"


def test_a_hub_that_refuses_leaves_the_run_and_says_how_to_go_on(hub: type[_Hub], tmp_path: Path) -> None:
    _files(tmp_path)
    hub.refuses = True
    with pytest.raises(TitheError) as error:
        push(tmp_path, "me/films")
    assert "hf upload me/films" in error.value.remedy
    assert (tmp_path / "result.json").is_file()
