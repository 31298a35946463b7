"""The starter of one machine's ranks, with real processes that do next to nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import free_port

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = """
import os, sys
from megatron_lite.launcher.local import start_ranks
from megatron_lite.utils.errors import command_line
from megatron_lite.utils.log import setup_logging
setup_logging()
port = int(sys.argv[3]) if sys.argv[3:] else None
sys.exit(command_line(start_ranks)([sys.executable, "-c", sys.argv[1]], int(sys.argv[2]), os.environ, port))
"""
PATIENT = "from megatron_lite.launcher import local; local.GRACE_SECONDS = local.PAUSE_SECONDS = 100.0"
"""A launcher that waits for ranks which start, or end, much later than others."""

PRELUDE = """
import os, signal, sys, time
rank = int(os.environ['RANK'])
def say(*words):  # in one write, so that the lines of two ranks do not mix
    os.write(1, (' '.join(map(str, words)) + '\\n').encode())
def wait_for(*ranks):  # until the messages of other ranks are there, or what they leave in their stead
    while not all(os.path.exists(os.environ['MEGATRON_LITE_ERRORS'] + f'/{rank}') for rank in ranks):
        time.sleep(0.01)
"""
SAVES_WHEN_ASKED = """
asked = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(number))
say('ready')
while not asked:
    time.sleep(0.01)
time.sleep(0.3)
say('saved', len(asked))
"""
IGNORES_SIGNALS = """
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
say('ready', os.getpid())
open(os.environ['MEGATRON_LITE_ERRORS'] + f'/{rank}', 'w')
time.sleep(600)
"""
FAILS = """
from megatron_lite.utils.errors import DataError, LostRankError, command_line
def fail(error):
    def main():
        raise error
    sys.exit(command_line(main)())
"""


def launch(script: str, ranks: int, *port: int, before: str = "") -> subprocess.Popen[str]:
    """``script`` in so many ranks; the launcher's process runs ``before`` first."""
    command = [sys.executable, "-c", before + LAUNCH, PRELUDE + script, str(ranks), *map(str, port)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str, str]:
    """Its exit status and what it still says: long before ranks that sleep would end by themselves."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_until_ready(process: subprocess.Popen[str], ranks: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline() for _ in range(ranks)]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_each_rank_knows_its_place() -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"]
    status, out, _ = finish(launch(f"say(*(os.environ[name] for name in {names}))", 3))
    assert status == 0
    assert sorted(out.splitlines()) == [f"{rank} {rank} 3 3 127.0.0.1" for rank in range(3)]


def test_the_meeting_port_is_one_and_can_be_listened_on() -> None:
    script = """
import socket
port = int(os.environ['MASTER_PORT'])
say(port)
if rank == 0:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(('', port))
    listener.listen()
    listener.accept()
else:
    for _ in range(6000):
        try:
            socket.create_connection(('127.0.0.1', port)).close()
            break
        except OSError:
            time.sleep(0.01)
"""
    status, out, _ = finish(launch(script, 2))
    assert status == 0
    assert len(set(out.split())) == 1


def test_a_dying_rank_is_named_and_takes_the_others_down() -> None:
    process = launch("sys.exit(7) if rank == 1 else time.sleep(600)", 3)
    status, _, err = finish(process)
    assert status == 7
    assert "rank 1 ended with exit status 7" in err


def test_a_rank_killed_by_a_signal() -> None:
    status, _, err = finish(
        launch("os.kill(os.getpid(), signal.SIGSEGV) if rank == 0 else time.sleep(600)", 2)
    )
    assert status == 128 + signal.SIGSEGV
    assert "rank 0 was ended by SIGSEGV" in err


def test_deaf_ranks_are_killed_after_the_grace() -> None:
    process = launch(f"if rank == 0:\n wait_for(1)\n sys.exit(3)\n{IGNORES_SIGNALS}", 2)
    (line,) = wait_until_ready(process, 1)
    status, _, _ = finish(process)
    assert status == 3
    assert not is_alive(int(line.split()[1]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_rank_once_and_a_saved_run_ends_well(number: signal.Signals) -> None:
    process = launch(SAVES_WHEN_ASKED, 2)
    wait_until_ready(process, 2)
    process.send_signal(number)
    status, out, err = finish(process)
    assert status == 0, err
    assert out.splitlines() == ["saved 1", "saved 1"]
    assert number.name in err


def test_ctrl_c_on_a_terminal_reaches_the_ranks_once() -> None:
    """A terminal sends SIGINT to its whole foreground group; the ranks are not in it."""
    command = [sys.executable, "-c", LAUNCH, PRELUDE + SAVES_WHEN_ASKED, "2"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until_ready(process, 2)
    os.killpg(process.pid, signal.SIGINT)
    status, out, _ = finish(process)
    assert status == 0
    assert out.splitlines() == ["saved 1", "saved 1"]


def test_a_second_signal_kills() -> None:
    process = launch(IGNORES_SIGNALS, 2)
    pids = [int(line.split()[1]) for line in wait_until_ready(process, 2)]
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    assert "SIGTERM" in process.stderr.readline()  # it has been received
    process.send_signal(signal.SIGTERM)
    status, _, _ = finish(process)
    assert status == 128 + signal.SIGKILL
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.parametrize("signals", [1, 2])
def test_signals_while_ranks_are_started_reach_those_to_come(signals: int) -> None:
    hasty = f"""
import os, signal, subprocess
class Popen(subprocess.Popen):
    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        if options['env']['RANK'] == '0':
            for _ in range({signals}):
                os.kill(os.getpid(), signal.SIGTERM)
subprocess.Popen = Popen
"""
    status, out, err = finish(launch("time.sleep(600)", 2, before=hasty))
    assert status == 128 + (signal.SIGTERM if signals == 1 else signal.SIGKILL), err
    assert out == ""


def test_a_signal_while_ranks_are_waited_for() -> None:
    """From the second on nothing is left to do; waiting in a handler would be for ever (Popen's lock)."""
    impatient = """
import os, signal
wait = os.waitpid
def interrupted_wait(pid, options):
    if options == 0:  # one that blocks
        os.kill(os.getpid(), signal.SIGINT)
    return wait(pid, options)
os.waitpid = interrupted_wait
"""
    process = launch(IGNORES_SIGNALS, 1, before=impatient)
    wait_until_ready(process, 1)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert "SIGINT" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    status, _, _ = finish(process)
    assert status == 128 + signal.SIGKILL


def test_what_a_killed_rank_started_dies_with_it() -> None:
    script = f"""
import subprocess
if rank == 0:
    wait_for(1)
    sys.exit(5)
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
say('child', child.pid)
{IGNORES_SIGNALS}"""
    process = launch(script, 2)
    lines = wait_until_ready(process, 2)
    assert finish(process)[0] == 5
    deadline = time.monotonic() + 60
    pids = [int(line.split()[1]) for line in lines]
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)  # an orphan's end is collected by the system, some time
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells processes of their parent's death")
def test_ranks_do_not_outlive_a_killed_launcher() -> None:
    process = launch(SAVES_WHEN_ASKED + "say('pid', os.getpid())", 1)
    wait_until_ready(process, 1)
    process.kill()
    out, _ = process.communicate(timeout=300)  # ends when the rank has closed its end of the pipe
    assert "saved 1" in out


def test_a_port_is_not_given_twice() -> None:
    """While ranks run, the system hands their port to nobody who asks for a free one."""
    process = launch("say(os.environ['MASTER_PORT']); sys.stdin.read()", 1)
    (line,) = wait_until_ready(process, 1)
    sockets = [socket.socket() for _ in range(200)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    taken = {each.getsockname()[1] for each in sockets}
    for each in sockets:
        each.close()
    assert int(line) not in taken
    assert finish(process)[0] == 0


def test_the_port_that_is_asked_for_is_taken_or_refused() -> None:
    port = free_port()
    status, out, _ = finish(launch("say(os.environ['MASTER_PORT'])", 2, port))
    assert (status, out.split()) == (0, [str(port)] * 2)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, out, err = finish(launch("say('started')", 2, port))
    assert (status, out) == (2, "")
    assert f"error: master_port {port}: " in err


def errors_of(text: str) -> list[str]:
    return sorted(line for line in text.splitlines() if line.startswith("error: "))


def test_what_all_ranks_have_to_say_is_said_once() -> None:
    script = FAILS + "fail(DataError('the same for all'))"
    status, _, err = finish(launch(script, 3))
    assert status == 2
    assert errors_of(err) == ["error: the same for all"]
    assert "ended with exit status 2" in err


def test_what_one_rank_has_to_say_is_said_with_its_rank() -> None:
    status, _, err = finish(
        launch(FAILS + "fail(DataError('only here')) if rank == 2 else time.sleep(600)", 3)
    )
    assert status == 2
    assert errors_of(err) == ["error: only here"]
    assert "rank 2 ended with exit status 2" in err


def test_different_messages_are_all_shown() -> None:
    script = "wait_for(1) if rank == 0 else None\nfail(DataError(f'of rank {rank}'))"
    status, _, err = finish(launch(FAILS + script, 2, before=PATIENT))
    assert status == 2
    first, second = errors_of(err)
    assert {first, second} in (
        {"error: of rank 0", "error: [rank 1] of rank 1"},
        {"error: [rank 0] of rank 0", "error: of rank 1"},
    )


def test_the_rank_that_was_killed_is_named_and_not_those_that_lost_it() -> None:
    """Here its end is seen last, as when the kernel takes its time to free the memory of a large process."""
    script = """
if rank != 1:
    fail(LostRankError('the connection is lost'))
wait_for(0, 2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    status, _, err = finish(launch(FAILS + script, 3, before=PATIENT))
    assert status == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL" in err
    assert errors_of(err) == []


def test_a_lost_connection_is_told_when_nobody_here_is_at_fault() -> None:
    status, _, err = finish(launch(FAILS + "fail(LostRankError('the connection is lost'))", 2))
    assert status == 104
    assert errors_of(err) == ["error: the connection is lost"]


def test_without_our_launcher_the_others_let_rank_0_speak_first() -> None:
    script = """
import sys
from megatron_lite.utils import errors
errors.time.sleep = lambda seconds: print("waits", seconds, file=sys.stderr)
@errors.command_line
def main():
    raise errors.DataError("wrong")
sys.exit(main())
"""
    for rank, expected in ((0, "error: wrong\n"), (3, "waits 5.0\nerror: [rank 3] wrong\n")):
        environment = {**os.environ, "RANK": str(rank)}
        run = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert (run.returncode, run.stderr) == (2, expected)
