"""Rank, world size and collectives for torchrun.

    torchrun --nproc-per-node 2 train.py --task sketch
"""
import contextlib
import functools
import os
import sys
import warnings
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from weights import UserError, as_user_error

TIMEOUT = timedelta(days=1)             # the other processes wait while the first one validates


class Processes(NamedTuple):
    """This process among all of one training; the only one without torchrun."""
    rank: int = 0                       # only rank 0 writes files
    count: int = 1

    def shard(self, batch):
        """Indices (n,) of this process's shard of a batch."""
        return torch.arange(batch)[self.rank::self.count]

    def wrap(self, module):
        """Module with the same parameters whose gradients are averaged over processes."""
        return DistributedDataParallel(module) if self.count > 1 else module

    def sync_gradients(self, module, is_last):
        """Context of a part of a batch; gradients are averaged in the last part only."""
        return contextlib.nullcontext() if self.count == 1 or is_last else module.no_sync()

    def mean(self, value):
        """Mean of a tensor over the processes."""
        if self.count > 1:
            dist.all_reduce(value)
        return value / self.count

    def broadcast(self, function):
        """Result of function() in rank 0, in all processes."""
        values = [function() if self.rank == 0 else None]
        if self.count > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def barrier(self):
        """Wait for all processes."""
        if self.count > 1:
            dist.barrier()


def join_processes(device):
    """(Processes, device of this process) from torchrun's environment variables.

    All ranks but 0 print nothing from here on.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        return Processes(), device
    with as_user_error((KeyError, ValueError), "the environment variables of torchrun are missing "
                       "or wrong", "Start with torchrun, or a single process without RANK."):
        rank, count, *_ = (int(os.environ[name])
                           for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
        if not 0 <= rank < count or not os.environ["MASTER_ADDR"]:
            raise ValueError(f"RANK {rank}, WORLD_SIZE {count}")
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda with torchrun, got {device}. Each process "
                        f"gets a GPU of its own; Apple's can't connect processes.")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    processes = Processes(dist.get_rank(), count)
    if processes.rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        warnings.simplefilter("ignore")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    return processes, device


def peer_ended(error):
    """Whether an error only reports that another process has ended."""
    signs = ("closed by peer", "connection reset", "gloo", "nccl", "socket")
    return dist.is_initialized() and any(sign in str(error).lower() for sign in signs)
