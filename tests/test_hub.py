"""Models by hub id, from a small server on this machine that answers as the Hugging Face hub does."""

from __future__ import annotations

import hashlib
import http.server
import json
import socket
import threading
import time

import pytest
from huggingface_hub import constants

from cartridges_jax.errors import UserError
from cartridges_jax.formats import hub
from cartridges_jax.formats.sources import locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle",
    "consolidated.safetensors": b"the weights again",
    "onnx/model.safetensors": b"the weights again",
    "README.md": b"x",
}
FETCHED = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}


class _Hub(http.server.BaseHTTPRequestHandler):
    """`server.files` at COMMIT, branch main, or nothing but the error `server.refuses`.

    The content of the file `server.breaks_off` does not arrive.
    """

    def do_GET(self):
        self.server.asked.append(self.path)
        path = self.path.split("?")[0]
        refusal = self.server.refuses
        if refusal and (refusal[1] != "GatedRepo" or "/resolve/" in path):  # anybody may look at a gated repository
            return self._answer(refusal[0], b"", {"X-Error-Code": refusal[1]})
        if path in ("/api/models/org/name", "/api/models/org/name/revision/main"):
            return self._answer(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": []}).encode())
        if path == f"/api/models/org/name/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.server.files.items()
            ]
            return self._answer(200, json.dumps(entries).encode())
        name = path.removeprefix(f"/org/name/resolve/{COMMIT}/")
        if name in self.server.files:
            data = self.server.files[name]
            if name == self.server.breaks_off and self.command == "GET":
                return self._answer(500, b"")
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self._answer(200, data, {"ETag": etag, "X-Repo-Commit": COMMIT})
        return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound" if "/revision/" in path else "RepoNotFound"})

    do_HEAD = do_GET

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def point_at(monkeypatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache; the working directory holds no model either."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


@pytest.fixture
def server(cache, monkeypatch):
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    running.files, running.refuses, running.breaks_off, running.asked = dict(FILES), None, None, []
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    point_at(monkeypatch, f"http://127.0.0.1:{running.server_address[1]}")
    yield running
    running.shutdown()
    running.server_close()


def test_a_repository_is_fetched_without_pickles_and_second_copies(server, cache):
    directory = locate("org/name")
    assert directory.is_relative_to(cache)
    assert {path.name for path in directory.iterdir()} == FETCHED
    assert (directory / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("asked", ["org/name", "org/name@main", f"org/name@{COMMIT}"])
def test_what_is_in_the_cache_serves_without_a_hub(server, monkeypatch, capsys, asked):
    directory = locate("org/name@main")
    capsys.readouterr()
    point_at(monkeypatch, "http://127.0.0.1:9")  # nothing listens there
    assert locate(asked) == directory
    assert "using the copy in the cache" in capsys.readouterr().err
    server.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate(asked) == directory
    assert not server.asked
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "refusal, says",
    [
        ((404, "RepoNotFound"), "no such repository, or a private one: .*HF_TOKEN"),
        ((401, "RepoNotFound"), "no such repository, or a private one: .*HF_TOKEN"),
        ((403, "GatedRepo"), "accepted its terms: do so at http://127.0.0.1:[0-9]+/org/name, then set HF_TOKEN"),
        ((500, "Oops"), "did not deliver it .*500.*check the network"),
    ],
)
def test_a_refusal_of_the_hub_is_explained_in_one_line(server, refusal, says):
    server.refuses = refusal
    with pytest.raises(UserError, match=f"'org/name' is no path here, .*{says}") as caught:
        locate("org/name")
    assert "\n" not in str(caught.value)


def test_half_a_repository_is_not_taken_for_the_model(server, monkeypatch):
    server.breaks_off = "model.safetensors"
    with pytest.raises(UserError, match="'org/name' .*did not deliver it"):
        locate("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        locate("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.breaks_off = None
    assert (locate("org/name") / "model.safetensors").read_bytes() == b"weights"


def test_an_unknown_revision_is_named_even_if_another_is_in_the_cache(server):
    locate("org/name")
    with pytest.raises(UserError, match="no revision 'v9' of it"):
        locate("org/name@v9")


def test_a_repository_without_safetensors_is_refused(server):
    del server.files["model.safetensors"], server.files["consolidated.safetensors"]
    with pytest.raises(UserError, match="'org/name': the repository has no safetensors weights"):
        locate("org/name")


def test_a_repository_without_config_is_refused(server):
    del server.files["config.json"]
    with pytest.raises(UserError, match="'org/name': the repository has no config.json"):
        locate("org/name")


def test_no_network_is_said_at_once(cache, monkeypatch):
    point_at(monkeypatch, "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"'org/name' is no path here, .*ConnectError.*check the network") as caught:
        locate("org/name")
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)


def test_offline_mode_is_named(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set.*unset it"):
        locate("org/name")


def test_a_silent_server_is_not_waited_for(cache, monkeypatch):
    monkeypatch.setattr(hub, "_SECONDS_TO_ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(UserError, match="did not deliver it .ReadTimeout"):
            locate("org/name")
        assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "text, expected",
    [
        ("org/name", ("org/name", None)),
        ("meta-llama/Llama-3.2-1B", ("meta-llama/Llama-3.2-1B", None)),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("org/name@", None),
        ("name", None),
        ("a/b/c", None),
        ("/org/name", None),
        ("../name", None),
        ("org/..", None),
        ("org/model.gguf", None),
        ("org/name\n", None),
    ],
)
def test_a_hub_id_is_told_from_a_path(text, expected):
    found = hub.parse(text)
    assert (found and (found.name, found.revision)) == expected


def test_an_existing_path_goes_before_the_hub(server, tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "a.gguf").touch()
    assert locate("org/name").name == "a.gguf"
    assert not server.asked
