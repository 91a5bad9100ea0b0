"""Who writes the questions: an OpenAI-compatible endpoint, or a model on this machine. One request, one reply.

The API key is sent to the endpoint and goes nowhere else: it is cut out of what comes back before that is shown.
"""

import asyncio
import email.utils
import json
import math
import os
import time
import zlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, Self

from pydantic import BaseModel, ValidationError

from undo.config.mistakes import ConfigError

if TYPE_CHECKING:
    import httpx2
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_BACKOFF: Final = 60.0  # seconds
LONGEST_PAUSE: Final = 600.0  # seconds, whatever a server says; then it is asked again
LARGEST_REPLY: Final = 16 << 20  # bytes, unpacked
MOST_TOKENS: Final = 10_000_000  # of a request; more than any model reads
LOCAL_TOKENS: Final = 2048  # a local model stops here if nothing else is said


class Usage(NamedTuple):
    """Tokens of a request; 0, 0 if the server does not say."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Reply(NamedTuple):
    content: str
    usage: Usage
    complete: bool  # False: it ran into the token limit


class Trouble(Exception):  # noqa: N818  # an outcome, not an error
    """A request that gave no reply to use. What stands before the first colon of its reason is its kind."""

    def __init__(
        self, reason: str, *, after: float | None = None, usage: Usage | None = None, final: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.after, self.usage, self.final = reason, after, usage or Usage(), final


class Writer(Protocol):
    async def ask(self, prompt: str, attempt: int) -> Reply:
        """Raises Trouble, or ConfigError if no further request can succeed."""
        ...

    async def close(self) -> None: ...


class Pace:
    """At most so many requests a minute, evenly spaced, whoever asks; None: as fast as they come."""

    def __init__(
        self,
        per_minute: float | None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._now, self.sleep = now, sleep

    async def turn(self) -> None:
        while (wait := self._next - self._now()) > 0:  # another one may have taken the turn while we slept
            await self.sleep(wait)
        self._next = self._now() + self._gap

    def pause(self, seconds: float) -> None:
        """For everyone: the server has said when to come back."""
        self._next = max(self._next, self._now() + seconds)


# --- an endpoint ---------------------------------------------------------------------------------------------------


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Tokens(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(BaseModel):
    choices: list[_Choice]
    usage: _Tokens | None = None


class Endpoint:
    """POST {url}/chat/completions."""

    def __init__(self, url: str, body: dict[str, Any], key: str | None, timeout: float) -> None:
        """`body`: what every request has beside its message: model, temperature, ... `timeout`: seconds, in all."""
        import httpx2

        self._url = check_url(url) + "/chat/completions"
        self._body, self._key, self._timeout = body, key, timeout
        headers = {"Accept-Encoding": "gzip, deflate", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._client: httpx2.AsyncClient = httpx2.AsyncClient(headers=headers, timeout=timeout)

    async def ask(self, prompt: str, attempt: int) -> Reply:
        import httpx2

        body = {**self._body, "messages": [{"role": "user", "content": prompt}]}
        try:
            async with asyncio.timeout(self._timeout):  # the client's own time-out starts anew with every byte
                async with self._client.stream("POST", self._url, json=body) as response:
                    said = await _bounded(response)
        except (TimeoutError, httpx2.TimeoutException):
            raise Trouble(f"time-out: no reply within {self._timeout:g} s") from None
        except httpx2.ConnectError as error:
            raise Trouble(self._clean(f"no connection: {error}")) from None
        except httpx2.RequestError as error:
            raise Trouble(self._clean(f"connection broken off: {error}")) from None
        if response.status_code != 200:
            raise self._refusal(response, said)
        try:
            completion = _Completion.model_validate_json(said)
        except ValidationError:
            raise Trouble(self._clean(f"broken JSON from the server: {said.decode(errors='replace')}")) from None
        usage = Usage(*completion.usage.model_dump().values()) if completion.usage else Usage()
        if not all(0 <= count <= MOST_TOKENS for count in usage):
            raise Trouble(f"wrong counts of tokens from the server: {usage.prompt_tokens}, {usage.completion_tokens}")
        if not completion.choices:
            raise Trouble("no choices from the server: nothing was written", usage=usage)
        choice = completion.choices[0]
        content = self._hide(choice.message.content or "")
        if not content.strip():
            raise Trouble(self._clean(f"an empty reply: finish_reason {choice.finish_reason}"), usage=usage)
        return Reply(content, usage, choice.finish_reason != "length")

    async def close(self) -> None:
        await self._client.aclose()

    def _refusal(self, response: "httpx2.Response", body: bytes) -> Exception:
        """Of an HTTP status: hopeless (ConfigError), of this passage only, or to be tried again."""
        status, said = response.status_code, self._clean(_message(response, body))
        after = retry_after(response.headers.get("retry-after"))
        if after is not None and after > LONGEST_PAUSE:
            said, after = f"{said} (to be asked again in {after:.0f} s; we wait {LONGEST_PAUSE:.0f})", LONGEST_PAUSE
        match status:
            case 401 | 403:
                return ConfigError(
                    f"{self._url} refuses the API key (HTTP {status}: {said})\n"
                    f"put the right one into the environment variable named by --api-key-env"
                )
            case 404 | 405:
                return ConfigError(
                    f"{self._url} is not there, or has no such model (HTTP {status}: {said})\n"
                    f"mend --endpoint, which ends in /v1 with most servers, or --model"
                )
            case 402:
                return ConfigError(f"{self._url}: payment required (HTTP 402: {said})")
            case _ if 300 <= status < 400:
                where = self._clean(response.headers.get("location", "another address"))
                return ConfigError(f"{self._url} sends us to {where}\ngive that as --endpoint if you trust it")
            case 408 | 409 | 425 | 429:
                return Trouble(f"HTTP {status}: {said}", after=after)
            case _ if status >= 500:
                return Trouble(f"HTTP {status}: {said}", after=after)
            case _:  # 400, 413, 422: this request will not do, and will not do again
                return Trouble(f"HTTP {status}: {said}", final=True)

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key and len(self._key) >= 8 else text  # "EMPTY" is no secret

    def _clean(self, text: str) -> str:
        """One line, not too long, without the key, and without characters that a terminal obeys."""
        line = "".join(c for c in " ".join(self._hide(text).split()) if c.isprintable())
        return line if len(line) <= 200 else line[:197] + "..."


def check_url(url: str) -> str:
    """Without a slash at the end. Raises ConfigError if it is none, or holds a secret."""
    import httpx2

    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):
        parsed = None
    if parsed is None or parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError("--endpoint: is not an address; give one such as http://localhost:8000/v1")
    if parsed.userinfo or parsed.query:
        raise ConfigError(
            "--endpoint: must hold no password and no ?key=, or they would be kept with the questions\n"
            "put the key into the environment variable named by --api-key-env"
        )
    return str(parsed).rstrip("/").removesuffix("/chat/completions")


def find_key(variable: str) -> str | None:
    """From the environment. Raises ConfigError if it cannot be sent, without showing it."""
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{variable}: holds characters that no API key has (a blank, an accent)")
    return key or None


def retry_after(header: str | None) -> float | None:
    """Seconds, or a date -> seconds from now; None: not said."""
    if header is None:
        return None
    try:
        seconds = float(header)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


async def _bounded(response: "httpx2.Response") -> bytes:
    """The body, unpacked. Raises Trouble for one that has no end, or is packed so that few bytes make very many."""
    packed = response.headers.get("content-encoding", "identity").lower()
    if packed not in ("identity", "gzip", "deflate"):
        raise Trouble(f"not asked for: a reply that is packed as {packed[:20]!a}")
    said = bytearray()
    async for chunk in response.aiter_bytes():
        said += chunk
        if len(said) > LARGEST_REPLY:
            raise Trouble(f"too much from the server: a reply of more than {LARGEST_REPLY >> 20} MiB")
    return bytes(said)


def _message(response: "httpx2.Response", body: bytes) -> str:
    """{"error": {"message": ...}}, as all of them say it, or whatever was said."""
    try:
        said = json.loads(body)
        error = said.get("error", said) if isinstance(said, dict) else said
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except ValueError:
        return body.decode(errors="replace") or response.reason_phrase


# --- a model on this machine ---------------------------------------------------------------------------------------


class LocalModel:
    """transformers' generate with the model's chat template, if it has one; safetensors only."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        temperature: float | None,
        max_tokens: int,
        seed: int,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._temperature, self._max_tokens, self._seed = temperature, max_tokens or LOCAL_TOKENS, seed
        self._one_at_a_time = asyncio.Lock()

    @classmethod
    def load(cls, name: str, temperature: float | None, max_tokens: int, seed: int) -> Self:
        """From a folder or the hub. Raises ConfigError if it is not there, gated, or has no safetensors."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from undo.config.secrets import find_token

        token = find_token("hf_token.txt", "HF_TOKEN")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, token=token)
            model = AutoModelForCausalLM.from_pretrained(name, token=token, dtype="auto", use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise ConfigError(
                f"--local-model {name}: cannot be loaded: {reason}\n"
                f"give a folder with a model in safetensors and its tokenizer, or a hub id; a gated one needs a token\n"
                f"in tokens/hf_token.txt or HF_TOKEN, and access asked for at https://huggingface.co/{name}"
            ) from None
        if torch.cuda.is_available():
            torch.nn.Module.cuda(model)
        return cls(model.eval(), tokenizer, temperature, max_tokens, seed)

    async def ask(self, prompt: str, attempt: int) -> Reply:
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._generate, prompt, attempt)

    async def close(self) -> None:
        pass

    def _generate(self, prompt: str, attempt: int) -> Reply:
        import torch

        if self._tokenizer.chat_template:
            message = [{"role": "user", "content": prompt}]
            text = str(self._tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
            tokens = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)
        else:
            tokens = self._tokenizer(f"{prompt}\nJSON:\n", return_tensors="pt")
        tokens = tokens.to(self._model.device)
        length = tokens["input_ids"].shape[1]
        room = getattr(self._model.config, "max_position_embeddings", None)
        if room is not None and length >= room:
            raise Trouble(f"too long for the model: {length} tokens of {room}", final=True)
        sampling: dict[str, Any] = {}
        if self._temperature is not None:
            sampling = (
                {"do_sample": True, "temperature": self._temperature} if self._temperature else {"do_sample": False}
            )
        torch.manual_seed(zlib.crc32(f"{self._seed} {attempt} {prompt}".encode()))  # the same questions in any order
        with torch.no_grad():
            made = self._model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                max_new_tokens=self._max_tokens,
                pad_token_id=self._tokenizer.pad_token_id or 0,
                **sampling,
            )[0, length:]
        content = str(self._tokenizer.decode(made, skip_special_tokens=True))
        return Reply(content, Usage(length, len(made)), len(made) < self._max_tokens)
