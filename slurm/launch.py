"""torchrun for one node of a job: one process per GPU, a failure in one line, its exit code kept.

torchrun_node.sh runs `launch.py PROGRAM ARGS...` on each node.
"""
import logging
import os
import signal
import sys

import torch
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

STOPPED, FINAL = 75, 78  # the program has said why

env = os.environ
# Where Slurm hands out no GPUs, a job has those that it finds.
processes = int(env.get("SLURM_GPUS_ON_NODE") or torch.cuda.device_count()) or 1
logging.disable(logging.ERROR)  # torchrun's account of what is said below
try:
    run.main([f"--nnodes={env['SLURM_NNODES']}", f"--node_rank={env['SLURM_NODEID']}",
              f"--nproc_per_node={processes}", f"--master_addr={env['MASTER_ADDR']}",
              f"--master_port={env['MASTER_PORT']}", *sys.argv[1:]])
except SignalException as e:
    sys.exit(128 + e.sigval)
except ChildFailedError as e:
    rank, first = e.get_first_failure()
    if any(failure.exitcode == FINAL for failure in e.failures.values()):
        open(env["FINAL_MARK"], "w").close()  # see common.sh
        sys.exit(FINAL)
    code, where = first.exitcode, f"rank {rank} on {env['SLURMD_NODENAME']}"
    if code < 0:
        memory = ": out of memory?" if -code == signal.SIGKILL else ""
        print(f"error: {where} was killed by {first.signal_name()}{memory}", file=sys.stderr)
    elif code != STOPPED:
        print(f"error: {where} ended with exit code {code}", file=sys.stderr)
    sys.exit(code if code > 0 else 128 - code)
