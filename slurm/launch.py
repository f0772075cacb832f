"""torchrun with a process per GPU and one line for a failure; common.sh starts it on each node."""
import logging
import os
import signal
import subprocess
import sys

import torch
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import api, errors

STOPPED, FINAL = 75, 78  # the program has said why
env = os.environ
# A job on a cluster that declares no GPUs uses all that it finds.
processes = env.get("SLURM_GPUS_ON_NODE") or torch.cuda.device_count() or 1
logging.disable(logging.ERROR)  # torchrun's account of what is printed below
try:
    run.main([f"--nproc_per_node={processes}", *sys.argv[1:]])
except api.SignalException:
    sys.exit(1)
except errors.ChildFailedError as e:
    rank, first = e.get_first_failure()
    code = FINAL if FINAL in [f.exitcode for f in e.failures.values()] else first.exitcode
    if code not in (STOPPED, FINAL):
        memory = " (killed; out of memory?)" if code == -signal.SIGKILL else ""
        where = f"rank {rank} on {env['SLURMD_NODENAME']}"
        print(f"error: {where} ended with exit code {code}{memory}", file=sys.stderr)
    if code != STOPPED and env["SLURM_NNODES"] != "1":  # the other nodes wait for this one
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.run(
            ["scancel", "--signal=TERM", f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}"])
    sys.exit(FINAL if code == FINAL else 1)
