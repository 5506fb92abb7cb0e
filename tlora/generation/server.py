"""Generation with a vLLM server of the base model, which many jobs share.

The server answers OpenAI's completions API with token ids (`return_token_ids`, vLLM 0.11 or newer)
and takes adapters at run time. How it is started:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --dtype DTYPE --enable-lora \
        --max-lora-rank 64 --max-loras 4

On a CPU `VLLM_ENABLE_V1_MULTIPROCESSING=0` before it leaves out a process, which would load vLLM
once more and have another one wait for it in a loop. vLLM then ties no threads to cores:
`OMP_NUM_THREADS` says how many, and `OMP_WAIT_POLICY=passive` leaves the cores to the jobs between
steps. On one GPU there is no such process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tlora.artefact import sha256_tree
from tlora.errors import UserError
from tlora.generation import Completion, Prompt, Rules, load_rules, refuse_beams

if TYPE_CHECKING:
    import requests
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

KEYS = ("TLORA_SERVER_KEY", "OPENAI_API_KEY")
"""Where the key is looked for: the first variable that is set."""
PARALLEL = 128
"""Requests that a job has under way: fewer leave rows of the server's batches empty."""
GROUP = 32
"""Completions that are handed on at a time; fewer lose less when a job is killed."""
WAITS = (1, 2, 4, 8, 16, 32)
"""Seconds before each further attempt of a request that a busy or restarting server failed."""
TIMEOUTS = (10, 3600)
"""Seconds to wait for a connection, and for an answer: requests of other jobs may come first."""
BUSY = (408, 429, 502, 503, 504)
"""Statuses that another attempt may change."""


def load(
    place: dict[str, Any], adapter: Path | None, tokenizer: PreTrainedTokenizerBase
) -> ServerBackend:
    """Turn to the server, and have it load an adapter.

    Parameters
    ----------
    place
        `server`: its URL; `model`: folder or repository of the base model, which must be what the
        server says it serves; `revision`, `stamp`.
    adapter
        A folder with its scaling folded, which the server can read under the same path until
        `close`; None for the base model.
    tokenizer
        The base model's.

    Raises
    ------
    UserError
        A server that is down, refuses the key, serves another model, or refuses the adapter.
    """
    client = Client(place["server"])
    rules = load_rules(tokenizer, place["model"], place.get("revision"))
    served = _served(client, place["model"])
    context = served.get("max_model_len")
    if adapter is None:
        return ServerBackend(client, rules, served["id"], context)
    # The weights are part of the name: the server keeps what it computed under a name. So is the
    # job: one that ends takes its adapter away from nobody else.
    parts = json.dumps([sha256_tree(adapter), str(adapter), place.get("stamp")])
    name = f"tlora-{hashlib.sha256(parts.encode()).hexdigest()[:24]}"
    backend = ServerBackend(client, rules, name, context, adapter)
    backend.load_adapter()
    return backend


def _served(client: Client, model: str) -> dict[str, Any]:
    """Return the server's entry of the base model.

    Raises
    ------
    UserError
        Where it serves another one.
    """
    try:
        answer = client.get("/v1/models")
    except Refused as refusal:
        raise UserError(f"server: {client.url}/v1/models: {refusal}") from refusal
    entries = answer.get("data", []) if isinstance(answer, dict) else []
    bases = [entry for entry in entries if not entry.get("parent")]
    wanted = {model, os.path.realpath(model)} if Path(model).is_dir() else {model}
    for entry in bases:
        for name in (entry["id"], entry.get("root") or ""):
            if {name, os.path.realpath(name)} & wanted:
                return entry
    found = ", ".join(entry["id"] for entry in bases) or "none"
    raise UserError(f"server: {client.url}: serves the model {found}: expected {model}")


class Refused(Exception):
    """An answer that another attempt does not change.

    Attributes
    ----------
    status
        Of HTTP.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """JSON over HTTP with a key, and further attempts where the server is down or busy.

    Parameters
    ----------
    url
        With or without "/v1" at its end.

    Raises
    ------
    UserError
        For what is no URL, or one that holds a password.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.password or parts.username:
            raise UserError(
                f"server: expected a URL without user and password: set {KEYS[0]} instead"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"server: {url!r}: expected a URL: http://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
        self._threads = threading.local()

    def get(self, path: str) -> Any:
        """Return the answer to GET; raises like `post`."""
        return self._call("GET", path, None, WAITS)

    def post(self, path: str, body: dict[str, Any], waits: Sequence[int] | None = None) -> Any:
        """Return the answer to POST.

        Parameters
        ----------
        path
            Below the URL.
        body
            Sent as JSON.
        waits
            Seconds before each further attempt; by default `WAITS`.

        Raises
        ------
        Refused
            By a status that another attempt does not change.
        UserError
            Where the server is down, or refuses the key.
        """
        return self._call("POST", path, body, WAITS if waits is None else waits)

    def _session(self) -> requests.Session:
        """Return this thread's connections."""
        import requests

        if not hasattr(self._threads, "session"):
            self._threads.session = requests.Session()
        return self._threads.session

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None, waits: Sequence[int]
    ) -> Any:
        import requests

        reason = ""
        for seconds in (0, *waits):
            if reason:
                logger.warning("server: %s: %s: trying again in %d s", self.url, reason, seconds)
            time.sleep(seconds)
            try:
                answer = self._session().request(
                    method, self.url + path, json=body, auth=self._sign, timeout=TIMEOUTS
                )
            except (requests.ConnectionError, requests.Timeout) as error:
                reason = f"no answer ({type(error).__name__})"
                continue
            if answer.status_code in (401, 403):
                raise UserError(
                    f"server: {self.url}: refuses the key ({answer.status_code}): expected it in "
                    f"{' or '.join(KEYS)}"
                )
            if answer.status_code in BUSY:
                reason = f"{answer.status_code} {self._message(answer)}"
                continue
            if not answer.ok:
                raise Refused(answer.status_code, self._message(answer))
            return self._content(answer)
        raise UserError(f"server: {self.url}: {reason} in {len(waits) + 1} attempts")

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # Said by hand: a password of ~/.netrc would be sent in its place.
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def _message(self, answer: requests.Response) -> str:
        content = self._content(answer)
        if isinstance(content, dict):
            error = content.get("error", content)
            content = error.get("message", error) if isinstance(error, dict) else error
        text = " ".join(str(content).split())[:300] or f"status {answer.status_code}"
        return text.replace(self.key, "***") if self.key else text

    @staticmethod
    def _content(answer: requests.Response) -> Any:
        try:
            return answer.json()
        except ValueError:
            return answer.text


class ServerBackend:
    """Decoding by a server.

    Parameters
    ----------
    client
        Speaks with it.
    rules
        What ends a completion.
    model
        The name that requests ask for: the base model's or an adapter's.
    context
        The server's own bound of a sequence, if it says one.
    adapter
        The adapter's folder; None for the base model.
    """

    def __init__(
        self,
        client: Client,
        rules: Rules,
        model: str,
        context: int | None,
        adapter: Path | None = None,
    ) -> None:
        self.client, self.rules, self.model = client, rules, model
        self.context, self.adapter = context, adapter
        self.loading = threading.Lock()
        self.loads = 0

    def load_adapter(self) -> None:
        """Have the server load the adapter.

        Raises
        ------
        UserError
            Where it refuses.
        """
        body = {"lora_name": self.model, "lora_path": str(self.adapter)}
        try:
            try:
                self.client.post("/v1/load_lora_adapter", body)
            except Refused as refusal:
                if "already been loaded" not in str(refusal):
                    raise
                # Left by an attempt that was killed; the folder has been written anew since.
                self.client.post("/v1/unload_lora_adapter", {"lora_name": self.model})
                self.client.post("/v1/load_lora_adapter", body)
        except Refused as refusal:
            reason = str(refusal)
            if refusal.status == 404 and "Not Found" in reason:
                reason = "takes no adapters: start it with --enable-lora and with "
                reason += "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            raise UserError(
                f"server: {self.client.url}: adapter {self.adapter}: {reason}"
            ) from refusal
        self.loads += 1

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        stop: Sequence[str],
        num_beams: int = 1,
    ) -> Iterator[list[Completion]]:
        """Yield the completions as they arrive.

        Raises
        ------
        UserError
            Before any work: beams, a prompt that leaves no room for a new token, or one that the
            server has no room for. Later: a server that stays away or refuses a request.
        """
        refuse_beams(num_beams)
        prompts = list(prompts)
        self.rules.check(prompts, max_new_tokens)
        for prompt in prompts:
            needed = len(prompt.input_ids) + self.rules.limit(prompt, max_new_tokens)
            if self.context is not None and needed > self.context:
                raise UserError(
                    f"server: {self.client.url}: max_model_len: {self.context}: expected at least "
                    f"{needed}, because of item {prompt.id!r}"
                )
        return self._stream(prompts, max_new_tokens, [text for text in stop if text])

    def _stream(
        self, prompts: list[Prompt], max_new_tokens: int, stop: list[str]
    ) -> Iterator[list[Completion]]:
        pool = ThreadPoolExecutor(PARALLEL)
        try:
            running: set[Future[Completion]] = {
                pool.submit(self._complete, prompt, max_new_tokens, stop) for prompt in prompts
            }
            group: list[Completion] = []
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                group += [future.result() for future in finished]
                if len(group) >= GROUP or not running:
                    yield group
                    group = []
        finally:
            pool.shutdown(cancel_futures=True)

    def _complete(self, prompt: Prompt, max_new_tokens: int, stop: list[str]) -> Completion:
        limit = self.rules.limit(prompt, max_new_tokens)
        tokens = self._tokens(prompt, limit, stop)
        item = self.rules.completion(prompt, tokens, limit, stop)
        if item.finish_reason == "length" and len(tokens) < limit:
            # It saw a stop string that the text as a whole does not hold.
            item = self.rules.completion(prompt, self._tokens(prompt, limit, []), limit, stop)
        return item

    def _tokens(self, prompt: Prompt, limit: int, stop: list[str]) -> list[int]:
        """Return what the server generates, up to a stop string or end token inclusive."""
        # What is left out would be filled in from the model's own settings.
        body = {
            "model": self.model,
            "prompt": list(prompt.input_ids),
            "max_tokens": limit,
            "temperature": prompt.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": stop,
            "stop_token_ids": sorted(self.rules.ends),
            "return_token_ids": True,
        }
        if prompt.temperature:
            body["seed"] = prompt.seed
        loads = self.loads
        try:
            try:
                answer = self.client.post("/v1/completions", body)
            except Refused as refusal:
                if refusal.status != 404 or self.adapter is None:
                    raise
                # The server was started again and has forgotten the adapter.
                with self.loading:
                    if self.loads == loads:
                        self.load_adapter()
                answer = self.client.post("/v1/completions", body)
        except Refused as refusal:
            raise UserError(
                f"server: {self.client.url}: item {prompt.id!r}: {refusal}"
            ) from refusal
        choices = answer.get("choices") if isinstance(answer, dict) else None
        tokens = choices[0].get("token_ids") if choices else None
        if tokens is None:
            raise UserError(
                f"server: {self.client.url}: answers without token_ids: expected a vLLM server"
            )
        return tokens

    def peak_memory(self) -> None:
        """Return None: the memory is the server's."""

    def close(self) -> None:
        """Have the server drop the adapter; one that is gone has dropped it."""
        if self.adapter is None:
            return
        try:
            self.client.post("/v1/unload_lora_adapter", {"lora_name": self.model}, waits=())
        except (Refused, UserError) as error:
            logger.warning("the adapter %s was not unloaded: %s", self.model, error)
