import asyncio
import time
from itertools import islice

import pytest
from completions_server import STEP_SECONDS, CompletionsServer

from loadtest.client import ClientOptions, CompletionsClient
from loadtest.drivers import closed_loop, open_loop
from loadtest.errors import InvalidWorkloadError, ServerUnreachableError
from loadtest.live import LiveCounts
from loadtest.records import RequestRecord
from loadtest.run import RunSettings, Stopwatch
from loadtest.sse import EventParser
from loadtest.workload import PlannedRequest


async def ask(server: CompletionsServer, model: str, **options: object) -> RequestRecord:
    settings = ClientOptions(server.url, **options)
    async with CompletionsClient(settings, Stopwatch(), LiveCounts()) as client:
        return await client.complete(PlannedRequest(0, model, "some text here", 12))


async def test_a_stream_is_followed_token_by_token(completions_server: CompletionsServer) -> None:
    record = await ask(completions_server, "base", api_key="secret")
    assert record.error is None
    assert record.token_ids == list(range(12))
    assert record.num_tokens == 12
    assert record.prompt_tokens == 3
    assert record.sent < record.ttft + record.due < record.chunk_times[-1] <= record.finished
    assert record.chunk_times[-1] - record.chunk_times[0] >= 10 * STEP_SECONDS
    assert completions_server.keys == ["Bearer secret"]
    body = completions_server.bodies[0]
    assert body["ignore_eos"] and body["return_token_ids"] and body["temperature"] == 0


async def test_extensions_can_be_left_out(completions_server: CompletionsServer) -> None:
    await ask(completions_server, "base", ignore_eos=False, token_ids=False)
    assert not {"ignore_eos", "return_token_ids"} & set(completions_server.bodies[0])


async def test_chunks_of_several_tokens(completions_server: CompletionsServer) -> None:
    record = await ask(completions_server, "chunky")
    assert record.chunk_tokens == [4, 4, 4]
    assert len(record.token_gaps()) == 8


async def test_tokens_are_apportioned_without_ids(completions_server: CompletionsServer) -> None:
    record = await ask(completions_server, "texts-only")
    assert record.error is None
    assert record.estimated
    assert record.num_tokens == 5
    assert record.chunk_tokens[1] == max(record.chunk_tokens)


async def test_without_streaming(completions_server: CompletionsServer) -> None:
    record = await ask(completions_server, "base", stream=False)
    assert (record.error, record.num_tokens, len(record.chunk_times)) == (None, 12, 1)


@pytest.mark.parametrize(
    ("model", "kind", "detail"),
    [
        ("no-such-model", "http_404", "no such model"),
        ("busy", "http_429", "full"),
        ("error-event", "stream_error", "engine died"),
        ("cut", "disconnect", ""),
        ("no-done", "disconnect", "without its last event"),
        ("silent", "no_tokens", "without a token"),
        ("garbage", "malformed", ""),
        ("slow", "timeout", "0.4 s"),
    ],
)
async def test_every_failure_has_its_kind(
    completions_server: CompletionsServer, model: str, kind: str, detail: str
) -> None:
    record = await ask(completions_server, model, timeout_seconds=0.4)
    assert record.error == kind
    assert detail in record.detail
    assert record.finished > record.sent
    assert record.retry_after == (0.2 if model == "busy" else None)


async def test_no_server_is_a_failure_of_its_own() -> None:
    nowhere = CompletionsServer(url="http://127.0.0.1:9")
    assert (await ask(nowhere, "base")).error == "connect"
    async with CompletionsClient(ClientOptions(nowhere.url), Stopwatch(), LiveCounts()) as client:
        with pytest.raises(ServerUnreachableError, match=r"127\.0\.0\.1:9"):
            await client.models()


async def test_live_counts_come_back_to_zero_in_flight(
    completions_server: CompletionsServer,
) -> None:
    live = LiveCounts()
    async with CompletionsClient(
        ClientOptions(completions_server.url), Stopwatch(), live
    ) as client:
        models = ["base", "cut", "busy", "texts-only"]
        await asyncio.gather(
            *(client.complete(PlannedRequest(0, model, "text", 3)) for model in models)
        )
    assert (live.in_flight, live.finished, live.failed) == (0, 4, 2)
    assert live.tokens == 3 + 1 + 5


def planned(num: int, gap_seconds: float | None = None) -> list[PlannedRequest]:
    return [
        PlannedRequest(n, "base", "x", 1, None if gap_seconds is None else n * gap_seconds)
        for n in range(num)
    ]


class SlowSender:
    """Takes `seconds` per request and counts how many run at once."""

    def __init__(self, clock: Stopwatch, seconds: float, error: str | None = None) -> None:
        self.clock, self.seconds, self.error = clock, seconds, error
        self.running = self.most = 0

    async def __call__(self, request: PlannedRequest) -> RequestRecord:
        sent = self.clock()
        due = sent if request.due is None else request.due
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.seconds)
        self.running -= 1
        return RequestRecord(
            request.index, "base", due, sent, finished=self.clock(), error=self.error
        )


async def test_closed_loop_keeps_its_clients_busy_and_no_more() -> None:
    send = SlowSender(Stopwatch(), 0.01)
    records = await closed_loop(send, planned(40), 4, lambda: False)
    assert sorted(record.index for record in records) == list(range(40))
    assert send.most == 4


async def test_closed_loop_ends_by_the_clock() -> None:
    clock = Stopwatch()
    records = await closed_loop(SlowSender(clock, 0.02), planned(10_000), 2, lambda: clock() >= 0.2)
    assert 6 <= len(records) <= 22


async def test_a_refused_client_waits_before_it_asks_again() -> None:
    clock = Stopwatch()
    await closed_loop(SlowSender(clock, 0.0, "http_429"), planned(3), 1, lambda: False)
    assert clock() >= 0.3


async def test_open_loop_sends_on_time_however_slow_the_server_is() -> None:
    clock = Stopwatch()
    send = SlowSender(clock, 0.5)  # each takes longer than all arrivals together
    records = await open_loop(send, planned(20, 0.02), clock, 10.0)
    assert send.most == 20
    assert all(0 <= record.send_lag < 0.15 for record in records)
    assert clock() < 1.5


async def test_open_loop_counts_the_lag_of_a_late_client() -> None:
    clock = Stopwatch()

    async def blocking(request: PlannedRequest) -> RequestRecord:
        sent = clock()
        time.sleep(0.05)  # noqa: ASYNC251 - the client itself cannot keep up with a request each 0.01 s
        return RequestRecord(request.index, "base", request.due or 0.0, sent, finished=clock())

    records = await open_loop(blocking, planned(10, 0.01), clock, 10.0)
    last = records[-1]
    assert last.send_lag > 0.3
    assert last.e2e > last.send_lag


async def test_open_loop_stops_sending_at_its_end() -> None:
    clock = Stopwatch()
    records = await open_loop(SlowSender(clock, 0.01), planned(1000, 0.01), clock, 0.1)
    assert len(records) == 10


@pytest.mark.parametrize(
    "settings",
    [
        {"num_requests": 5},
        {"num_clients": 2, "rate": 1.0, "num_requests": 5},
        {"num_clients": 2},
        {"num_clients": 0, "num_requests": 5},
    ],
)
def test_settings_that_make_no_run_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidWorkloadError):
        RunSettings(**settings)


WIRE = b': ping\n\ndata: {"a": 1}\r\n\r\nevent: error\ndata: {"b":\ndata: 2}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize("size", range(1, 24))
def test_events_survive_any_cut_of_the_bytes(size: int) -> None:
    parser, events = EventParser(), []
    for start in range(0, len(WIRE), size):
        events += parser.feed(WIRE[start : start + size])
    assert events == [b'{"a": 1}', b'{"b":\n2}', b"[DONE]"]
    assert not parser.pending
    assert list(islice(parser.feed(b"data: x"), 1)) == []
    assert parser.pending
