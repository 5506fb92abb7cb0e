"""Judgments by a language model behind an OpenAI-compatible endpoint: asked once, kept on disk.

The endpoint comes from the environment, because it belongs to whoever pays and changes no result:

`TLORA_JUDGE_BASE_URL`, `TLORA_JUDGE_API_KEY`
    Else `OPENAI_BASE_URL` and `OPENAI_API_KEY`; a key is never sent to the other pair's URL.
`TLORA_JUDGE_MODEL`
    The name under which the endpoint serves the judge, where it has another one there.
`TLORA_JUDGE_PRICE_INPUT`, `TLORA_JUDGE_PRICE_OUTPUT`
    Prices of a million tokens, for the cost that is printed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tlora.artefact import write_json
from tlora.errors import UserError
from tlora.progress import bar

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletion

logger = logging.getLogger(__name__)

MAX_TOKENS = 2048
"""Tokens of a judgment, as in FastChat; its temperature is 0."""
RETRIES = 10
"""Of a request that failed, with exponential backoff up to 8 s or as the endpoint says."""
TIMEOUT = 120.0
"""Seconds that an answer may take."""
CHARACTERS = 4
"""Characters of a token, for the estimate of the cost."""
EXPECTED_TOKENS = 200
"""Of a judgment, for the estimate: GPT-4's 320 judgments of MT-Bench that FastChat's authors
published have 183 on average at four characters a token."""
REFUSALS = ("content_filter", "content_policy_violation", "context_length_exceeded")
"""Error codes that concern one request and would come again: its judgment is missing."""

NO_COMPLETION = (
    "answered with no chat completion: expected the URL of an OpenAI-compatible endpoint, which "
    "usually ends with /v1"
)

PAIRS = (("TLORA_JUDGE_BASE_URL", "TLORA_JUDGE_API_KEY"), ("OPENAI_BASE_URL", "OPENAI_API_KEY"))
PRICES = ("TLORA_JUDGE_PRICE_INPUT", "TLORA_JUDGE_PRICE_OUTPUT")


@dataclasses.dataclass(frozen=True)
class Question:
    """What the judge is told; `id` names it in errors."""

    id: str
    system: str
    user: str

    def request(self, model: str) -> dict[str, Any]:
        """Return all that decides the answer."""
        return {
            "model": model,
            "messages": [
                {"role": "system", "content": self.system},
                {"role": "user", "content": self.user},
            ],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }


@dataclasses.dataclass(frozen=True)
class Judgment:
    """What the judge said.

    Attributes
    ----------
    text
        Empty where the endpoint would not judge.
    model
        The judge's name in the endpoint's own words; empty like the text.
    read, written
        Tokens, as the endpoint counts them; None where it does not.
    """

    text: str
    model: str
    read: int | None
    written: int | None


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where the judge is asked. The key is no part of its text form."""

    url: str
    key: str = dataclasses.field(repr=False)
    model: str

    @property
    def host(self) -> str:
        """The URL's host and port: without a user's name or password."""
        parts = urlsplit(self.url)
        return parts.hostname + (f":{parts.port}" if parts.port else "")


def judgments(
    questions: Sequence[Question], model: str, folder: Path, workers: int
) -> list[Judgment]:
    """Return the judge's answer to every question; what is known already is not asked again.

    Parameters
    ----------
    questions
        In any number; equal ones are asked once.
    model
        The judge.
    folder
        Where judgments are kept, one file each, by the SHA-256 of the request.
    workers
        Requests at the same time.

    Raises
    ------
    UserError
        Without an endpoint in the environment, before any request, unless all is known; and where
        the endpoint fails for good: the judgments until then are kept.
    """
    requests = {_digest(request): request for request in (q.request(model) for q in questions)}
    known = {digest: _read(folder, digest, request) for digest, request in requests.items()}
    waiting = {digest: request for digest, request in requests.items() if known[digest] is None}
    prices = _prices()
    found = f"judge {model}: {len(requests)} judgments, {len(requests) - len(waiting)} known"
    if waiting:
        endpoint = find_endpoint(model)
        _say(f"{found}, {len(waiting)} to ask: {_estimate(waiting.values(), prices)}")
        made = _ask_all(endpoint, waiting, folder, max(1, workers))
        known |= made
        _say(f"judge {model}: {len(made)} asked: {_total(waiting, made, prices)}")
    else:
        _say(f"{found}: nothing to ask")
    return [known[_digest(question.request(model))] for question in questions]


def find_endpoint(model: str) -> Endpoint:
    """Return the endpoint that the environment names.

    Raises
    ------
    UserError
        Where it names none, or no key for it, or no URL.
    """
    for url, key in PAIRS:
        if not os.environ.get(url):
            continue
        if not os.environ.get(key):
            raise UserError(f"{key}: not set: expected the key of the judge's endpoint in {url}")
        parts = urlsplit(os.environ[url])
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url}: expected a URL such as https://api.openai.com/v1")
        name = os.environ.get("TLORA_JUDGE_MODEL") or model
        return Endpoint(os.environ[url], os.environ[key], name)
    raise UserError(
        f"{PAIRS[0][0]}: not set: expected the URL of an OpenAI-compatible endpoint that serves "
        f"the judge {model} (https://api.openai.com/v1), and its key in {PAIRS[0][1]}"
    )


def _digest(request: Mapping[str, Any]) -> str:
    text = json.dumps(request, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _path(folder: Path, digest: str) -> Path:
    return Path(folder) / digest[:2] / f"{digest}.json"


def _read(folder: Path, digest: str, request: Mapping[str, Any]) -> Judgment | None:
    path = _path(folder, digest)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["request"] == request:
            return Judgment(**held["judgment"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        pass
    logger.warning("%s: no judgment of this request: asking again", path)
    return None


def _ask_all(
    endpoint: Endpoint, waiting: Mapping[str, dict[str, Any]], folder: Path, workers: int
) -> dict[str, Judgment]:
    """Ask for all that is missing; every answer is on disk as soon as it has come."""
    try:
        import openai
    except ImportError as error:
        raise UserError(
            "the judge needs the package openai: expected an installation of tlora[judge]"
        ) from error

    # They would log every request, and with it a URL that may hold a password.
    for name in ("openai", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    client = openai.OpenAI(
        base_url=endpoint.url, api_key=endpoint.key, max_retries=RETRIES, timeout=TIMEOUT
    )

    # Nothing new is begun when a request has failed for good.
    failed = threading.Event()

    def ask(digest: str, request: dict[str, Any]) -> Judgment | None:
        if failed.is_set():
            return None
        try:
            judgment = _ask(client, {**request, "model": endpoint.model})
            held = {"request": request, "judgment": dataclasses.asdict(judgment)}
            write_json(_path(folder, digest), held)
        except BaseException:
            failed.set()
            raise
        return judgment

    made: dict[str, Judgment] = {}
    pool = ThreadPoolExecutor(workers)
    try:
        with client, bar(total=len(waiting), desc="judge", unit="judgment") as progress:
            futures = {pool.submit(ask, *pair): pair[0] for pair in waiting.items()}
            try:
                for future in as_completed(futures):
                    made[futures[future]] = future.result()
                    progress.update()
            finally:
                # What is under way is paid for: it is waited for and kept.
                pool.shutdown(cancel_futures=True)
    except (openai.OpenAIError, UserError) as error:
        kept = sum(_path(folder, digest).is_file() for digest in waiting)
        raise UserError(
            f"judge at {endpoint.host}: {_reason(error, endpoint.key)}; {kept} of {len(waiting)} "
            f"judgments were made and are kept in {folder}"
        ) from None
    return made


def _ask(client: OpenAI, request: dict[str, Any]) -> Judgment:
    import openai

    try:
        answer = client.chat.completions.create(**request)
    except openai.BadRequestError as error:
        if error.code not in REFUSALS:
            raise
        logger.warning("the judge refused a question: %s", error.code)
        return Judgment("", "", 0, 0)
    except json.JSONDecodeError as error:
        raise UserError(NO_COMPLETION) from error
    return _judgment(answer)


def _judgment(answer: ChatCompletion) -> Judgment:
    # An endpoint of another kind answers with anything, which the client passes on.
    choices = getattr(answer, "choices", None)
    message = getattr(choices[0], "message", None) if choices else None
    if message is None:
        raise UserError(NO_COMPLETION)
    usage = answer.usage
    return Judgment(
        text=message.content or "",
        model=answer.model or "",
        read=usage.prompt_tokens if usage else None,
        written=usage.completion_tokens if usage else None,
    )


def _reason(error: Exception, key: str) -> str:
    """Say in one line why a request failed for good; the key is in none of them."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return f"no answer in {TIMEOUT:g} s, asked {RETRIES + 1} times"
    if isinstance(error, openai.APIConnectionError):
        return f"no connection, tried {RETRIES + 1} times"
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        # Its message may repeat a part of the key.
        return f"{error.status_code}: the key was not accepted"
    message = " ".join(str(error).replace(key, "***").split())
    return message[:300]


def _prices() -> tuple[float, float] | None:
    """Return the prices of a million tokens read and written, where both are known."""
    found = []
    for name in PRICES:
        text = os.environ.get(name, "")
        try:
            price = float(text) if text else None
        except ValueError:
            price = math.nan
        if price is not None and not (math.isfinite(price) and price >= 0):
            raise UserError(f"{name}: {text!r}: expected the price of a million tokens")
        found.append(price)
    return None if None in found else (found[0], found[1])


def _guess(request: Mapping[str, Any]) -> int:
    """Return about how many tokens a request has."""
    return sum(len(message["content"]) for message in request["messages"]) // CHARACTERS


def _estimate(requests: Any, prices: tuple[float, float] | None) -> str:
    read = sum(map(_guess, requests))
    written, most = (n * len(requests) for n in (EXPECTED_TOKENS, MAX_TOKENS))
    text = f"about {read:,} tokens to read and {written:,} to write (at most {most:,})"
    if prices is None:
        return f"{text}; the price is not known ({', '.join(PRICES)})"
    return f"{text}: about {_cost(read, written, prices)}, at most {_cost(read, most, prices)}"


def _total(
    requests: Mapping[str, dict[str, Any]],
    made: Mapping[str, Judgment],
    prices: tuple[float, float] | None,
) -> str:
    counted = all(None not in (one.read, one.written) for one in made.values())
    read = sum(_guess(requests[d]) if one.read is None else one.read for d, one in made.items())
    written = sum(
        len(one.text) // CHARACTERS if one.written is None else one.written for one in made.values()
    )
    text = f"{'' if counted else 'about '}{read:,} tokens read and {written:,} written"
    return text if prices is None else f"{text}: {_cost(read, written, prices)}"


def _cost(read: int, written: int, prices: tuple[float, float]) -> str:
    return f"{(read * prices[0] + written * prices[1]) / 1e6:.2f}"


def _say(text: str) -> None:
    logger.info("%s", text)
    print(text, file=sys.stderr, flush=True)
