"""Processes that encode tasks and write the tokens at their place in the output.

The parent hands out tasks in input order. A worker encodes a task, tells how many tokens it has, and goes on
with the next; as soon as all earlier tasks are counted, the parent tells it where its tokens belong, and it
writes them there. So tokens go from where they are made to their final file, once, and no process waits for a
slower one. Messages are small; text travels only if the parent had to read it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import numpy as np

from megatron_lite.data.preprocessing.encode import Encoded, Encoder
from megatron_lite.data.preprocessing.records import Bad
from megatron_lite.data.preprocessing.sources import Task
from megatron_lite.utils.errors import DataError

OBJECTS_BETWEEN_COLLECTIONS = 1_000_000
"""Objects a worker makes before Python looks for cycles among them: records have none, and looking every 700
objects, as Python does, takes a fifth of the time of parsing."""

TASKS_AHEAD = 4
"""Tasks a worker may have at once, waiting or encoded: it is never idle, and memory stays bounded."""


@dataclass(frozen=True)
class Counted:
    """What the parent is told of an encoded task.

    Attributes:
        number: the task's.
        tokens: key → tokens.
        documents: key → documents.
        smallest: key → smallest id (None without tokens).
        largest: key → largest id.
        text_bytes: key → UTF-8 bytes of text.
        records, lines, bad, bad_count, dropped: as in :class:`Encoded`.
    """

    number: int
    tokens: dict[str, int]
    documents: dict[str, int]
    smallest: dict[str, int | None]
    largest: dict[str, int | None]
    text_bytes: dict[str, int]
    records: int
    lines: int
    bad: list[Bad]
    bad_count: int
    dropped: int


@dataclass(frozen=True)
class Place:
    """Where a task's output belongs: key → (tokens before it, documents before it)."""

    number: int
    before: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Written:
    """A task's output is in its files."""

    number: int


@dataclass(frozen=True)
class Outputs:
    """Open files of one key: tokens, and lengths of documents (int32)."""

    tokens: int
    lengths: int


def count(number: int, encoded: Encoded) -> Counted:
    """The message about ``encoded``."""
    ids = encoded.tokens
    return Counted(
        number,
        {key: len(array) for key, array in ids.items()},
        {key: len(array) for key, array in encoded.lengths.items()},
        {key: int(array.min()) if len(array) else None for key, array in ids.items()},
        {key: int(array.max()) if len(array) else None for key, array in ids.items()},
        encoded.text_bytes,
        encoded.records,
        encoded.lines,
        encoded.bad,
        encoded.bad_count,
        encoded.dropped,
    )


def write_at(descriptor: int, array: np.ndarray, offset: int) -> None:
    """Write all of ``array`` at byte ``offset``."""
    view = array.view(np.uint8).data
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def work(pipe: Connection, encoder: Encoder, outputs: dict[str, Outputs]) -> None:
    """A worker's life: tasks and places in, counts and completions out, until the pipe closes."""
    waiting: dict[int, Encoded] = {}
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        if isinstance(message, Place):
            encoded = waiting.pop(message.number)
            for key, (tokens, documents) in message.before.items():
                write_at(outputs[key].tokens, encoded.tokens[key], tokens * encoder.dtype.itemsize)
                write_at(outputs[key].lengths, encoded.lengths[key], documents * 4)
            pipe.send(Written(message.number))
        else:
            number, task = message
            waiting[number] = encoder(task)
            pipe.send(count(number, waiting[number]))


class Worker:
    """The parent's end of one process; a thread sends, so that a large message does not hold up the rest."""

    def __init__(self, encoder: Encoder, outputs: dict[str, Outputs], close: list[int]) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.tasks = 0
        self.process = context.Process(
            target=run_worker, args=(theirs, encoder, outputs, [*close, self.pipe.fileno()]), daemon=True
        )
        self.process.start()
        theirs.close()
        self._outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, daemon=True)

    def start(self) -> None:
        """Begin to send. After all processes are forked: a thread does not survive a fork."""
        self._sender.start()

    def send(self, message: object) -> None:
        """Queue ``message``."""
        self._outbox.put(message)

    def _send(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self.pipe.send(message)
            except OSError:  # the process died: its end of the pipe tells the reader
                return

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._outbox.put(None)
        self.process.kill()
        self.process.join()
        if self._sender.ident is not None:
            self._sender.join()
        self.pipe.close()


def run_worker(pipe: Connection, encoder: Encoder, outputs: dict[str, Outputs], close: list[int]) -> None:
    """:func:`work` in a new process; an error goes to the parent as a message."""
    for descriptor in close:
        # The parent's ends of pipes, and the lock: they must close when the parent dies, not when we do.
        os.close(descriptor)
    gc.freeze()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    try:
        work(pipe, encoder, outputs)
    except KeyboardInterrupt:
        pass
    except BaseException as error:
        with suppress(OSError):
            pipe.send(error)


class Workers:
    """``count`` processes. Use as a context: they are gone when it ends."""

    def __init__(self, count: int, encoder: Encoder, outputs: dict[str, Outputs], close: list[int]) -> None:
        self._workers: list[Worker] = []
        for _ in range(count):
            others = [worker.pipe.fileno() for worker in self._workers]
            self._workers.append(Worker(encoder, outputs, close + others))
        for worker in self._workers:
            worker.start()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()

    def run(
        self, tasks: Iterator[Task], before: dict[str, tuple[int, int]]
    ) -> Iterator[tuple[Task, Counted]]:
        """Encode and write ``tasks``; yield each, in order, once it and all before it are in the files.

        Args:
            tasks: in input order.
            before: key → (tokens, documents) that the files hold already.

        Raises:
            DataError: a damaged input, or a worker that died.
        """
        open_tasks: dict[int, tuple[Task, Worker]] = {}
        counts: dict[int, Counted] = {}
        placed = done = number = 0
        written: set[int] = set()
        ended = False
        while True:
            while not ended and (worker := self._idle()) is not None:
                task = next(tasks, None)
                if task is None:
                    ended = True
                else:
                    worker.send((number, task))
                    open_tasks[number] = (without_payload(task), worker)
                    number += 1
                    worker.tasks += 1
            if ended and not open_tasks:
                return
            for message in self._messages():
                if isinstance(message, Counted):
                    counts[message.number] = message
                else:
                    written.add(message.number)
                    open_tasks[message.number][1].tasks -= 1
            while placed in counts:
                open_tasks[placed][1].send(Place(placed, before))
                before = {
                    key: (tokens + counts[placed].tokens[key], documents + counts[placed].documents[key])
                    for key, (tokens, documents) in before.items()
                }
                placed += 1
            while done in written:
                written.remove(done)
                yield open_tasks.pop(done)[0], counts.pop(done)
                done += 1

    def _idle(self) -> Worker | None:
        worker = min(self._workers, key=lambda worker: worker.tasks)
        return worker if worker.tasks < TASKS_AHEAD else None

    def _messages(self) -> Iterator[Counted | Written]:
        pipes = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(pipes)):
            assert isinstance(pipe, Connection)
            try:
                message = pipe.recv()
            except (EOFError, ConnectionError):
                raise DataError(
                    "a worker process died, most likely for want of memory: give fewer --workers and run the "
                    "command again, it continues"
                ) from None
            if isinstance(message, BaseException):
                raise message
            yield message


def without_payload(task: Task) -> Task:
    """``task`` without its text, which the worker has now."""
    return Task(task.source, task.chunk, task.kind, task.place, position=task.position)
