"""The hosts of a run over ssh: what a host is told, and how a run ends that a host does not let end."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.config.sections.launcher import LauncherSection
from megatron_lite.launcher import host, ssh
from megatron_lite.launcher.host import HostOrder
from megatron_lite.launcher.resources import Resources
from megatron_lite.planner import Gpu, Machine
from megatron_lite.utils.errors import ConfigError

ORDER = HostOrder("alpha", ["true"], {}, [0], False, 0, 1, "10.1.2.3", 29500)


def hosts(**programs: str) -> ssh._Hosts:
    """Hosts for each of which bash runs a program instead of ssh, with its orders as standard input."""
    group = ssh._Hosts([], list(programs))
    for name, program in programs.items():
        group.processes[name] = subprocess.Popen(["bash", "-c", program], stdin=subprocess.PIPE)
    return group


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(ssh, "GRACE_SECONDS", 0.5)


def test_a_host_that_never_ends_does_not_keep_the_run() -> None:
    group = hosts(failed="exit 3", frozen="exec sleep 600")
    began = time.monotonic()
    assert group.wait() == 3
    group.close()
    assert time.monotonic() - began < 100


def test_two_signals_end_a_run_whose_host_never_ends() -> None:
    group = hosts(frozen="exec sleep 600")
    group.receive(signal.SIGTERM, None)
    group.receive(signal.SIGTERM, None)
    began = time.monotonic()
    assert group.wait() == 128 + signal.SIGKILL
    group.close()
    assert time.monotonic() - began < 100


def test_a_launcher_that_fails_waits_for_no_host_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "BROKEN_SECONDS", 0.1)
    group = hosts(frozen="exec sleep 600")
    group.close()
    group.receive(signal.SIGTERM, None)  # too late, and no error
    assert group.processes["frozen"].returncode == -signal.SIGKILL


def test_a_launcher_that_fails_lets_all_hosts_save_at_the_same_time(tmp_path: Path) -> None:
    """The first host ends after the second."""
    saved = tmp_path / "saved"
    group = hosts(first=f"until [ -e {saved} ]; do sleep 0.05; done", second=f"cat; touch {saved}")
    group.close()
    assert [process.returncode for process in group.processes.values()] == [0, 0]


@pytest.mark.parametrize(("status", "seconds", "saves"), [(ssh.SSH_FAILED, 3, True), (1, 100, False)])
def test_a_broken_connection_leaves_the_others_time_to_save(
    status: int, seconds: int, saves: bool, tmp_path: Path
) -> None:
    """The second order kills. After a failure there is one, while this host still saves."""
    slow = f"read first; read -t {seconds} second || touch {tmp_path}/saved"
    group = hosts(gone=f"exit {status}", slow=slow)
    assert group.wait() == status
    group.close()
    assert (tmp_path / "saved").exists() == saves


def test_a_signal_during_the_start_reaches_every_host_once(tmp_path: Path) -> None:
    told = f"{tmp_path}/$0"
    program = f"read order; read each; echo $each > {told}; ! read -t 1 more || echo $more >> {told}"
    group = ssh._Hosts(["bash", "-c", program], ["alpha", "beta"])
    group.start(ORDER)
    group.receive(signal.SIGTERM, None)
    group.start(dataclasses.replace(ORDER, name="beta"))
    assert group.wait() == 0
    group.close()
    assert [(tmp_path / name).read_text() for name in ("alpha", "beta")] == ["SIGTERM\n"] * 2


def test_the_users_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of pdsh's variable, too; a number of connections, pdsh's -f, would be ssh's background."""
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-i 'my key'")
    assert ssh._own_options(LauncherSection(launcher_args="-p 2222")) == ["-p", "2222", "-i", "my key"]
    with pytest.raises(ConfigError, match="leave out -f"):
        ssh._own_options(LauncherSection(launcher_args="-f 64"))


@pytest.mark.skipif(shutil.which("ssh") is None, reason="needs ssh")
def test_a_users_settings_give_the_orders_no_terminal(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("Host *\n RequestTTY force\n ForwardX11 yes\n ForwardAgent yes\n")
    words = ["ssh", "-G", "-F", str(tmp_path / "config"), *ssh.OPTIONS, "alpha"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
    assert {"requesttty false", "forwardx11 no", "forwardagent no", "connectionattempts 3"} <= set(shown)


def test_the_ranks_meet_at_a_host_not_at_its_user() -> None:
    assert Resources({"root@alpha": [0], "beta": [0]}, None, True, False).first_host == "alpha"


def test_slots_are_those_of_the_gpus_that_the_users_variables_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES of .deepspeed_env does not undo the choice of slots."""
    gpus = (Gpu("x", 1 << 34, 1 << 34),) * 2
    machine = Machine(cores=4, memory_total=1 << 34, memory_available=1 << 34, gpus=gpus)
    given: dict[str, Any] = {}
    monkeypatch.setattr(host, "usable", lambda _: machine)
    monkeypatch.setattr(host, "start_ranks", lambda *words, share: given.update(words[2]) or 0)
    for name in ("CUDA_VISIBLE_DEVICES", "FOO"):  # is set there: taken back afterwards
        monkeypatch.setenv(name, "0")
    variables = {"CUDA_VISIBLE_DEVICES": "6,7", "FOO": "1"}
    order = dataclasses.replace(ORDER, environment=variables, slots=[1], chosen=True)
    assert host._start(order) == 0
    assert (given["CUDA_VISIBLE_DEVICES"], given["FOO"]) == ("7", "1")
