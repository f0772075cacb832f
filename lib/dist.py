"""Processes and steps: what training on one CPU, one GPU and four GPUs has in common.

Random numbers depend on (seed, what they are for, step) and on an image's place in the global
batch, never on the number of processes or on what was drawn before. So a run that was killed goes
on to the same weights as one that was not.
"""
import atexit
import contextlib
import ctypes
import datetime
import functools
import gc
import hashlib
import math
import os
import signal
import socket
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from lib import cpu_ops
from lib.files import EXIT_STOPPED, fail, first_line, notice

LONG_RUN = 4000  # steps in which compiled norms gain the time of compiling them: docs/log.md

# --- processes ----------------------------------------------------------------------------------


class DistContext(NamedTuple):
    """This process among those that torchrun started, its device and its precision."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of autocast; float32 means off
    compile: str  # mode of torch.compile; "": networks run eagerly
    cpu_group: torch.distributed.ProcessGroup = None  # gloo; waits as long as it takes

    @property
    def is_main(self):
        """Whether this is rank 0, which alone writes files and prints."""
        return self.rank == 0

    @property
    def memory_format(self):
        """channels_last on a GPU and for bf16 on a CPU, where it is faster; else contiguous."""
        fast = self.device.type == "cuda" or (self.dtype == torch.bfloat16 and not self.compile)
        return torch.channels_last if fast else torch.contiguous_format

    def autocast(self):
        """Context in which networks run in `dtype`."""
        return torch.autocast(self.device.type, torch.bfloat16,
                              enabled=self.dtype == torch.bfloat16)

    # --- talking to the other ranks ---

    def on_main(self, function):
        """function() on rank 0 alone; its picklable result on every rank. If it ends the program,
        all ranks end."""
        if self.world_size == 1:
            return function()
        result = code = None
        if self.is_main:
            try:
                result = function()
            except SystemExit as e:
                code = e.code
        result, code = self.gather_objects((result, code))[0]
        if code is not None:
            raise SystemExit(code)
        return result

    def average(self, tensor):
        """Mean of a tensor over the ranks (in place)."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def gather_objects(self, local):
        """[picklable object of each rank], on every rank. Waits for them, but not for the GPU."""
        parts = [local]
        if self.world_size > 1:
            parts *= self.world_size
            torch.distributed.all_gather_object(parts, local, group=self.cpu_group)
        return parts

    def gather(self, local):
        """CPU tensors [n_rank, ...] of all ranks joined on every rank, in the order in which items
        were dealt out: item i to rank i % world_size."""
        parts = self.gather_objects(local)
        joined = local.new_empty(sum(len(part) for part in parts), *local.shape[1:])
        for rank, part in enumerate(parts):
            joined[rank::self.world_size] = part
        return joined

    def wrap_ddp(self, module, *example):
        """DistributedDataParallel around `module` if there are several processes.

        A first pass is thrown away, since DDP settles the order in which it sums gradients after
        it: otherwise a resumed run would round differently. example: inputs made exactly as
        training makes them, since other strides would be compiled once more.
        """
        if self.world_size == 1:
            return module
        module = DistributedDataParallel(module, gradient_as_bucket_view=True)
        with self.autocast():
            out = module(*example)
        (out[0] if isinstance(out, tuple) else out).float().mean().backward()
        module.zero_grad(set_to_none=True)
        return module

    # --- networks, tensors and random numbers of this rank ---

    def place(self, module):
        """The module on the device, in its faster memory layout, with its faster forward passes."""
        module = module.to(self.device, memory_format=self.memory_format)
        if self.device.type == "cpu" and self.dtype == torch.bfloat16 and not self.compile:
            cpu_ops.install(module)
        return module

    def to_device(self, tensor):
        """A CPU tensor on the device, from pinned memory: other copies wait for the GPU's work."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def local_slice(self, batch):
        """Slice of the global batch, `batch` items a rank, that belongs to this rank."""
        return slice(self.rank * batch, (self.rank + 1) * batch)

    def generator(self, *key, device="cpu"):
        """Random generator that depends on the key alone, as (seed, "ldm", step)."""
        digest = hashlib.sha256(repr(key).encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def global_noise(self, batch, shape, *key):
        """(standard normal noise [batch, *shape] of this rank on the device, generator). It depends
        on an image's place in the global batch alone: every rank draws that of all."""
        rng = self.generator(*key, device=self.device)
        noise = torch.randn(self.world_size * batch, *shape, device=self.device, generator=rng)
        return noise[self.local_slice(batch)], rng


def setup(args):
    """DistContext of this process; joins the process group if torchrun started it. Ends the program
    if --device is not usable. A stage without --dtype and --compile runs in float32, eager."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        fail(f"--device={name} is not usable here ({first_line(e)}); use --device=cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        # Otherwise each start picks other algorithms, some of which sum in no fixed order, and no
        # two runs end with the same weights (seen on an H100).
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    elif device.type == "cpu":
        # torchrun gives each process one thread: share the cores instead.
        if "OMP_NUM_THREADS" not in os.environ or world_size > 1:
            torch.set_num_threads(own_cores())
        keep_memory()
    dtype, compiled = getattr(args, "dtype", "fp32"), getattr(args, "compile", "off")
    if compiled == "auto":
        long = "max_steps" in args and (args.max_steps is None or args.max_steps >= LONG_RUN)
        compiled = "on" if device.type == "cuda" else "norms" if long else "off"
    cpu_ops.compile_norms = compiled == "norms"
    ctx = DistContext(int(os.environ.get("RANK", 0)), world_size, device, torch.float32,
                      {"on": "default", "graphs": "reduce-overhead"}.get(compiled, ""),
                      join_group(device) if world_size > 1 else None)
    if dtype == "auto":
        args.dtype = dtype = ctx.on_main(lambda: faster_dtype(device))  # a resumed run keeps it
    return ctx._replace(dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)


def faster_dtype(device):
    """What --dtype=auto takes, bf16 or fp32: by name on a GPU, by trying on a CPU."""
    if device.type == "cpu":
        gain = bf16_gain()  # seen: 0.003 where it is emulated, 0.5, 2.0, and far more with AMX
        dtype = "bf16" if gain > 1.3 else "fp32"
        notice(f"--dtype={dtype}, since bf16 multiplies {gain:.2g} x as fast as float32 here")
        return dtype
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if bf16 else "fp32"


def bf16_gain():
    """How many times as fast as in float32 this CPU multiplies in bf16: best of 30 ms, in turn."""
    best = [math.inf, math.inf]
    matrices = [torch.ones(384, 384, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    for matrix in matrices:
        matrix @ matrix  # loads and compiles kernels, which may take longer than all that follow
    end = time.perf_counter() + 0.03
    while time.perf_counter() < end:
        for i, matrix in enumerate(matrices):
            start = time.perf_counter()
            matrix @ matrix
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]


def join_group(device):
    """Join the process group of torchrun; returns a second group, on the CPU and without a
    timeout: one rank may wait for hours while another decodes its images."""
    if sys.platform == "linux":
        # If torchrun is killed, end with it: to train on would be to write beside the next start.
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:  # torchrun listens from before it starts us; PyTorch would try for ten minutes
            address = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
            socket.create_connection(address, timeout=60).close()
        except OSError as e:
            fail(f"torchrun has ended ({e})", EXIT_STOPPED)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    atexit.register(leave_group)
    return torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=30))


def leave_group():
    """Leave the process group at exit, once DDP is gone: the last to let go of the group joins
    gloo's threads, and if that is DDP, with Python's lock, which one of them may wait for."""
    if not hasattr(sys, "last_value"):  # after an exception other ranks may never arrive
        gc.collect()
        torch.distributed.destroy_process_group()


def own_cores():
    """CPU cores for this process: its share if several run on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def keep_memory():
    """Have glibc keep freed memory for the next step, which needs as much: otherwise Linux takes
    large tensors back and clears their pages anew every time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc alone has it
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 * 2**20)  # the most that it takes
        libc.mallopt(m_trim_threshold, 2**30)


# --- order of the data --------------------------------------------------------------------------


class BatchOrder(NamedTuple):
    """Which items each step trains on. An epoch is a shuffle that depends on (seed, epoch), cut
    into global batches; the last one is filled up from the shuffle's start."""

    num_items: int
    batch: int  # items per step of one rank
    seed: int
    rank: int = 0
    world_size: int = 1

    @property
    def epoch_steps(self):
        """Optimiser steps in which every item is seen at least once."""
        return math.ceil(self.num_items / (self.batch * self.world_size))

    def total_steps(self, epochs, max_steps):
        """Steps of a whole run: so many epochs, but at most max_steps (None: no limit)."""
        steps = epochs * self.epoch_steps
        return steps if max_steps is None else min(steps, max_steps)

    def indices(self, step):
        """(positions of this rank's items [batch], epoch) for a step, counted from 0."""
        epoch, i = divmod(step, self.epoch_steps)
        start = (i * self.world_size + self.rank) * self.batch
        order = shuffled(self.num_items, self.seed, epoch)
        return order.take(np.arange(start, start + self.batch), mode="wrap"), epoch


@functools.lru_cache(maxsize=1)
def shuffled(num_items, seed, epoch):
    """Shuffled positions, kept for the epoch: shuffling a hundred thousand takes milliseconds."""
    return np.random.default_rng([seed, epoch]).permutation(num_items)


# --- training steps -----------------------------------------------------------------------------


class StopSignal:
    """SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGHUP (a closed terminal; not under nohup) ask
    training to finish its step, save and leave; a second Ctrl-C ends the process on the spot.
    `name`: of the signal, None so far."""

    def __init__(self):
        # And no ctx: handlers live on after leave_group, which it must not.
        self.name = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number, frame):
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            if os.environ.get("RANK", "0") == "0":
                with contextlib.suppress(OSError):  # print might be in the middle of a line
                    os.write(2, b"\nsaving after this step; Ctrl-C again ends without saving\n")
            signal.signal(number, signal.SIG_DFL)


class RunningMeans:
    """Means of a few numbers since the last log line, without steps that were skipped and numbers
    that are NaN. The sums stay on the device: `.item()` in each step would wait for the GPU."""

    def __init__(self, ctx, names):
        self.ctx, self.names = ctx, names
        self.sums = torch.zeros(2, len(names) + 1, device=ctx.device)  # and how many were added
        self.in_a_row = torch.zeros((), device=ctx.device)  # steps that were skipped, up to now

    def add(self, values, skipped):
        """values: 0-dim tensors in the order of `names`; skipped: 1.0 if the step was, else 0.0."""
        row = torch.stack([*(v.detach() for v in values), torch.ones_like(skipped)])
        good = row.isfinite() & (skipped == 0)
        good[-1] = skipped > 0
        self.sums += torch.stack([row.where(good, torch.zeros_like(row)), good.float()])
        self.in_a_row = (self.in_a_row + 1) * skipped  # back to 0 after a good step

    def read(self):
        """{name: mean over steps and ranks}, NaN if there was none, and `train/bad_steps`, the
        number of skipped steps; starts anew. All ranks must call it."""
        sums, counts = self.ctx.average(self.sums)
        self.sums = torch.zeros_like(self.sums)
        return {**dict(zip(self.names, (sums / counts).tolist(), strict=False)),
                "train/bad_steps": counts[-1].item()}


def clip_and_step(module, optimizer, grad_clip):
    """Clip the L2 norm of the gradients to grad_clip (0: no clipping), step, and clear them.

    Returns (norm before clipping, 1.0 if it was not finite and the step was skipped else 0.0),
    tensors on the device. The fused optimiser divides by `grad_scale` and skips the step by itself
    if `found_inf` is set, as torch's GradScaler has it: no `if` here has to wait for the GPU.
    """
    parameters = [p for p in module.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    skipped = (~torch.isfinite(grad_norm)).float()
    optimizer.grad_scale = (grad_norm / grad_clip).clamp(min=1.0) if grad_clip else None
    optimizer.found_inf = skipped
    for p in parameters:
        if p.device.type == "cpu" and not p.grad.is_contiguous():
            # On CPUs the fused step goes through memory in order, whatever it holds, but first
            # copies gradients that are not contiguous, for nothing: call them contiguous.
            p.grad = p.grad.as_strided(p.shape, torch.empty(p.shape, device="meta").stride())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm, skipped


def load_optimizer(optimizer, state):
    """load_state_dict with the settings of now, and moments in the memory layout of their weights:
    a fused step on a CPU goes through both in order, and a GPU's may have another layout."""
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state["state"]})
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if moment.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(moment)
