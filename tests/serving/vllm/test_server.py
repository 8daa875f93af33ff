"""vLLM's server and OpenAI's client: tokens of the compiled model, aborts, many requests, a replica that dies.

KVCOMPILE_SOAK=1000 sends so many requests in place of a few.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.filterwarnings("ignore")

import vllm_engine as vllm  # noqa: E402 (it imports vLLM's environment)
from vllm_server import Server, until  # noqa: E402

POLICY, NEW, SHORT = "snapkv", 24, 4
REQUESTS = int(os.environ.get("KVCOMPILE_SOAK", "32"))
AT_ONCE = 12
EXTRA = {"return_token_ids": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def servers(served: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two replicas of one folder; the second one does not outlive this file's last test."""
    place = tmp_path_factory.mktemp("logs")
    both = [Server(served(POLICY), place / f"{i}.log") for i in range(2)]
    try:
        for server in both:
            server.wait()
        yield both
    finally:
        for server in both:
            server.close()


@pytest.fixture(scope="module")
def ids() -> list[list[int]]:
    vllm.require_model()
    return [*vllm.prompts(2, 150), *vllm.prompts(2, 90, start=2)]


@pytest.fixture(scope="module")
def expected(ids: list[list[int]]) -> list[list[int]]:
    reference = vllm.Reference(vllm.POLICIES[POLICY])
    return [reference(prompt, NEW) for prompt in ids]


@dataclass
class Said:
    """What a client has of an answer, and how it ended: None, or the error that the client raised."""

    server: Server
    tokens: list[int] = field(default_factory=list)
    error: Exception | None = None


def whole(server: Server, prompt: list[int], new: int = NEW) -> Said:
    answer = server.client().completions.create(
        model=server.name, prompt=prompt, max_tokens=new, temperature=0, extra_body=EXTRA
    )
    return Said(server, list(answer.choices[0].token_ids))


def pieces(server: Server, prompt: list[int], new: int = NEW) -> Iterator[list[int]]:
    """The tokens of a streamed answer, as they come."""
    stream = server.client().completions.create(
        model=server.name, prompt=prompt, max_tokens=new, temperature=0, stream=True, extra_body=EXTRA
    )
    with stream:
        for chunk in stream:
            if chunk.choices:
                yield list(chunk.choices[0].token_ids or [])


def streamed(server: Server, prompt: list[int], new: int = NEW) -> Said:
    said = Said(server)
    try:
        for piece in pieces(server, prompt, new):
            said.tokens += piece
    except (openai.APIError, OSError) as error:
        said.error = error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore", "httpx2", "httpcore2"):
            raise
        said.error = error
    return said


def test_answers_are_those_of_the_compiled_model_streamed_and_not(
    servers: list[Server], ids: list[list[int]], expected: list[list[int]]
) -> None:
    server = servers[0]
    assert [m.id for m in server.client().models.list()] == [server.name]
    assert [whole(server, prompt).tokens for prompt in ids[:2]] == expected[:2]
    with ThreadPoolExecutor(len(ids)) as pool:
        together = list(pool.map(lambda prompt: streamed(server, prompt), ids))
    assert [said.tokens for said in together] == expected
    assert until(server.idle)


def test_a_chat_is_answered(servers: list[Server]) -> None:
    text = " ".join(f"Room {i} is empty." for i in range(60))
    chat = [{"role": "user", "content": f"{text} How many rooms are there?"}]
    answer = servers[0].client().chat.completions.create(model=servers[0].name, messages=chat, max_tokens=8)
    assert answer.usage.completion_tokens > 0
    assert answer.choices[0].message.content
    assert until(servers[0].idle)


def test_answers_that_are_given_up_free_their_blocks_and_change_no_other(
    servers: list[Server], ids: list[list[int]], expected: list[list[int]]
) -> None:
    server = servers[0]
    with ThreadPoolExecutor(len(ids)) as pool:
        others = [pool.submit(whole, server, prompt) for prompt in ids[:2]]
        for prompt in ids[2:]:
            assert next(iter(pieces(server, prompt, 500)))  # then its connection is closed
        assert [other.result().tokens for other in others] == expected[:2]
    assert until(server.idle)


def test_many_requests_leave_every_block_free(servers: list[Server], ids: list[list[int]]) -> None:
    """Prompts with a common start and without, answers whole, streamed and given up; equal prompts, equal answers."""
    server, draw = servers[0], random.Random(3)
    body = ids[0]
    wanted = []
    for _ in range(REQUESTS):
        start = draw.choice([0, 0, draw.randrange(100)])
        kind = draw.choice(["whole", "streamed", "given up"])
        wanted.append((kind, start, start + draw.choice([70, 100, 130])))
    answers: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    lock = threading.Lock()

    def ask(kind: str, start: int, end: int) -> None:
        if kind == "given up":
            next(iter(pieces(server, body[start:end], 200)))
            return
        said = {"whole": whole, "streamed": streamed}[kind](server, body[start:end], SHORT)
        assert said.error is None
        with lock:
            answers.setdefault((start, end), set()).add(tuple(said.tokens))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for done in [pool.submit(ask, *one) for one in wanted]:
            done.result()
    assert until(server.idle)
    assert {len(tokens) for said in answers.values() for tokens in said} == {SHORT}
    assert [said for said in answers.values() if len(said) > 1] == []
    assert server.metric("prefix_cache_hits_total") > 0


def test_a_replica_that_dies_under_load_gives_no_wrong_token_and_says_what_is_lost(
    servers: list[Server], ids: list[list[int]], expected: list[list[int]]
) -> None:
    """Two replicas behind turns: what a client got is right as far as it goes, and what ended early is an error."""
    turns, lock = itertools.cycle(servers), threading.Lock()
    begun, dead = threading.Semaphore(0), servers[1]

    def ask(i: int) -> tuple[int, Said]:
        with lock:
            server = next(turns)
        said = Said(server)
        try:
            for piece in pieces(server, ids[i % len(ids)]):
                said.tokens += piece
                if server is dead:
                    begun.release()
        except Exception as error:
            said.error = error
        return i % len(ids), said

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, i) for i in range(16)]
        assert begun.acquire(timeout=600)
        dead.kill()
        found: list[tuple[int, Said]] = [one.result() for one in asked]
    lost = [said for _, said in found if said.error is not None]
    assert lost
    assert {id(said.server) for said in lost} == {id(dead)}
    for i, said in found:
        assert said.tokens == expected[i][: len(said.tokens)]
        assert said.error is not None or len(said.tokens) == NEW
    assert any(said.server is servers[0] for _, said in found)
    with pytest.raises(openai.APIConnectionError):
        whole(dead, ids[0])
    assert whole(servers[0], ids[0]).tokens == expected[0]
    assert until(servers[0].idle)
