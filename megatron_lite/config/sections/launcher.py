"""Keys of the launcher: which machines run what."""

from __future__ import annotations

from typing import Literal

from megatron_lite.config.fields import Bool, Int, Port, Positive, Section, Text


class LauncherSection(Section):
    """Where the ranks run, and what starts them."""

    hostfile: Text | None = None
    """File of `host slots=N` lines."""
    include: Text | None = None
    """Hosts and slots to use: `host1@host2:0,2`."""
    exclude: Text | None = None
    """Hosts and slots to leave out."""
    num_nodes: Int = -1
    """Hosts to use; -1: all."""
    num_gpus: Positive | None = None
    """Ranks a host. None: one for each accelerator, or one on a machine without."""
    master_port: Port | None = None
    """Port of the ranks' meeting. None: a free one on one machine, 29500 on several."""
    master_addr: Text | None = None
    """Address of the first host. None: found out."""
    launcher: Literal["pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm"] = "pdsh"
    """What starts the ranks of other hosts; pdsh: ssh."""
    launcher_args: Text | None = None
    """Further arguments of that launcher, in one string."""
    force_multi: Bool = False
    """Use the launcher even for one host."""
    no_ssh_check: Bool = False
    """Do not ask the first host for its address by ssh."""
    comment: Text | None = None
    """SLURM's `--comment`."""
    account: Text | None = None
    """SLURM's `--account`."""
