"""Bytes that a process sends in a backward pass under DistributedDataParallel, as its TCP sockets count them.

`sent` starts the processes; each runs `python -m bench.wire RANK PROCESSES ADDRESS PART ...`.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from rwn_ext.paper.networks import build

NET = "wrn-16-2"
# struct tcp_info of linux/tcp.h: tcpi_bytes_sent, since Linux 4.19.
TCP_INFO_SIZE, BYTES_SENT = 256, 200


def sent(processes: int, parts: Sequence[float]) -> dict[tuple[int, float], float]:
    """Bytes that each process sends in a step's backward, by number of processes (2 to `processes`) and learned part.

    With gloo, over this machine's loopback.
    """
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.wire"]
        arguments = [str(processes), f"{folder}/store", *map(str, parts)]
        running = [
            subprocess.Popen([*command, str(rank), *arguments], cwd=root, env=environment, stdout=subprocess.PIPE)
            for rank in range(processes)
        ]
        outputs = [process.communicate()[0] for process in running]
    failed = [process.returncode for process in running if process.returncode]
    if failed:
        raise RuntimeError(f"a process of bench.wire ended with exit code {failed[0]}, its words are above")
    found: dict[tuple[int, float], list[int]] = {}
    for output in outputs:
        for size, part, count in json.loads(output):
            found.setdefault((size, part), []).append(count)
    return {key: sum(counts) / len(counts) for key, counts in found.items()}


def bytes_sent() -> int:
    """By all TCP sockets of this process."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(link).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
        except OSError:
            continue  # closed meanwhile, or no TCP
        total += struct.unpack_from("Q", info, BYTES_SENT)[0]
    return total


def gradient_bytes(part: float) -> int:
    """Of what is learned."""
    return sum(p.nbytes for p in build(NET, 10, part, seed=0).parameters() if p.requires_grad)


def main(rank: int, processes: int, store: str, parts: Sequence[float]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    found = []
    for size in range(2, processes + 1):
        group = dist.new_group(list(range(size)))
        for part in parts if rank < size else ():
            learner = DistributedDataParallel(build(NET, 10, part, seed=0), process_group=group)
            images, counts = torch.randn(2, 3, 16, 16), []
            for _ in range(2):  # the first step also arranges the buckets
                loss = learner(images).sum()  # what forward sends, the norms' statistics, all do alike
                dist.barrier(group)
                before = bytes_sent()
                loss.backward()
                counts.append(bytes_sent() - before)
                dist.barrier(group)
            found.append((size, part, counts[-1]))
    dist.barrier()
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], [float(part) for part in sys.argv[4:]])
