"""A torchrun job whose rank 0 is the test's own process: the other ranks are processes with torchrun's variables."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace

from spdbench.pipeline.ranks import remote
from spdbench.pipeline.ranks.job import Job

JOIN_S = 120.0  # a limit against hanging, not an expectation


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def job_of(rank: int, world_size: int, port: int) -> Job:
    """A rank of a job on one node, whose rank 0 holds the store."""
    return Job(rank, rank, world_size, 0, "127.0.0.1", port, False, world_size, "test/0")


def variables(job: Job) -> dict[str, str]:
    """What torchrun sets for a rank."""
    return {
        "RANK": str(job.rank),
        "LOCAL_RANK": str(job.local_rank),
        "WORLD_SIZE": str(job.world_size),
        "LOCAL_WORLD_SIZE": str(job.num_local),
        "GROUP_RANK": str(job.node),
        "MASTER_ADDR": job.address,
        "MASTER_PORT": str(job.port),
        "TORCHELASTIC_RUN_ID": job.run_id.partition("/")[0],
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


class RankGroup:
    """Rank 0 here, and `num_hosts` others on this machine, of which rank 0 takes the last ones to be on node 1."""

    def __init__(self, num_hosts: int, num_on_node_1: int = 0) -> None:
        port, world = free_port(), num_hosts + 1
        self.hosts = [
            subprocess.Popen(
                [sys.executable, "-m", "spdbench"],
                env={
                    **os.environ,
                    **variables(replace(job_of(rank, world, port), node=int(rank > num_hosts - num_on_node_1))),
                },
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(1, world)
        ]
        try:
            self.ranks = remote.join(job_of(0, world, port), JOIN_S)
        except BaseException:
            self.kill()
            raise
        remote.set_joined(self.ranks)

    def end(self, code: int = 0) -> list[tuple[int, str]]:
        """Rank 0's end; the other ranks' exit codes, and what they printed."""
        remote.set_joined(None)
        self.ranks.close(code)
        try:
            return [(host.wait(JOIN_S), host.communicate()[1]) for host in self.hosts]
        finally:
            self.kill()

    def kill(self) -> None:
        for host in self.hosts:
            host.kill()
            host.wait()
            assert host.stderr is not None
            host.stderr.close()
