"""On which hosts a run happens, and with how many ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_lite.config.keys import has_effect, typed_value
from megatron_lite.config.merge import merge
from megatron_lite.config.reader import read_file, read_override
from megatron_lite.config.sections.launcher import LauncherSection
from megatron_lite.launcher.pods import Pods, pods_from_environment, ranks_of_lone_pod
from megatron_lite.planner import Machine
from megatron_lite.utils.errors import ConfigError
from megatron_lite.utils.log import LOGGER

DEFAULT_HOSTFILE = Path("/job/hostfile")
"""Where DeepSpeed looks, unless the variable DLTS_HOSTFILE names another file."""

LOCALHOST = "localhost"


@dataclass(frozen=True)
class Resources:
    """The places of the ranks.

    Attributes:
        hosts: host → its slots (the indices of its accelerators), one rank each, in the order of the ranks.
        hostfile: the file that named the hosts; None when only this machine takes part.
        several: whether other hosts take part, which a launcher must reach.
        chosen: whether the slots were picked by name, so that the ranks must be shown these and no others.
        pods: the Kubernetes job whose pods the hosts are, each with a launcher of its own; None otherwise.
    """

    hosts: Mapping[str, Sequence[int]]
    hostfile: Path | None
    several: bool
    chosen: bool
    pods: Pods | None = None

    @property
    def ranks(self) -> int:
        """Ranks of the whole run."""
        return sum(len(slots) for slots in self.hosts.values())

    @property
    def first_host(self) -> str:
        """The host of rank 0, without the ``user@`` that ssh may need."""
        return next(iter(self.hosts)).rpartition("@")[2]

    @property
    def ranks_here(self) -> int:
        """Ranks of this machine (of the first host, where this is none of them)."""
        return len(next(iter(self.hosts.values())))


def launcher_keys(paths: Sequence[Path], overrides: Sequence[str]) -> LauncherSection:
    """The launcher's section of the configuration alone.

    It says how many ranks there will be, which the rest of the configuration is resolved with. Raises
    ConfigError as :func:`megatron_lite.config.load_config` does, and when a hostfile that was typed (``-H``,
    ``--set``) does not exist.
    """
    sources = [read_file(path) for path in paths] + [[read_override(word)] for word in overrides]
    known = [[entry for entry in source if has_effect(entry, [])] for source in sources]
    merged = merge(known, [])
    fields = LauncherSection.model_fields
    keys = LauncherSection(**{key: typed_value(entry) for key, entry in merged.items() if key in fields})
    is_typed = "hostfile" in merged and merged["hostfile"].origin == "--set"
    if is_typed and keys.hostfile is not None and not Path(keys.hostfile).is_file():
        raise _no_hostfile(keys.hostfile)
    return keys


def find_resources(keys: LauncherSection, machine: Machine) -> Resources:
    """Where the run of ``keys`` happens: the hosts of its hostfile, a job's pods, or this ``machine``.

    Raises ConfigError when the hostfile is missing or wrong, or asks for what is not there.
    """
    hostfile = _hostfile(keys)
    pods = pods_from_environment(os.environ) if hostfile is None else None
    if pods is not None:
        return _in_pods(pods, keys, machine)
    if hostfile is None:
        if keys.num_nodes > 1 or keys.force_multi:
            key = "force_multi" if keys.force_multi else f"num_nodes {keys.num_nodes}"
            raise ConfigError(f"{key} needs other hosts: name a hostfile (key hostfile, or -H)")
        if not (keys.include or keys.exclude):
            ranks = _local_ranks(keys.num_gpus or ranks_of_lone_pod(os.environ), machine)
            return Resources({LOCALHOST: range(ranks)}, None, several=False, chosen=False)
    hosts = _filtered_hosts(keys, hostfile, machine)
    if not hosts:
        raise ConfigError("no slots are left to run on: check include and exclude")
    several = len(hosts) > 1 or keys.force_multi
    return Resources(hosts, hostfile, several, chosen=bool(keys.include or keys.exclude))


def with_chosen_gpus(machine: Machine, resources: Resources) -> Machine:
    """``machine`` with those of its GPUs that its ranks of ``resources`` get, in their order.

    Raises ConfigError when a hostfile counts more slots than this machine has GPUs.
    """
    if resources.several or not machine.gpus:
        return machine
    host, slots = next(iter(resources.hosts.items()))
    if max(slots) >= len(machine.gpus):
        raise ConfigError(f"slot {max(slots)} of {host}: {len(machine.gpus)} GPUs are visible here, from 0")
    return replace(machine, gpus=tuple(machine.gpus[slot] for slot in slots))


def _hostfile(keys: LauncherSection) -> Path | None:
    """The hostfile, if there is one: of the key, else of DeepSpeed's own place.

    The key of a file on one machine may be left over from another (GPT-NeoX's examples name
    ``/mock_path``): as with DeepSpeed, the run is then on this machine, unless it cannot be meant.
    """
    if keys.hostfile is None:
        path = Path(os.environ.get("DLTS_HOSTFILE", DEFAULT_HOSTFILE))
        return path if path.is_file() else None
    path = Path(keys.hostfile)
    if path.is_file():
        return path
    if keys.num_nodes > 1 or keys.force_multi:
        raise _no_hostfile(keys.hostfile)
    LOGGER.warning("hostfile %s does not exist: the run is on this machine only", path)
    return None


def _no_hostfile(name: str) -> ConfigError:
    return ConfigError(f"hostfile {name} does not exist")


def _in_pods(pods: Pods, keys: LauncherSection, machine: Machine) -> Resources:
    """The same number of ranks in each of ``pods``: the key ``num_gpus``, else what the job says."""
    if keys.include or keys.exclude or keys.force_multi or keys.num_nodes not in (-1, pods.count):
        raise ConfigError(
            f"the environment describes a job of {pods.count} pods, all of which take part: "
            "leave out include, exclude, num_nodes and force_multi"
        )
    slots = range(_local_ranks(keys.num_gpus or pods.ranks_each, machine))
    hosts = {f"pod {index}": slots for index in range(pods.count)}
    return Resources(hosts, None, several=False, chosen=False, pods=pods)


def _local_ranks(wanted: int | None, machine: Machine) -> int:
    """The number that is ``wanted``, if any is, else the number of GPUs, else 1."""
    if machine.gpus and wanted is not None and wanted > len(machine.gpus):
        raise ConfigError(
            f"{wanted} ranks are to run here (num_gpus, or the job's variables), "
            f"but {len(machine.gpus)} GPUs are visible"
        )
    return wanted or len(machine.gpus) or 1


def _filtered_hosts(
    keys: LauncherSection, hostfile: Path | None, machine: Machine
) -> Mapping[str, Sequence[int]]:
    """The hosts after include, exclude, num_nodes and num_gpus, by DeepSpeed's own rules.

    Imports DeepSpeed, 3 s, which a run without hostfile, include and exclude does not pay.
    """
    from deepspeed.launcher import runner

    filters = bool(keys.include or keys.exclude)
    if filters and (keys.num_nodes > 0 or (hostfile and keys.num_gpus)):
        raise ConfigError(
            "include and exclude already say which slots to use: leave out num_nodes and num_gpus"
        )
    try:
        pool = (
            runner.fetch_hostfile(str(hostfile))
            if hostfile
            else {LOCALHOST: _local_ranks(keys.num_gpus, machine)}
        )
        hosts = runner.parse_inclusion_exclusion(pool, keys.include or "", keys.exclude or "")
    except ValueError as error:
        raise ConfigError(f"{hostfile or 'this machine'}: {error}") from error
    if filters:
        return hosts
    if keys.num_nodes > len(hosts):  # DeepSpeed would take fewer hosts, but more slots than a host has
        raise ConfigError(f"num_nodes is {keys.num_nodes}, but {hostfile} names {len(hosts)} hosts")
    hosts = runner.apply_num_nodes_and_gpus(hosts, keys.num_nodes, keys.num_gpus or 0)
    for host, slots in hosts.items():
        if len(slots) > pool[host]:
            raise ConfigError(f"num_gpus is {len(slots)}, but {hostfile} gives {host} slots={pool[host]}")
    return hosts
