"""The client of a vLLM server: attempts, keys, refusals. The server here says what it is told to;
tests/vllm has a real one."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tlora.errors import UserError
from tlora.generation import Prompt
from tlora.generation import server as served

KEY = "sk-very-secret-0123456789"
TINY = str(Path(__file__).resolve().parents[2] / "workflow/resources/tiny")

Answer = tuple[int, Any]


@dataclass
class Scripted:
    """A server that answers with a function of path and body, and notes what it was asked."""

    url: str
    answer: Callable[[str, dict[str, Any]], Answer | None]
    asked: list[tuple[str, dict[str, Any], str | None]] = field(default_factory=list)

    def paths(self) -> list[str]:
        """Return the paths it was asked for, in order."""
        return [path for path, _, _ in self.asked]


def models(path: str, body: dict[str, Any]) -> Answer:
    """Serve the tiny model, which says its prompt's first token, "=" and the end."""
    if path == "/v1/models":
        return 200, {"data": [{"id": "tiny", "root": TINY, "max_model_len": 64}]}
    if path == "/v1/completions":
        return 200, {"choices": [{"token_ids": [body["prompt"][0], 33, 2]}]}
    return 200, "Success"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    """A running server; `answer` may be replaced. None closes the connection."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size) or b"{}")
            made.asked.append((self.path, body, self.headers.get("Authorization")))
            answer = made.answer(self.path, body)
            if answer is None:
                self.close_connection = True
                return
            content = json.dumps(answer[1]).encode()
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Scripted(f"http://127.0.0.1:{server.server_port}", models)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(served, "WAITS", (0, 0, 0))
    for name in served.KEYS:
        monkeypatch.delenv(name, raising=False)
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tlora.base_model import load_tokenizer

    return load_tokenizer({"model": TINY})


def backend(scripted: Scripted, tokenizer: Any, adapter: Path | None = None) -> Any:
    """Return a backend of the tiny model."""
    place = {"server": scripted.url, "model": TINY, "stamp": "stamp"}
    return served.load(place, adapter, tokenizer)


def said(found: Any, count: int = 40, stop: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the completions of some prompts by id, and check that each has one."""
    prompts = [Prompt(str(at), (5 + at, 7), 0.5 * (at % 2), at) for at in range(count)]
    items = [item for group in found.generate(prompts, 8, stop) for item in group]
    assert sorted(item.id for item in items) == sorted(prompt.id for prompt in prompts)
    return {item.id: item for item in items}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder that stands for an adapter's: this server reads nothing of it."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    return tmp_path / "adapter"


def test_requests_leave_nothing_to_the_servers_defaults(scripted: Scripted, tokenizer: Any) -> None:
    items = said(backend(scripted, tokenizer), stop=("stop", ""))
    assert items["3"].finish_reason == "eos" and items["3"].completion_tokens == 3
    assert items["3"].text == tokenizer.decode([8, 33])
    bodies = {body["prompt"][0]: body for path, body, _ in scripted.asked[1:]}
    assert len(bodies) == 40
    for at in (5, 6):
        assert bodies[at] == {
            "model": "tiny",
            "prompt": [at, 7],
            "max_tokens": 8,
            "temperature": 0.5 * (at % 2 == 0),
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": ["stop"],
            "stop_token_ids": [2],
            "return_token_ids": True,
        } | ({"seed": 1} if at == 6 else {})


def test_what_it_stopped_at_without_a_reason_goes_on(scripted: Scripted, tokenizer: Any) -> None:
    def early(path: str, body: dict[str, Any]) -> Answer:
        """Stop after two tokens where there are stop strings: the text holds none of them."""
        if path != "/v1/completions":
            return models(path, body)
        return 200, {"choices": [{"token_ids": [9, 10] if body["stop"] else [9, 10, 11, 2]}]}

    scripted.answer = early
    items = said(backend(scripted, tokenizer), 3, ("never there",))
    assert {(item.finish_reason, item.completion_tokens) for item in items.values()} == {("eos", 4)}


def test_a_busy_server_is_asked_again(
    scripted: Scripted, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    failing: list[Answer | None] = [(503, {"error": {"message": "busy"}}), None, (429, "later")]

    def sometimes(path: str, body: dict[str, Any]) -> Answer | None:
        return failing.pop() if failing else models(path, body)

    scripted.answer = sometimes
    assert len(said(backend(scripted, tokenizer), 4)) == 4
    assert scripted.paths().count("/v1/models") == 4
    assert "503 busy: trying again" in caplog.text
    assert "no answer (ConnectionError): trying again" in caplog.text


def test_a_dead_server_is_one_line(
    scripted: Scripted, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"server": "http://127.0.0.1:9", "model": TINY}
    with pytest.raises(UserError) as caught:
        served.load(place, None, tokenizer)
    expected = "server: http://127.0.0.1:9: no answer (ConnectionError) in 4 attempts"
    assert str(caught.value) == expected
    found = backend(scripted, tokenizer)
    scripted.answer = lambda path, body: None
    with pytest.raises(UserError, match=r"no answer \(ConnectionError\) in 4 attempts$"):
        said(found)


@pytest.mark.parametrize("name", served.KEYS)
def test_the_key_is_sent_and_never_told(
    scripted: Scripted,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(name, KEY)
    said(backend(scripted, tokenizer), 2)
    assert {key for _, _, key in scripted.asked} == {f"Bearer {KEY}"}
    scripted.answer = lambda path, body: (400, {"error": {"message": f"wrong: {KEY} {path}"}})
    with pytest.raises(UserError, match=r"wrong: \*\*\* /v1/models"):
        backend(scripted, tokenizer)
    scripted.answer = lambda path, body: (503, {"detail": f"busy {KEY}"})
    with pytest.raises(UserError, match=r"503 \{'detail': 'busy \*\*\*'\} in 4 attempts"):
        backend(scripted, tokenizer)
    scripted.answer = lambda path, body: (401, {"error": f"Unauthorized {KEY}"})
    with pytest.raises(
        UserError, match=r"refuses the key \(401\): expected it in TLORA_SERVER_KEY"
    ):
        backend(scripted, tokenizer)
    assert KEY not in caplog.text


def test_no_key_is_no_header(
    scripted: Scripted, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    said(backend(scripted, tokenizer), 2)
    assert {key for _, _, key in scripted.asked} == {None}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://user:hidden@host:1", "without user and password: set TLORA_SERVER_KEY"),
        ("host:8000", "'host:8000': expected a URL"),
        ("ftp://host", "'ftp://host': expected a URL"),
    ],
)
def test_odd_urls_are_refused(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        served.Client(url)
    assert "hidden" not in str(caught.value)
    assert served.Client("http://host:1/v1/").url == "http://host:1"


def test_another_model_is_refused(scripted: Scripted, tokenizer: Any) -> None:
    entries: list[dict[str, Any]] = [{"id": "other", "root": "/elsewhere"}]
    entries.append({"id": TINY, "root": TINY, "parent": "other"})
    scripted.answer = lambda path, body: (200, {"data": entries})
    with pytest.raises(UserError, match=rf"serves the model other: expected {TINY}"):
        backend(scripted, tokenizer)
    entries.append({"id": TINY, "root": "/elsewhere"})
    assert backend(scripted, tokenizer).model == TINY


def test_a_short_context_is_refused_before_any_work(scripted: Scripted, tokenizer: Any) -> None:
    found = backend(scripted, tokenizer)
    with pytest.raises(UserError, match=r"max_model_len: 64: expected at least 65, .* item 'b'"):
        found.generate([Prompt("a", (5,)), Prompt("b", tuple(range(3, 8)))], 60, [])
    assert scripted.paths() == ["/v1/models"]


def test_answers_without_tokens_are_refused(scripted: Scripted, tokenizer: Any) -> None:
    found = backend(scripted, tokenizer)
    scripted.answer = lambda path, body: (200, {"choices": [{"text": "hello"}]})
    with pytest.raises(UserError, match="answers without token_ids: expected a vLLM server"):
        said(found, 1)


def test_adapters_are_named_after_their_weights_and_dropped(
    scripted: Scripted, tokenizer: Any, adapter: Path
) -> None:
    found = backend(scripted, tokenizer, adapter)
    said(found, 3)
    found.close()
    load, *completions, unload = scripted.asked[1:]
    assert load[:2] == (
        "/v1/load_lora_adapter",
        {"lora_name": found.model, "lora_path": str(adapter)},
    )
    assert {body["model"] for _, body, _ in completions} == {found.model} != {"tiny"}
    assert unload[:2] == ("/v1/unload_lora_adapter", {"lora_name": found.model})
    assert backend(scripted, tokenizer, adapter).model == found.model
    (adapter / "adapter_config.json").write_text("{ }")
    assert backend(scripted, tokenizer, adapter).model != found.model


def test_an_adapter_that_was_left_is_loaded_anew(
    scripted: Scripted, tokenizer: Any, adapter: Path
) -> None:
    held = [True]

    def holding(path: str, body: dict[str, Any]) -> Answer:
        if path == "/v1/unload_lora_adapter":
            held.clear()
        if path == "/v1/load_lora_adapter" and held:
            message = f"The lora adapter '{body['lora_name']}' has already been loaded. If you"
            return 400, {"error": {"message": message}}
        return models(path, body)

    scripted.answer = holding
    said(backend(scripted, tokenizer, adapter), 1)
    names = [path.split("/")[-1] for path in scripted.paths()[1:]]
    assert names == [
        "load_lora_adapter",
        "unload_lora_adapter",
        "load_lora_adapter",
        "completions",
    ]


def test_an_adapter_that_was_forgotten_is_loaded_once(
    scripted: Scripted, tokenizer: Any, adapter: Path
) -> None:
    found = backend(scripted, tokenizer, adapter)
    scripted.asked.clear()

    def forgotten(path: str, body: dict[str, Any]) -> Answer:
        loaded = "/v1/load_lora_adapter" in scripted.paths()
        if path == "/v1/completions" and not loaded:
            return 404, {"error": {"message": "The model does not exist."}}
        return models(path, body)

    scripted.answer = forgotten
    assert len(said(found)) == 40
    assert scripted.paths().count("/v1/load_lora_adapter") == 1


def test_refused_adapters_are_one_line(
    scripted: Scripted, tokenizer: Any, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refusing(status: int, answer: Any) -> Callable[[str, dict[str, Any]], Answer]:
        return lambda path, body: (
            (status, answer) if path.startswith(("/v1/l", "/v1/u")) else models(path, body)
        )

    scripted.answer = refusing(404, {"detail": "Not Found"})
    with pytest.raises(UserError, match="start it with --enable-lora and with VLLM_ALLOW_RUNTIME"):
        backend(scripted, tokenizer, adapter)
    message = "LoRA rank 64 is greater than max_lora_rank 16."
    scripted.answer = refusing(500, {"error": {"message": message}})
    with pytest.raises(UserError, match=message):
        backend(scripted, tokenizer, adapter)
    scripted.answer = models
    found = backend(scripted, tokenizer, adapter)
    scripted.answer = lambda path, body: None
    found.close()  # what is over is not held up by a server that is gone
    assert "was not unloaded" in caplog.text


def test_beams_are_refused(scripted: Scripted, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="num_beams: 4: expected 1 with backend 'vllm'"):
        backend(scripted, tokenizer).generate([Prompt("a", (5,))], 4, [], 4)
