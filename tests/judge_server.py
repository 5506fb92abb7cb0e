"""A scripted judge behind real HTTP: an OpenAI-compatible endpoint that says what a test wants."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-test-1f3a9c-never-to-be-seen"


@dataclass(frozen=True)
class Answer:
    """One answer of the judge.

    Attributes
    ----------
    text
        Of the judgment.
    status
        Of HTTP; other than 200 it is an error whose message is `text` and whose code is `code`.
    delay
        Seconds before it comes.
    body
        Sent as it stands, in place of a chat completion; `None` makes one.
    drop
        Whether to close the connection without an answer.
    """

    text: str = "Rating: [[5]]"
    status: int = 200
    code: str | None = None
    delay: float = 0.0
    body: str | None = None
    drop: bool = False


Script = Callable[[str, int], Answer]


@dataclass
class JudgeServer:
    """Answers `script(user's message, how many times it was asked before)`; used with `with`.

    Attributes
    ----------
    requests
        The JSON of every request, in the order they came.
    paths, keys
        Their paths, and what stood in their Authorization header.
    most
        Most requests at the same time.
    """

    script: Script = lambda prompt, before: Answer()
    model: str = "gpt-4-0613-as-served"
    requests: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most: int = 0

    def __enter__(self) -> JudgeServer:
        self._lock, self._now, self._asked = threading.Lock(), 0, {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """What stands in TLORA_JUDGE_BASE_URL."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def environment(self) -> dict[str, str]:
        """What makes a scorer ask this judge."""
        return {"TLORA_JUDGE_BASE_URL": self.url, "TLORA_JUDGE_API_KEY": KEY}

    def answer(self, path: str, key: str | None, request: dict[str, Any]) -> Answer:
        """Return what is to be said, and note who asked for what."""
        prompt = request["messages"][-1]["content"]
        with self._lock:
            self.requests.append(request)
            self.paths.append(path)
            self.keys.append(key)
            self._now += 1
            self.most = max(self.most, self._now)
            before = self._asked.get(prompt, 0)
            self._asked[prompt] = before + 1
        try:
            answer = self.script(prompt, before)
            time.sleep(answer.delay)
            return answer
        finally:
            with self._lock:
                self._now -= 1


def _handler(server: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = server.answer(self.path, self.headers["Authorization"], request)
            if answer.drop:
                self.close_connection = True
                return
            self._send(answer.status, answer.body or json.dumps(_content(answer, server.model)))

        def _send(self, status: int, body: str) -> None:
            data = body.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", "5")
            self.end_headers()
            try:
                self.wfile.write(data)
            except OSError:
                self.close_connection = True

        def log_message(self, *unused: object) -> None:
            pass

    return Handler


def _content(answer: Answer, model: str) -> dict[str, Any]:
    if answer.status != 200:
        return {"error": {"message": answer.text, "code": answer.code, "type": "scripted"}}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": answer.text},
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
