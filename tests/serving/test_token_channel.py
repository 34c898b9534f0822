"""The token channel: frames that are lost, reordered, doubled, forged; the tail from the result."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from core.errors import (
    AdapterUnavailableError,
    CoreError,
    EngineOverloadedError,
    InvalidRequestError,
    PromptTooLongError,
)
from core.requests import (
    FinishReason,
    GenerationRequest,
    RequestOutput,
    RequestTimings,
    SamplingParams,
    TokenLogprobs,
)
from serving.cluster.engine_wire import (
    GenerateCall,
    GenerateResult,
    ReplyAddress,
    SequencedOutput,
    decode_call,
    decode_result,
    encode,
    from_wire,
    join_outputs,
    to_wire,
)
from serving.cluster.request_stream import OutputAssembler
from serving.cluster.token_channel import TokenReceiver, TokenSender
from serving.engine_client import EngineDiedError


def outputs_of(steps: list[list[int]], request_id: str = "r") -> list[RequestOutput]:
    """One output per step; the first has prompt logprobs, the last a finish reason."""
    outputs = [
        RequestOutput(
            request_id,
            tuple(tokens),
            logprobs=tuple(TokenLogprobs(t, -0.5 * t, 1, {t: -0.5 * t}) for t in tokens),
        )
        for tokens in steps
    ]
    outputs[0] = replace(outputs[0], prompt_logprobs=(None, TokenLogprobs(7, -1.0, 2, {})))
    outputs[-1] = replace(outputs[-1], finish_reason=FinishReason.STOP)
    return outputs


def test_a_request_crosses_the_wire_unchanged() -> None:
    sampling = SamplingParams(
        temperature=0.5, seed=3, logit_bias={5: -1.5}, stop_token_ids=frozenset({1, 2})
    )
    request = GenerationRequest("id", (1, 2, 3), sampling, adapter_digest="ab" * 32)
    call = GenerateCall(request, ReplyAddress("tcp://127.0.0.1:1", "secret"))
    assert decode_call(encode(call)) == call


def test_an_outcome_crosses_the_wire_unchanged() -> None:
    output = replace(join_outputs(outputs_of([[1], [2, 3]])), timings=RequestTimings(1.0, 2.0))
    result = GenerateResult("engine", output)
    assert decode_result(encode(result)) == result


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("top_p is 2", param="top_p"),
        PromptTooLongError("too long", param="prompt"),
        EngineOverloadedError("full", retry_after_seconds=2.5),
        AdapterUnavailableError("blob is gone"),
        EngineDiedError("dead"),
    ],
)
def test_errors_cross_the_wire_as_themselves(error: CoreError) -> None:
    result = decode_result(encode(GenerateResult("engine", error=to_wire(error))))
    assert result.error is not None
    raised = from_wire(result.error)
    assert type(raised) is type(error)
    assert str(raised) == str(error)
    assert vars(raised) == vars(error)


@given(
    steps=st.lists(st.lists(st.integers(0, 99), max_size=3), min_size=1, max_size=12),
    data=st.data(),
)
def test_whatever_is_lost_doubled_or_reordered_comes_exactly_once_in_order(
    steps: list[list[int]], data: st.DataObject
) -> None:
    outputs = outputs_of(steps)
    sequenced = [SequencedOutput(index, output) for index, output in enumerate(outputs)]
    arriving = data.draw(
        st.permutations(sequenced + data.draw(st.lists(st.sampled_from(sequenced))))
    )
    arriving = arriving[: data.draw(st.integers(0, len(arriving)))]
    result_at = data.draw(st.integers(0, len(arriving)))
    assembler = OutputAssembler()
    seen: list[RequestOutput] = []
    for number, item in enumerate([*arriving, None]):
        if number == result_at:
            seen += assembler.take_result(GenerateResult("e", join_outputs(outputs)))
        if item is not None:
            seen += assembler.take_message("e", item)
    assert assembler.finished
    assert join_outputs(seen) == join_outputs(outputs)
    assert [output.finish_reason for output in seen].count(FinishReason.STOP) == 1
    assert seen[-1].finish_reason is FinishReason.STOP
    assert sum(output.prompt_logprobs is not None for output in seen) == 1


def test_a_second_engine_may_begin_a_request_but_never_continue_one() -> None:
    first, second, last = (
        SequencedOutput(index, output) for index, output in enumerate(outputs_of([[1], [2], [3]]))
    )
    untouched = OutputAssembler()
    assert untouched.take_message("a", second) == []
    assert untouched.take_message("b", first) == [first.output]
    assert untouched.take_message("b", second) == [second.output]
    begun = OutputAssembler()
    begun.take_message("a", first)
    with pytest.raises(EngineDiedError, match="lost"):
        begun.take_message("b", last)
    with pytest.raises(EngineDiedError, match="lost"):
        begun.take_result(GenerateResult("b", join_outputs(outputs_of([[9], [9]]))))


class Channel:
    """A sender and a receiver on loopback, with the receiver's task running."""

    async def __aenter__(self) -> Channel:
        self.receiver = TokenReceiver("127.0.0.1")
        self.sender = TokenSender("engine")
        self._task = asyncio.create_task(self.receiver.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.sender.shutdown()
        self.receiver.shutdown()


async def test_steps_of_many_requests_arrive_over_the_socket() -> None:
    async with Channel() as channel:
        names = [f"request-{number}" for number in range(20)]
        streams = {name: channel.receiver.open(name) for name in names}
        outputs = {
            name: outputs_of([[n, n + 1], [], [n + 2]], name) for n, name in enumerate(names)
        }
        for name in names:
            channel.sender.open(name, channel.receiver.address)
        for step in range(3):
            channel.sender.send([outputs[name][step] for name in names])
        for name in names:
            got = [await asyncio.wait_for(streams[name].next(), 5) for _ in range(3)]
            assert got == outputs[name]
        assert channel.sender.num_dropped_messages == 0


async def test_a_message_without_the_secret_is_refused() -> None:
    async with Channel() as channel:
        stream = channel.receiver.open("r")
        forged = ReplyAddress(channel.receiver.address.endpoint, "guess")
        channel.sender.open("r", forged)
        channel.sender.send(outputs_of([[6, 6, 6]]))
        channel.sender._socket(forged.endpoint).send(b"\x93no msgpack of ours")
        channel.sender.open("r", channel.receiver.address)
        honest = outputs_of([[1]])
        channel.sender.send(honest)
        assert await asyncio.wait_for(stream.next(), 5) == honest[0]
        assert channel.receiver.num_refused_messages == 2


async def test_a_dead_ingress_blocks_nobody_and_the_result_makes_good() -> None:
    async with Channel() as channel:
        channel.sender.open("gone", ReplyAddress("tcp://127.0.0.1:9", "s"))
        output = RequestOutput("gone", (1,))
        for _ in range(1500):  # more than the socket keeps
            channel.sender.send([output])
        assert channel.sender.num_dropped_messages > 0
        stream = channel.receiver.open("r")
        whole = join_outputs(outputs_of([[1], [2]]))
        stream.push_result(GenerateResult("engine", whole))
        assert await asyncio.wait_for(stream.next(), 5) == whole


async def test_a_failure_reaches_the_reader_after_what_came_before() -> None:
    async with Channel() as channel:
        stream = channel.receiver.open("r")
        first, last = outputs_of([[1], [2]])
        stream.push_message("engine", SequencedOutput(0, first))
        stream.fail(EngineDiedError("gone"))
        stream.push_message("engine", SequencedOutput(1, last))
        assert await stream.next() == first
        with pytest.raises(EngineDiedError, match="gone"):
            await stream.next()


async def test_sockets_to_many_restarted_ingresses_stay_bounded() -> None:
    async with Channel() as channel:
        for port in range(20000, 20200):
            channel.sender.open("r", ReplyAddress(f"tcp://127.0.0.1:{port}", "s"))
            channel.sender.send([RequestOutput("r", (1,))])
        assert len(channel.sender._sockets) <= 64
        stream = channel.receiver.open("r")
        channel.sender.open("r", channel.receiver.address)
        channel.sender.send([RequestOutput("r", (5,))])
        assert (await asyncio.wait_for(stream.next(), 5)).token_ids == (5,)


async def test_the_receiver_listens_on_its_own_address_only() -> None:
    async with Channel() as channel:
        assert channel.receiver.address.endpoint.startswith("tcp://127.0.0.1:")
        with (
            zmq.Context() as context,
            context.socket(zmq.PULL) as other,
            pytest.raises(zmq.ZMQError),
        ):
            other.bind(channel.receiver.address.endpoint)
