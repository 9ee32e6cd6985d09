"""The processes of one training, which torchrun starts: which is this, and what all of them share.

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

from weights import UserError

LONGEST_WAIT = timedelta(days=1)        # while the first process validates


class Processes(NamedTuple):
    """This process and the others; alone without torchrun."""
    rank: int = 0                       # 0 is the first, the only one that writes
    count: int = 1

    def slots(self, batch):
        """Returns the indices (n,) of this process's part of a batch."""
        return torch.arange(batch)[self.rank::self.count]

    def wrap(self, module):
        """Returns a module of the same parameters, whose gradients are the mean over processes."""
        return DistributedDataParallel(module) if self.count > 1 else module

    def sharing(self, module, is_last):
        """Returns the context of a part of a batch: only the last one shares its gradients."""
        return contextlib.nullcontext() if self.count == 1 or is_last else module.no_sync()

    def mean(self, value):
        """Returns the mean of a tensor over the processes."""
        if self.count > 1:
            dist.all_reduce(value)
        return value / self.count

    def from_first(self, function):
        """Returns to all processes what a function without arguments returns in the first one."""
        values = [function() if self.rank == 0 else None]
        if self.count > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def wait(self):
        """Returns once every process has come here."""
        if self.count > 1:
            dist.barrier()


def join_processes(device):
    """Returns (Processes, this one's device); all but the first are silent from here on.

    Sources: the environment variables that torchrun sets. Errors: UserError for several on mps
    or on one GPU.
    """
    count = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
    if count == 1:
        return Processes(), device
    if device.startswith("cuda:"):
        raise UserError(f"--device {device}: torchrun gives each process a GPU of its own; give "
                        f"--device cuda")
    if device.startswith("mps"):
        raise UserError("--device mps: has no way to join processes; leave out torchrun, or give "
                        "--device cpu")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=LONGEST_WAIT)
    processes = Processes(dist.get_rank(), count)
    if processes.rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        warnings.simplefilter("ignore")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    return processes, device


def ended_elsewhere(error):
    """Returns whether an error only says that another process is gone."""
    words = ("closed by peer", "connection reset", "gloo", "nccl", "socket")
    return dist.is_initialized() and any(word in str(error).lower() for word in words)
