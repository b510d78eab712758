"""`slope serve`: the engine's own texts over HTTP, in any company, for OpenAI's client and for plain HTTP."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from support.data import scratch
from support.runs import slope, trained
from support.servers import LONG, POSITIONS, Server, alone, events, greedy, loaded_model, served_model, serving

from slope_cli.inference.engine import Engine
from slope_cli.inference.sampling import Sampling
from slope_cli.serving.engine_thread import BusyError, EngineError, EngineThread, StoppedError


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of four texts at once, with a chat template."""
    words = ("--max-batch", "4", "--max-queue", "16", "--max-length", "256")
    with serving(scratch() / "server", *words, model=served_model(chat=True)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    """OpenAI's own, an import of seconds that not every process of the tests needs."""
    import openai

    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


# -------------------------------------------------------------------------------------------------------------- texts


def test_a_completion(client: Any) -> None:
    answer = client.completions.create(model="tiny-chat", prompt="The wind", max_tokens=20, temperature=0)
    assert [choice.text for choice in answer.choices] == [greedy("The wind")]
    assert (answer.choices[0].finish_reason, answer.model) == ("length", "tiny-chat")
    assert answer.usage is not None
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 8,
        "completion_tokens": 20,
        "total_tokens": 28,
    }


def test_twenty_at_once_have_the_texts_of_the_engine_alone(client: Any) -> None:
    prompts = ["The wind was cold. " * (1 + i % 4) + str(i) for i in range(20)]

    def text(prompt: str) -> str:
        return client.completions.create(model="tiny-chat", prompt=prompt, max_tokens=30, temperature=0).choices[0].text

    with ThreadPoolExecutor(20) as pool:
        texts = list(pool.map(text, prompts))
    assert texts == [greedy(prompt, 30) for prompt in prompts]
    assert len(set(texts)) > 10


def test_a_stream(client: Any) -> None:
    how: dict[str, Any] = {"model": "tiny-chat", "prompt": "The wind", "max_tokens": 20, "temperature": 0}
    parts = list(client.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    *texts, last = parts
    assert "".join(part.choices[0].text for part in texts) == greedy("The wind")
    assert [part.choices[0].finish_reason for part in texts] == [None] * (len(texts) - 1) + ["length"]
    assert len(texts) > 3  # pieces that wait are joined
    assert (last.choices, last.usage.completion_tokens) == ([], 20)
    assert len({part.id for part in parts}) == 1


def test_a_stream_by_plain_http(server: Server) -> None:
    connection = server.begin(prompt="The wind", max_tokens=5, temperature=0, stream=True)
    *parts, end = events(connection)
    connection.close()
    assert "".join(part["choices"][0]["text"] for part in parts) == greedy("The wind", 5)
    assert end == "[DONE]"
    assert not any("usage" in part for part in parts)


def test_choices_of_a_seed_and_of_several_prompts(client: Any) -> None:
    how: dict[str, Any] = {"model": "tiny-chat", "max_tokens": 12, "temperature": 1.5, "top_p": 0.9}
    answer = client.completions.create(**how, prompt=["The ", "A dog"], n=2, seed=-1)
    seeds = (2**63 - 1, 0)
    expected = [alone(p, Sampling(12, 1.5, 0, 0.9, seed)) for p in ("The ", "A dog") for seed in seeds]
    assert [choice.text for choice in answer.choices] == [text.text for text in expected]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, sum(len(t.ids) for t in expected))
    unseeded = {client.completions.create(**how, prompt="The ").choices[0].text for _ in range(3)}
    assert len(unseeded) == 3
    assert client.completions.create(**how, prompt="The ", seed=5, extra_body={"top_k": 1}).choices[0].text == greedy(
        "The ", 12
    )


def test_prompts_of_ids(client: Any) -> None:
    how: dict[str, Any] = {"model": "tiny-chat", "max_tokens": 6, "temperature": 0}
    for prompt, count in (([84, 104], 1), ([[84, 104], [65]], 2)):
        choices = client.completions.create(**how, prompt=prompt).choices
        expected = [greedy(ids, 6) for ids in ([84, 104], [65])[:count]]
        assert [choice.text for choice in choices] == expected


def test_stop_strings(client: Any) -> None:
    whole = greedy("The wind", 16)
    for stop in (whole[4:6], [whole[4:6], "never"]):
        answer = client.completions.create(model="tiny-chat", prompt="The wind", stop=stop, temperature=0)
        assert answer.choices[0].text == whole.partition(whole[4:6])[0]
        assert answer.choices[0].finish_reason == "stop"


def test_a_chat(client: Any) -> None:
    ids = loaded_model().tokenizer("system: Be brief.\nuser: Hello\nassistant: ").input_ids
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    how: dict[str, Any] = {"model": "tiny-chat", "messages": messages, "temperature": 0}
    answer = client.chat.completions.create(**how, max_completion_tokens=10)
    assert answer.choices[0].message.content == greedy(ids, 10)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    parts = list(client.chat.completions.create(**how, max_tokens=10, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == greedy(ids, 10)
    assert parts[-1].choices[0].finish_reason == "length"
    longest = client.chat.completions.create(**how)  # to the end of the positions
    assert longest.usage is not None
    assert longest.usage.total_tokens == 256


@pytest.mark.parametrize("form", ["run", "packed"])
def test_a_run_is_served_and_has_no_chat(form: str, tmp_path: Path) -> None:
    folder = trained()
    if form == "packed":
        folder = tmp_path / "small"
        assert slope("export", trained(), folder, "--format", "packed").code == 0
    with serving(tmp_path, model=folder) as server:
        status, answer = server.ask("/v1/completions", {"prompt": "The ", "max_tokens": 9, "temperature": 0})
        expected = slope("generate", folder, "The ", "--temperature", "0", "--tokens", "9").out
        assert (status, "The " + answer["choices"][0]["text"] + "\n") == (200, expected)
        status, answer = server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]})
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert "has no chat template; use /v1/completions" in answer["error"]["message"]
        assert server.ask("/v1/models")[1]["data"][0]["id"] == folder.name
        server.wait_for(r"\nPOST  /v1/completions  200  0\.\d\d s  1 text  4 \+ 9 tokens\n")
        server.wait_for(r"\nPOST  /v1/chat/completions  400  0\.\d\d s  .* has no chat template; use /v1/completions")


# ------------------------------------------------------------------------------------------------- requests and limits


def test_models_and_health(server: Server, client: Any) -> None:
    from openai import NotFoundError

    assert [entry.id for entry in client.models.list()] == ["tiny-chat"]
    assert client.models.retrieve("tiny-chat").model_dump()["max_model_len"] == 256
    assert server.ask("/health") == (200, {"status": "ok", "running": 0, "waiting": 0})
    assert server.ask("/health", {})[0] == 405  # which the log has, unlike what came before
    server.wait_for("POST  /health  405")
    assert "GET  /health  " not in server.printed()
    with pytest.raises(NotFoundError, match="model 'gpt-9' is not served here; this is 'tiny-chat'"):
        client.completions.create(model="gpt-9", prompt="The ")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "prompt: Field required"),
        (b"{", "the request: JSON decode error"),
        ({"prompt": ""}, "prompt: is empty; give some text to continue"),
        ({"prompt": []}, "prompt: "),
        ({"prompt": 3}, "prompt: "),
        ({"prompt": "x" * 256}, "prompt: has 256 tokens and the engine only 256 positions; shorten it"),
        ({"prompt": [84, 257]}, "prompt: 257 is no token; ids are below 257"),
        ({"prompt": [-1]}, "prompt: -1 is no token; ids are below 257"),
        (b'{"prompt": "\\ud800"}', "prompt: "),
        ({"prompt": "The ", "max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"prompt": "The ", "temperature": -1}, "temperature must be 0 or more, not -1.0"),
        (b'{"prompt": "The ", "temperature": NaN}', "temperature must be 0 or more, not nan"),
        ({"prompt": "The ", "top_p": 0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"prompt": "The ", "top_k": 2**31}, "top_k: Input should be less than 2147483648"),
        ({"prompt": "The ", "stop": [""]}, "a stop string is empty"),
        ({"prompt": "The ", "stop": ["x"] * 17}, "stop: List should have at most 16 items"),
        ({"prompt": "The ", "stop": 5}, "stop: Input should be a valid string"),
        ({"prompt": "The ", "n": 129}, "n: Input should be less than or equal to 128"),
        ({"prompt": "The ", "n": 21}, "asks for 21 texts; the server takes at most 20 at once"),
        ({"prompt": "The ", "logprobs": 0}, "'logprobs': is not supported by this server; leave it out"),
        ({"prompt": "The ", "echo": True}, "'echo': is not supported by this server; leave it out"),
        ({"prompt": "The ", "top_q": 1}, "'top_q': is not supported by this server; leave it out"),
        (b'{"prompt": "The ", "\\ud800": 1}', "the request: Input should be a valid string"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_a_sentence(body: Any, sentence: str, stream: bool, server: Server) -> None:
    if isinstance(body, dict):
        body = body | {"stream": stream}
    status, answer = server.ask("/v1/completions", body)
    assert (status, list(answer), list(answer["error"])) == (400, ["error"], ["message", "type", "param", "code"])
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"].startswith(sentence)
    if isinstance(body, dict):
        server.wait_for(f"400  .* s  {re.escape(sentence)}")


def test_parameters_that_ask_for_nothing_are_taken(client: Any) -> None:
    neutral: dict[str, Any] = {"best_of": 1, "echo": False, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me"}
    how: dict[str, Any] = {"model": "tiny-chat", "prompt": "The ", "max_tokens": 3, "temperature": 0}
    assert client.completions.create(**how, **neutral, logprobs=None).choices[0].text == greedy("The ", 3)
    messages: Any = [{"role": "user", "content": "Hello"}]
    client.chat.completions.create(model="tiny-chat", messages=messages, max_tokens=1, logprobs=False, tools=[])


def test_messages_that_the_template_refuses(client: Any) -> None:
    from openai import BadRequestError

    messages: Any = [{"role": "critic", "content": "4"}]
    with pytest.raises(BadRequestError, match="chat template refuses them: no critic here"):
        client.chat.completions.create(model="tiny-chat", messages=messages)


@pytest.mark.parametrize(
    ("more", "message", "what"),
    [
        ({"tools": [{"type": "function", "function": {"name": "add"}}]}, {}, "'tools': is"),
        ({"tool_choice": "auto"}, {}, "'tool_choice': is"),
        ({}, {"role": "tool", "tool_call_id": "1"}, "messages: the role 'tool' is"),
        ({}, {"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages: 'tool_calls' is"),
    ],
)
def test_tools_are_refused(more: dict[str, Any], message: dict[str, Any], what: str, server: Server) -> None:
    messages = [{"role": "user", "content": "2+2?"}, {"role": "user", "content": "4"} | message]
    status, answer = server.ask("/v1/chat/completions", {"messages": messages, "max_tokens": 1} | more)
    assert (status, answer["error"]["message"]) == (400, f"{what} not supported by this server; leave it out")


def test_paths_and_bodies_that_are_none(server: Server) -> None:
    assert server.ask("/v1/nothing")[1]["error"]["message"] == "GET /v1/nothing: not found"
    status, answer = server.ask("/v1/completions")
    assert (status, answer["error"]["message"]) == (405, "GET /v1/completions: method not allowed")
    assert server.ask("/docs")[0] == 404
    status, answer = server.ask("/v1/completions", b" " * (17 << 20))
    assert (status, answer["error"]["message"]) == (413, "the request has more than 16 MiB")
    status, answer = server.ask("/v1/completions", {"prompt": "The "}, {"Content-Type": "text/plain"})
    assert (status, answer["error"]["message"].endswith("the header Content-Type: application/json")) == (400, True)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
        raw.sendall(b"\x00\x01garbage\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    assert server.ask("/health")[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_text(stream: bool, tmp_path: Path) -> None:
    with serving(tmp_path, "--max-batch", "1", "--max-queue", "1") as server:
        first, second = server.begin(**LONG, stream=stream), server.begin(**LONG, stream=stream)
        server.wait_for_texts(1, 1)
        second.close()  # while it waits
        server.wait_for_texts(1)
        first.close()
        server.wait_for_texts(0)
        assert server.ask("/v1/completions", {"prompt": "The ", "temperature": 0})[1]["choices"][0]["text"]
        server.wait_for(r"POST  /v1/completions  (unanswered|200)  \d\.\d\d s  1 text  4 \+ \d+ tokens  cancelled\n")


def test_clients_that_go_away_leave_the_texts_of_others_as_they_are(server: Server) -> None:
    leaving = [server.begin(prompt=f"Leave {i}", max_tokens=200, stream=bool(i % 2)) for i in range(6)]
    staying = [server.begin(prompt=f"Stay {i}", max_tokens=40, temperature=0, stream=True) for i in range(6)]
    for connection in leaving:
        connection.close()
    for i, connection in enumerate(staying):
        *parts, end = events(connection)
        connection.close()
        assert ("".join(part["choices"][0]["text"] for part in parts), end) == (greedy(f"Stay {i}", 40), "[DONE]")
    server.wait_for_texts(0)


def test_a_full_queue(tmp_path: Path) -> None:
    with serving(tmp_path, "--max-batch", "1", "--max-queue", "1") as server:
        running = [server.begin(**LONG, stream=True) for _ in range(2)]
        server.wait_for_texts(1, 1)
        for stream in (False, True):
            status, answer = server.ask("/v1/completions", {"prompt": "The ", "stream": stream})
            assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
            assert answer["error"]["message"] == "2 texts are continued or wait, and at most 2 may; try again"
        for connection in running:
            connection.close()
        server.wait_for_texts(0)
        assert server.ask("/v1/completions", {"prompt": "The "})[0] == 200


def test_a_key(tmp_path: Path) -> None:
    with serving(tmp_path, SLOPE_API_KEY="secret") as server:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
            status, answer = server.ask("/v1/models", headers=headers)
            assert (status, answer["error"]["type"]) == (401, "authentication_error")
        assert server.ask("/v1/models", headers={"Authorization": "Bearer secret"})[0] == 200
        assert server.ask("/health")[0] == 200
        assert "secret" not in server.printed()


# ----------------------------------------------------------------------------------------------------------- its end


def test_a_signal_lets_running_texts_finish(tmp_path: Path) -> None:
    server = Server(tmp_path)
    request = server.begin(prompt="The ", max_tokens=400, temperature=0)
    server.wait_for_texts(1)
    server.send(signal.SIGTERM)
    answer = json.load(request.getresponse())
    request.close()
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 400)
    assert server.finish() == 0
    assert "shutting down; 1 request in flight has 30 s\n" in server.printed()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_grace_period_cuts_texts(number: int, tmp_path: Path) -> None:
    server = Server(tmp_path, "--max-batch", "1", "--grace", "0.3")
    whole, streamed = server.begin(**LONG), server.begin(**LONG, stream=True)
    server.wait_for_texts(1, 1)
    server.send(number)
    response = whole.getresponse()
    error = json.load(response)["error"]
    assert (response.status, error["message"], error["type"]) == (503, "the server stops", "server_error")
    assert events(streamed)[-1] == {"error": error}
    for connection in (whole, streamed):
        connection.close()
    assert server.finish() == 0
    assert "Traceback" not in server.printed()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait(number: int, tmp_path: Path) -> None:
    server = Server(tmp_path)
    request = server.begin(**LONG, stream=True)
    server.wait_for_texts(1)
    server.send(number)
    server.wait_for("shutting down; 1 request")
    server.send(number)
    assert events(request)[-1]["error"]["message"] == "the server stops"
    assert server.finish(5) == 0
    request.close()
    assert "Traceback" not in server.printed()


def test_an_idle_server_stops_at_once(tmp_path: Path) -> None:
    server = Server(tmp_path)
    with contextlib.closing(HTTPConnection("127.0.0.1", server.port)) as kept, socket.socket() as silent:
        kept.request("GET", "/v1/models")
        kept.getresponse().read()
        silent.connect(("127.0.0.1", server.port))
        server.wait_for("GET")
        server.send(signal.SIGINT)
        assert server.finish(5) == 0
    assert [line.partition(" ")[0] for line in server.printed().splitlines()] == ["serving", "GET", "shutting"]


# ------------------------------------------------------------------------------------------------------------- faults


def test_an_error_of_the_engine_ends_its_texts_and_the_thread_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        _, net, tokenizer, *_ = loaded_model()
        engine, ends = Engine(net, tokenizer, max_batch=2), list[str]()
        thread = EngineThread(engine, 2, lambda: ends.append("end"))
        failing = engine.decoder.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        jobs = [thread.submit(lambda: ["The ", "A"], [Sampling(9)] * 2), thread.submit(lambda: ["B"], [Sampling(9)])]
        for job in jobs:
            with pytest.raises(EngineError, match="the engine failed: ZeroDivisionError: division by zero"):
                await anext(job.pieces())
        assert (thread.texts, thread.fault, ends) == (0, "", [])
        failing.remove()
        job = thread.submit(lambda: ["The "], [Sampling(20, temperature=0)])
        assert "".join([piece.text async for piece in job.pieces()]) == greedy("The ")
        assert thread.texts == 0
        thread.close()

    asyncio.run(scenario())
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_device_that_works_no_more_ends_the_server() -> None:
    async def scenario() -> None:
        _, net, tokenizer, *_ = loaded_model()
        engine, ended = Engine(net, tokenizer, max_batch=1), asyncio.Event()
        thread = EngineThread(engine, 1, ended.set)
        engine.decoder.tokens = engine.decoder.tokens.to("meta")  # it can compute nothing, like a GPU after a fault
        jobs = [thread.submit(lambda: ["The "], [Sampling(9)]) for _ in range(2)]
        for job in jobs:
            with pytest.raises((EngineError, StoppedError)):
                await anext(job.pieces())
        await asyncio.wait_for(ended.wait(), 30)
        assert thread.fault.startswith("meta works no more: ")
        assert thread.fault.endswith("; start the server again")
        with pytest.raises(StoppedError):
            thread.submit(lambda: ["The "], [Sampling(9)])
        thread.close()

    asyncio.run(scenario())


def test_a_busy_thread_refuses_and_a_cancelled_job_makes_room() -> None:
    async def scenario() -> None:
        _, net, tokenizer, *_ = loaded_model()
        thread = EngineThread(Engine(net, tokenizer, max_batch=1), 0, lambda: None)
        job = thread.submit(lambda: ["The "], [Sampling(POSITIONS)])
        with pytest.raises(BusyError):
            thread.submit(lambda: ["The "], [Sampling(9)])
        thread.cancel(job)
        thread.cancel(job)
        assert thread.texts == 0
        other = thread.submit(lambda: ["The "], [Sampling(5, temperature=0)])
        assert "".join([piece.text async for piece in other.pieces()]) == greedy("The ", 5)
        thread.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dtype", "bfloat"), "--dtype bfloat: did you mean bfloat16"),
        (("--max-length", "20001"), f"--max-length 20001: the model has {POSITIONS} positions"),
        (("--host", "256.0.0.1"), "256.0.0.1, port 8000: "),
        (("--host", "192.0.2.1"), "192.0.2.1, port 8000: "),
    ],
)
def test_a_command_that_cannot_work(words: tuple[str, ...], message: str) -> None:
    result = slope("serve", served_model(), *words)
    assert (result.code > 0, result.out) == (True, "")
    assert message in result.err


def test_a_port_that_is_taken_and_a_model_that_cannot_write() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = str(other.getsockname()[1])
        result = slope("serve", served_model(), "--port", port)
    assert (result.code, "Address already in use; choose another --host or --port" in result.err) == (1, True)
    result = slope("serve", trained("bert-base"), "--port", "0")
    assert (result.code, "cannot continue text; use a causal model" in result.err) == (2, True)


def test_a_missing_package_is_named_with_its_extra() -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None; sys.argv = ['slope', 'serve', 'model'];"
        "from slope_cli.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = "error: slope serve: uvicorn is missing; install the extra serve (docs/start.md#install)\n"
    assert (done.returncode, done.stderr) == (2, expected)
