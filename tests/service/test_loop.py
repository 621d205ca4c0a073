"""The server's event loop calls those who read sockets once for all that has come in, and takes nothing they need."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from logprobs_server.loop import Bell, EventLoop


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends that are connected, neither of which blocks."""
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        yield reader, writer


def turns(watched: Any, callback: Callable[..., Any], *args: Any) -> None:
    """Lets a loop with one reader run for some turns."""

    async def watch() -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(watched, callback, *args)
        for _ in range(10):
            await asyncio.sleep(0)
        loop.remove_reader(watched)

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(watch())


def test_many_bytes_are_one_call_which_finds_the_last(pair: tuple[socket.socket, socket.socket]) -> None:
    reader, writer = pair
    found: list[tuple[str, bytes]] = []
    writer.send(b"12345")
    turns(reader, lambda name: found.append((name, reader.recv(1))), "given")
    assert found == [("given", b"5")]


def test_a_byte_that_comes_in_later_is_another_call(pair: tuple[socket.socket, socket.socket]) -> None:
    reader, writer = pair
    found: list[bytes] = []

    def read() -> None:
        found.append(reader.recv(1))
        if len(found) < 3:
            writer.send(b"ab")

    writer.send(b"1")
    turns(reader, read)
    assert found == [b"1", b"b", b"b"]


def test_the_end_of_a_stream_is_a_call(pair: tuple[socket.socket, socket.socket]) -> None:
    reader, writer = pair
    found: list[bytes] = []
    writer.close()
    turns(reader, lambda: found.append(reader.recv(1)))
    assert set(found) == {b""}


def test_what_is_no_socket_keeps_all_its_bytes() -> None:
    source, sink = os.pipe()
    found: list[bytes] = []
    os.write(sink, b"123")
    turns(source, lambda: found.append(os.read(source, 1)))
    os.close(source)
    os.close(sink)
    assert found == [b"1", b"2", b"3"]


async def test_a_bell_rung_on_another_thread_is_answered_on_the_loops_and_no_more_once_closed() -> None:
    threads: list[threading.Thread] = []
    bell = Bell(lambda: threads.append(threading.current_thread()))
    await asyncio.to_thread(lambda: [bell.ring() for _ in range(100_000)])
    await asyncio.sleep(0.01)
    assert set(threads) == {threading.current_thread()}
    answered = len(threads)
    await asyncio.to_thread(bell.ring)
    await asyncio.sleep(0.01)
    assert len(threads) == answered + 1
    await asyncio.to_thread(bell.ring)
    bell.close()
    await asyncio.sleep(0.01)
    assert len(threads) in (answered + 1, answered + 2)
