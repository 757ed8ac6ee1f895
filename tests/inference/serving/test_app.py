"""The server as its clients meet it: OpenAI's own client, raw requests, crowds, and clients that leave."""

import functools
import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import requests

from statex_dist.errors import StateXError
from statex_dist.inference import decoding
from statex_dist.inference.decoding import Sampling
from statex_dist.inference.rows import take_rows
from statex_dist.inference.serving import batch as worker
from tests.evaluation.stand_ins import overflowing_model, tiny_model
from tests.inference.serving.running import ENDLESS, NAME, PATIENCE_SECONDS, Gate, alone, send_and_leave, serving


@functools.cache
def exact_model():
    """A model whose answers do not depend on rounding, as they would where rows are added up in another order."""
    return tiny_model().double()


@pytest.fixture(scope="module")
def server():
    with serving(exact_model(), max_body_bytes=100_000, max_prompt_tokens=200, max_tokens=4096, max_queue=8) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


def client_of(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_SECONDS)


@functools.cache
def expected(prompt, seed, **sampling):
    sampling = Sampling(**{"max_tokens": 16, "temperature": 1.0, **sampling})
    return alone(exact_model(), list(prompt.encode()), sampling, seed)


# Before a server uses the model.
HELLO = [expected("hello", seed) for seed in (5, 6)]
STOPPED = expected("hello", 5, until=(HELLO[0][9:11],))
GREEDY = expected("hello", 0, temperature=0.0, max_tokens=7)


def test_the_official_client_gets_the_text_of_the_prompt_alone(client):
    answer = client.completions.create(model=NAME, prompt="hello", seed=5)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, answer.model, answer.object) == (
        HELLO[0],
        "length",
        NAME,
        "text_completion",
    )
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 16, 21)


def test_the_official_client_streams(client):
    options = {"model": NAME, "prompt": "hello", "seed": 5, "stream": True}
    *chunks, last = client.completions.create(**options, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == HELLO[0]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) > 3
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert last.choices == []
    assert last.usage.completion_tokens == 16
    assert all(chunk.usage is None for chunk in client.completions.create(**options))


def test_completions_of_many_prompts_are_numbered_and_seeded(client):
    answer = client.completions.create(model=NAME, prompt=["hello", "b"], seed=5, n=2, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices[:2]] == ["hello" + text for text in HELLO]
    assert all(choice.text.startswith("b") for choice in answer.choices[2:])
    assert answer.usage.prompt_tokens == 6  # each is read once
    pieces = ["", "", "", ""]
    for chunk in client.completions.create(model=NAME, prompt=["hello", "b"], seed=5, n=2, echo=True, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == [choice.text for choice in answer.choices]


def test_tokens_are_prompts_too(client):
    answer = client.completions.create(model=NAME, prompt=[list(b"hello"), list(b"b")], seed=5, echo=True)
    assert answer.choices[0].text == "hello" + HELLO[0]
    assert client.completions.create(model=NAME, prompt=list(b"hello"), seed=6).choices[0].text == HELLO[1]


def test_stop_strings_and_greedy_decoding(client):
    choice = client.completions.create(model=NAME, prompt="hello", seed=5, stop=["never", HELLO[0][9:11]]).choices[0]
    assert (choice.text, choice.finish_reason) == (STOPPED, "stop")
    assert len(STOPPED) < len(HELLO[0])
    for more in ({"temperature": 0}, {"extra_body": {"top_k": 1}}):
        answer = client.completions.create(model=NAME, prompt="hello", max_tokens=7, **more)
        assert answer.choices[0].text == GREEDY


def test_a_random_seed_is_reported_and_repeats_the_answer(server):
    first = server.post(prompt="hello").json()
    assert first["seed"] != server.post(prompt="hello").json()["seed"]
    assert server.post(prompt="hello", seed=first["seed"]).json()["choices"] == first["choices"]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "statex-dist"
    with pytest.raises(openai.NotFoundError, match="'other'"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"model": "other", "prompt": "a"}, 404, "model", "model 'other' is not served here; 'tiny' is"),
        ({"model": "x" * 1000, "prompt": "a"}, 404, "model", "model 'xxx"),
        ({"prompt": ""}, 400, "prompt", "the prompt has no tokens"),
        ({"prompt": [[1], []]}, 400, "prompt", "the prompt has no tokens"),
        ({"prompt": "a" * 201}, 400, "prompt", "the prompt has 201 tokens; allowed are 200"),
        ({"prompt": [1, 258]}, 400, "prompt", "token 258 is not in the vocabulary; allowed: 0 to 257"),
        ({"prompt": [-1]}, 400, "prompt", "token -1 is not in the vocabulary"),
        ({"prompt": "a", "max_tokens": 4097}, 400, "max_tokens", "max_tokens must be at most 4096, not 4097"),
        ({"prompt": "a", "n": 5}, 400, "n", "n must be at most 4, not 5"),
        ({"prompt": ["a"] * 5, "n": 3}, 400, "prompt", "15 completions are too many for a request; allowed: 12"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature", "valid number, not 'hot'"),
        ({"prompt": "a" * 100_001}, 413, None, "the body is larger than 100000 bytes"),
    ],
)
def test_a_wrong_request_gets_its_reason(server, fields, status, param, words):
    response = server.post(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (status, "invalid_request_error", param)
    assert words in error["message"]
    assert len(error["message"]) < 200


def test_a_body_of_unknown_length_is_not_read_beyond_the_limit(server):
    response = requests.post(f"{server.url}/v1/completions", data=iter([b" " * 60_000] * 50), timeout=PATIENCE_SECONDS)
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "words"),
    [
        ("POST", "/v1/chat/completions", 404, "unsupported", "chat is not supported"),
        ("GET", "/v1/completions", 405, "method_not_allowed", "method not allowed"),
        ("POST", "/health", 405, "method_not_allowed", "method not allowed"),
        ("GET", "/" + "a" * 1000, 404, "unknown_url", "GET '/aaa"),
    ],
)
def test_unknown_routes_get_an_error_body(server, method, path, status, code, words):
    response = requests.request(method, server.url + path, timeout=PATIENCE_SECONDS)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert words in error["message"]
    assert "POST /v1/completions" in error["message"]
    assert len(error["message"]) < 250


def test_health_is_there_for_head_too(server):
    response = requests.head(f"{server.url}/health", timeout=PATIENCE_SECONDS)
    assert (response.status_code, response.content) == (200, b"")


def test_temperatures_near_zero_are_greedy_and_harm_nobody(server):
    assert server.post(prompt="hello", max_tokens=7, temperature=5e-324).json()["choices"][0]["text"] == GREEDY


def test_a_client_that_leaves_its_stream_frees_the_slot(server):
    before = server.outcomes().get("disconnected", 0)
    with server.stream(**ENDLESS) as response:
        lines = response.iter_lines()
        next(lines)
        found = server.metrics()
        assert found["running"] == 1
        assert found["state_bytes"] > 0
    server.wait_for(running=0, state_bytes=0)
    assert server.outcomes()["disconnected"] == before + 1


def test_metrics_count_what_was_done():
    with serving(tiny_model()) as server:
        assert server.post(prompt="hello", n=2, max_tokens=3, ignore_eos=True).ok
        assert server.post(prompt="").status_code == 400
        found = server.metrics()
        assert server.outcomes() == {"ok": 1, "invalid": 1}
    assert (found["prompt_tokens_total"], found["generated_tokens_total"]) == (5, 6)
    assert (found["batch_size_count"], found["batch_size_sum"]) == (3, 6)
    assert found["time_to_first_token_seconds_count"] == 1
    assert found["time_per_output_token_seconds_count"] == 4
    assert 0 < found["time_to_first_token_seconds_sum"] < PATIENCE_SECONDS
    assert found["process_resident_memory_bytes"] > 1 << 20


def test_clients_that_wait_and_leave_free_their_places():
    model = tiny_model()
    gate = Gate(model, passes=2)
    with serving(model, max_batch_size=1, max_queue=2) as server:
        running = send_and_leave(server, **ENDLESS)
        server.wait_for(running=1)
        waiting, other = (send_and_leave(server, **ENDLESS) for _ in range(2))
        server.wait_for(running=1, waiting=2)
        refused = server.post(prompt="a")
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert "3 are allowed" in refused.json()["error"]["message"]
        waiting.close()
        server.wait_for(running=1, waiting=1)
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(server.post, prompt="a", max_tokens=1)  # there is a place now
            server.wait_for(waiting=2)
            running.close()
            other.close()
            gate.open()
            assert answer.result().ok
        server.wait_for(running=0, waiting=0)
        assert server.outcomes() == {"refused": 1, "disconnected": 3, "ok": 1}
        assert server.metrics()["generated_tokens_total"] < 4096


def test_a_prompt_with_more_completions_than_free_slots_starts_with_those(server):
    with server.stream(**ENDLESS) as response:
        lines = response.iter_lines()
        next(lines)
        assert server.post(prompt="a", n=4, max_tokens=2, ignore_eos=True).ok
        assert server.metrics()["running"] == 1


def test_requests_that_take_too_long_are_given_up():
    model = tiny_model()
    gate = Gate(model, passes=4)
    with serving(model, max_batch_size=1, request_timeout=0.5) as server:
        with ThreadPoolExecutor() as pool:
            late = pool.submit(server.post, prompt="b", seed=1)
            with server.stream(**ENDLESS) as response:
                *_, last = (line for line in response.iter_lines() if line)
        gate.open()
        # One of the two had the slot; a stream that has begun ends with an error in place of [DONE].
        assert late.result().status_code == 504
        assert "not complete after 0.5 s" in late.result().json()["error"]["message"]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "timeout"
        server.wait_for(running=0, waiting=0)
        assert server.outcomes() == {"timeout": 2}


def test_a_body_that_does_not_arrive_is_given_up():
    with serving(tiny_model(), request_timeout=0.2) as server:
        connection = socket.create_connection(server.url.removeprefix("http://").split(":"))
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b"408" in connection.recv(100)
        connection.close()


def test_a_key_is_asked_for():
    with serving(tiny_model(), api_key="secret") as server:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}, {"Authorization": "ä"}):
            response = requests.get(f"{server.url}/v1/models", headers={k: v.encode() for k, v in headers.items()})
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert server.post(prompt="a").status_code == 401
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret") as client:
            assert client.completions.create(model=NAME, prompt="a").usage.prompt_tokens == 1
        assert requests.get(f"{server.url}/health").ok


def test_numbers_that_are_not_finite_fail_their_request_alone():
    with serving(overflowing_model(1, token=200)) as server, ThreadPoolExecutor() as pool:
        well = pool.submit(server.post, prompt="a", max_tokens=300, temperature=0, ignore_eos=True)
        for stream in (False, True):
            ill = server.post(prompt=[[1], [1, 200]], stream=stream)
            # In a stream the other prompt may have had its first token.
            message = ill.text if stream else ill.json()["error"]["message"]
            assert "layer 1 at position 1" in message
            assert stream or ill.status_code == 500
        assert well.result().json()["usage"]["completion_tokens"] == 300
        assert server.outcomes() == {"failed": 2, "ok": 1}
        assert requests.get(f"{server.url}/health").ok


def test_the_death_of_the_decoding_thread_fails_all_and_ends_the_server(caplog):
    model = tiny_model()
    gate = Gate(model, passes=3)
    with (
        serving(model, max_batch_size=1) as server,
        ThreadPoolExecutor() as pool,
        server.stream(**ENDLESS) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        waiting = pool.submit(server.post, prompt="a")
        server.wait_for(waiting=1)
        model.lm_head.weight.data = model.lm_head.weight.data[:, :3]  # the next pass fails
        gate.open()
        assert "decoding thread died" in [line for line in lines if line][-1].decode()
        assert waiting.result().status_code == 500
    assert isinstance(server.error, StateXError)
    assert "the decoding thread died" in caplog.text


def test_a_stopping_server_takes_nothing_and_finishes_what_it_has():
    model = tiny_model()
    gate = Gate(model, passes=3)
    with serving(model) as server, server.stream(**{**ENDLESS, "max_tokens": 20}) as response:
        lines = response.iter_lines()
        first = next(lines)
        server.server.request_stop()
        for url in ("/health", "/v1/completions"):
            method = "GET" if url == "/health" else "POST"
            body = {"model": NAME, "prompt": "a"}
            refused = requests.request(method, server.url + url, json=body, timeout=PATIENCE_SECONDS)
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
            assert "stopping" in refused.json()["error"]["message"]
        gate.open()
        lines = [first, *(line for line in lines if line)]
    assert lines[-1] == b"data: [DONE]"
    assert json.loads(lines[-2].removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"
    assert server.error is None


def test_the_grace_period_has_an_end():
    model = tiny_model()
    gate = Gate(model, passes=3)
    with serving(model, grace_seconds=0.1) as server:
        with server.stream(**ENDLESS) as response:
            lines = response.iter_lines()
            next(lines)
            server.server.request_stop()
            assert b"the server stopped before the answer was complete" in [line for line in lines if line][-1]
        gate.open()
    assert server.error is None


def test_a_decoding_thread_that_hangs_does_not_keep_the_process(monkeypatch, caplog):
    monkeypatch.setattr(worker, "LAST_STEP_SECONDS", 0.1)
    model = tiny_model()
    gate = Gate(model, passes=3)
    with serving(model, grace_seconds=0.1) as server, server.stream(**ENDLESS) as response:
        lines = response.iter_lines()
        next(lines)
        server.server.request_stop()
        assert list(lines)
    gate.open()
    assert isinstance(server.error, StateXError)
    assert "the decoding thread hangs" in caplog.text


def crowd(number):
    """Return a request of a crowd: any prompt, length, way of drawing; long ones are read in pieces."""
    rng = random.Random(number)
    prompt = bytes(rng.choice(b"abcdefgh \n") for _ in range(rng.choice([1, 3, 9, 16, 40]))).decode()
    sampling = {
        "max_tokens": rng.choice([1, 5, 24]),
        "temperature": rng.choice([0.0, 1.0]),
        "top_k": rng.choice([0, 9]),
    }
    return prompt, sampling


CROWD = {number: expected(crowd(number)[0], number, **crowd(number)[1]) for number in range(40)}


def wrong_answers(server, clients):
    """Send all requests of the crowd, ``clients`` at a time; return the numbers of those whose text differs.

    The expected text of a request is the one that it gets alone.
    """

    def ask(number):
        prompt, sampling = crowd(number)
        answer = server.post(prompt=prompt, seed=number, stream=number % 2 == 1, **sampling)
        if number % 2 == 0:
            return answer.json()["choices"][0]["text"]
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-2]]
        return "".join(event["choices"][0]["text"] for event in events)

    with ThreadPoolExecutor(clients) as pool:
        answers = dict(zip(CROWD, pool.map(ask, CROWD), strict=True))
    return [number for number, text in answers.items() if text != CROWD[number]]


def test_a_crowd_gets_every_answer_and_each_its_own(server):
    before = server.outcomes().get("ok", 0)
    assert wrong_answers(server, clients=8) == []
    assert server.outcomes()["ok"] == before + len(CROWD)
    server.wait_for(running=0, waiting=0, reading=0)


def test_the_crowd_would_see_states_that_change_hands(server, monkeypatch):
    """A negative control of the test above."""

    def turned(states, rows):
        return [tuple(part.roll(1, 0) for part in state) for state in take_rows(states, rows)]

    monkeypatch.setattr(decoding, "take_rows", turned)
    assert wrong_answers(server, clients=8)
