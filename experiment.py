"""What stages share about a run: processes, random numbers, checkpoints, run folder, logging."""
import atexit
import concurrent.futures
import contextlib
import copy
import ctypes
import datetime
import fcntl
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel as DDP

import diffusion
import model

# What the job scripts tell apart; any other code is one that the program did not choose.
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request, saved; the same command goes on from there
EXIT_FAILED = 78  # EX_CONFIG: the same command would fail again


# --- messages -----------------------------------------------------------------------------------


def fail(message, code=EXIT_FAILED):
    """End the program with one line on standard error."""
    rank = os.environ.get("RANK", "0")
    end = SystemExit(f"error{'' if rank == '0' else f' (rank {rank})'}: {message}")
    print(end, file=sys.stderr, flush=True)
    end.code = code  # its text stays the message
    raise end


def say(text, end="\n"):
    """print, whose reader may go: training does not end because `tee` did, at Ctrl-C."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def notice(message):
    """One line from rank 0 that the reader should not miss."""
    if os.environ.get("RANK", "0") == "0":
        say(f"note: {message}")


def first_line(error):
    """What an exception says, short enough for one line of output."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def command_line(program, *words, **flags):
    """A command to paste: `python PROGRAM WORD ... --name=value ...`, quoted, without what is
    None."""
    flags = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    return shlex.join(["python", program, *map(str, words), *flags])


def data_flags(args):
    """Flags for command_line that point another stage at the same data and caches."""
    defaults = {"output_root": "runs", "split": "train", "class_filter": -1,
                "skip_bad_images": False}
    other = {name: value for name, value in vars(args).items()
             if name in defaults and value != defaults[name]}
    return {"data_root": args.data_root, "task": args.task, **other}


# --- processes ----------------------------------------------------------------------------------


class Processes(NamedTuple):
    """Where this process stands: torchrun's numbers, and what device and precision it uses."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of autocast; float32 means off
    compile: bool
    waiting: dist.ProcessGroup = None  # of several: on the CPU, and it waits as long as it takes

    @property
    def main(self):
        """Whether this is rank 0, which alone writes files and speaks."""
        return self.rank == 0

    @property
    def memory_format(self):
        """channels_last where a GPU or the bf16 units of a CPU multiply; else the plain layout."""
        units = self.device.type == "cuda" or (self.dtype == torch.bfloat16 and not self.compile)
        return torch.channels_last if units else torch.contiguous_format

    def autocast(self):
        """Context in which networks run in `dtype`."""
        bf16 = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)


def setup_processes(args):
    """Processes of this program: joins the process group where torchrun started it.

    args: device and, where the stage has them, dtype and compile; without, float32 and eager. Ends
    the program where the device is not usable.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        fail(f"--device={args.device} is not usable here ({first_line(e)}); use --device=cpu")
    fast_bf16 = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        # Else each start picks other algorithms, some of which add up in no fixed order, and no two
        # runs end with the same weights (seen on an H100).
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # torchrun gives each process one thread: share the cores instead.
        if "OMP_NUM_THREADS" not in os.environ or world_size > 1:
            torch.set_num_threads(own_cores())
        keep_memory()
        cpu = torch.cpu.get_capabilities()  # emulated bf16 is far slower than float32
        fast_bf16 = bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))
    dtype, compiled = getattr(args, "dtype", "fp32"), getattr(args, "compile", "off")
    bf16 = dtype == "bf16" or (dtype == "auto" and fast_bf16)
    compiled = compiled == "on" or (compiled == "auto" and device.type == "cuda")
    procs = Processes(rank, world_size, device, torch.bfloat16 if bf16 else torch.float32, compiled)
    if world_size > 1:
        end_with_parent()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
        atexit.register(leave_processes)
        name_lost_ranks(procs)
        # One rank may wait for hours while another still decodes its films.
        waiting = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
        procs = procs._replace(waiting=waiting)
    return procs


def own_cores():
    """CPU cores for this process: its share where several run on this machine."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def keep_memory():
    """Have glibc keep what is freed for the next step, which needs as much: else it gives a large
    tensor back to Linux, which has to clear its pages every time anew."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 * 2**20)  # the most that it takes
        libc.mallopt(m_trim_threshold, 2**30)


def end_with_parent():
    """Have Linux send this process SIGTERM when torchrun is gone, which was killed and could not
    end it: a process that goes on training would be a second writer beside the next start."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def name_lost_ranks(procs):
    """Have an exception that comes of another rank's end say in one line which rank that was."""
    here = socket.gethostname()
    places = gather_objects(procs, (here, os.getpid()))
    show = sys.excepthook

    def hook(kind, value, traceback):
        lost = lost_ranks(places, here) if issubclass(kind, RuntimeError) else []
        if not lost:
            show(kind, value, traceback)
        elif any(places[r][0] == here and r not in lost for r in range(procs.rank)):
            time.sleep(2)  # another rank speaks; while it looks round, this one must not be lost
        else:
            names = ", ".join(f"rank {r} (process {places[r][1]} on {here})" for r in lost)
            print(f"error: {names} ended before the others: killed, out of memory, or by an error "
                  "above. The same command goes on from the last checkpoint", file=sys.stderr,
                  flush=True)
    sys.excepthook = hook


def lost_ranks(places, here):
    """Ranks of this machine that are no more; places: (host, process number) by rank. Looks for a
    second: a connection is lost a moment before its process is gone."""
    for _ in range(50):
        lost = [r for r, (host, pid) in enumerate(places) if host == here and not is_alive(pid)]
        if lost:
            break
        time.sleep(0.02)
    return lost


def is_alive(pid):
    """Whether a process of this machine runs: it is there, and no zombie."""
    try:
        os.kill(pid, 0)
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
    except ProcessLookupError:
        return False
    except OSError:  # no /proc, or another user's
        return True


def leave_processes():
    """Leave the process group at the program's end, when nothing else holds it any more.

    DDP must be gone by then. If it is the last to let go of the group, it joins gloo's threads with
    Python's lock held, while one of them may want that lock to free the tensor of the last
    all_reduce: the program never ends.
    """
    if not hasattr(sys, "last_value"):  # after an exception other ranks may never arrive
        gc.collect()
        dist.destroy_process_group()


def barrier(procs):
    """Wait until all ranks are here. On the CPU, so that it does not wait for the GPU."""
    if procs.world_size > 1:
        dist.all_reduce(torch.zeros(1), group=procs.waiting)


def on_main(procs, function):
    """function() on rank 0 alone; its picklable result on every rank.

    For what only one process should do: read a folder, build a cache, make a file. Where it ends
    the program on rank 0, all ranks end, and only rank 0 says why.
    """
    if procs.world_size == 1:
        return function()
    box = [None, None]  # result, exit code
    if procs.main:
        try:
            box[0] = function()
        except SystemExit as e:
            box[1] = e.code
    dist.broadcast_object_list(box, group=procs.waiting, device=torch.device("cpu"))
    if box[1] is not None:
        raise SystemExit(box[1])
    return box[0]


def average(procs, tensor):
    """Mean of a tensor over the ranks (in place)."""
    if procs.world_size > 1:
        dist.all_reduce(tensor)
        tensor /= procs.world_size
    return tensor


def gather_objects(procs, mine):
    """[picklable object of each rank], on every rank, once all are here."""
    parts = [mine]
    if procs.world_size > 1:
        parts *= procs.world_size
        dist.all_gather_object(parts, mine, group=procs.waiting)
    return parts


def gather(procs, mine):
    """CPU tensors [n_rank, ...] of all ranks joined in the order in which items were dealt out:
    item i to rank i % world_size. The same on every rank."""
    if procs.world_size == 1:
        return mine
    counts = [torch.zeros(1, dtype=torch.long) for _ in range(procs.world_size)]
    dist.all_gather(counts, torch.tensor([len(mine)]))
    most = max(int(c) for c in counts)
    padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)[:sum(int(c) for c in counts)]


def wrap_ddp(procs, module, *example):
    """DDP around `module` where there are several processes, after one pass that is thrown away.

    DDP settles the order in which it adds gradients up only after the first pass. Without it, from
    three processes on, a run that was stopped would go on with other rounding than one left alone.
    example: inputs made as training makes them, since other strides would be compiled once more.
    """
    if procs.world_size == 1:
        return module
    module = DDP(module, gradient_as_bucket_view=True)
    with procs.autocast():
        out = module(*example)
    (out[0] if isinstance(out, tuple) else out).float().mean().backward()
    module.zero_grad(set_to_none=True)
    return module


# --- random numbers and order of the data -------------------------------------------------------


def generator(device, *key):
    """Random generator on `device` that depends on the key alone, as (seed, 'ldm', step, rank)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def step_batch(settings):
    """Images per optimiser step of one process, from a dict of settings."""
    return settings["batch_per_device"] * settings.get("grad_accum", 1)


def own_places(procs, batch):
    """Slice of the global batch, `batch` items a rank, that is this rank's."""
    return slice(procs.rank * batch, (procs.rank + 1) * batch)


def send(tensor, device):
    """A CPU tensor on the device. From pinned memory, since any other copy to a GPU waits until the
    GPU has done all that it was given before."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def draw(procs, batch, shape, *key):
    """(numbers [batch, *shape] of this rank on the device, generator) from a normal distribution.

    Every rank draws those of all ranks and takes its own: an image's noise depends on its place in
    the global batch, not on how many processes share that. The generator goes on, alike on all
    ranks.
    """
    rng = generator(procs.device, *key)
    numbers = torch.randn(procs.world_size * batch, *shape, device=procs.device, generator=rng)
    return numbers[own_places(procs, batch)], rng


def steps_per_epoch(num_items, batch, world_size):
    """Optimiser steps in which every item is seen at least once."""
    return math.ceil(num_items / (batch * world_size))


def count_steps(args, epoch_steps):
    """Steps of a whole run: --epochs, but at most --max_steps."""
    steps = args.epochs * epoch_steps
    return steps if args.max_steps is None else min(steps, args.max_steps)


def batch_indices(step, num_items, batch, seed, rank=0, world_size=1):
    """(positions of this rank's items in the data [batch], epoch) for optimiser step `step` from 0.

    An epoch is a shuffle from (seed, epoch), cut into batches of batch * world_size. The last one
    is filled up from the shuffle's start: no epoch is empty, and every rank has `batch` items.
    """
    epoch, i = divmod(step, steps_per_epoch(num_items, batch, world_size))
    start = (i * world_size + rank) * batch
    order = epoch_order(num_items, seed, epoch)
    return order.take(np.arange(start, start + batch), mode="wrap"), epoch


@functools.lru_cache(maxsize=1)
def epoch_order(num_items, seed, epoch):
    """Shuffled positions, kept for the epoch: shuffling a hundred thousand takes milliseconds."""
    return np.random.default_rng([seed, epoch]).permutation(num_items)


# --- training steps -----------------------------------------------------------------------------


class StopSignal:
    """SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGHUP (a terminal that was closed; not under nohup)
    ask training to finish its step, save and leave.

    `name` is that of the signal, None so far. A second Ctrl-C ends the program at once.
    """

    def __init__(self, procs):
        self.procs = procs
        self.name = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self.name == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def poll(self, save_due):
        """(stop, save), the same on all ranks: did any get a signal, does rank 0 want to save?"""
        flags = torch.tensor([float(self.name is not None), float(save_due and self.procs.main)])
        if self.procs.world_size > 1:
            dist.all_reduce(flags, group=self.procs.waiting)  # not for the GPU
        stop, save = flags.tolist()
        return stop > 0, save > 0


class RunningMeans:
    """Means of a few numbers since the last log line, without the steps that were skipped.

    The sums live on the device and are read at log steps only: `.item()` in each step would make
    the CPU wait for the GPU.
    """

    def __init__(self, procs, names):
        self.procs = procs
        self.names = names
        self.sums = torch.zeros(len(names) + 2, device=procs.device)  # last: good steps, bad steps

    def add(self, values, bad):
        """values: 0-dim tensors in the order of `names`; bad: 1.0 where the step was skipped."""
        row = torch.stack([*(v.detach() for v in values), torch.ones_like(bad)])
        self.sums += torch.cat([torch.where(bad > 0, torch.zeros_like(row), row), bad[None]])

    def read(self):
        """{name: mean over steps and ranks} as floats, NaN where no step was good, and
        `train/bad_steps`, the number of skipped ones; starts anew. All ranks must call it."""
        *sums, good, bad = average(self.procs, self.sums).tolist()
        self.sums = torch.zeros_like(self.sums)
        means = {n: s / good if good else math.nan for n, s in zip(self.names, sums, strict=True)}
        return means | {"train/bad_steps": bad}


def clip_and_step(module, optimizer, grad_clip):
    """Clip the L2 norm of the gradients to grad_clip (0: do not clip), step, and clear them.

    Returns (norm before clipping, 1.0 if it was not finite else 0.0), tensors on the device. The
    fused optimiser divides by `grad_scale`, and skips the step by itself where `found_inf` is set,
    as torch's GradScaler has it: no `if` here has to wait for the GPU. All ranks decide alike,
    since their gradients are equal.
    """
    parameters = [p for p in module.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    bad = (~torch.isfinite(grad_norm)).float()
    scale = (grad_norm / grad_clip).clamp(min=1.0) if grad_clip else None
    optimizer.grad_scale, optimizer.found_inf = scale, bad
    for p in parameters:
        if p.device.type == "cpu" and not p.grad.is_contiguous():
            # On CPUs the fused step goes through memory in order, whatever it holds, but first
            # copies gradients that are not in the plain layout, for nothing: call them plain.
            p.grad = p.grad.as_strided(p.shape, torch.empty(p.shape, device="meta").stride())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm, bad


def load_optimizer(optimizer, state):
    """load_state_dict, with moments in the layout of their weights: a fused step on a CPU goes
    through the memory of both in order, and a GPU's checkpoint may come in another layout."""
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if moment.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(moment)


def set_groups(optimizer, **settings):
    """Set lr, weight_decay, ... of all parameter groups: load_state_dict brings the stored ones."""
    for group in optimizer.param_groups:
        group.update(settings)


# --- files --------------------------------------------------------------------------------------


class CannotWrite(Exception):
    """A file could not be written; says why in one line."""


def write_atomic(path, write):
    """replace_file that ends the program where the file cannot be written."""
    try:
        replace_file(path, write)
    except CannotWrite as e:
        fail(e)


def replace_file(path, write):
    """Call write(file) on a temporary file beside `path`, flush it, then put it in place at once.

    A reader sees the old file or the new one, never a part. Where writing fails the old one stays:
    CannotWrite.
    """
    path = pathlib.Path(path)
    # Random, since process numbers repeat on other machines, and a name that can be guessed can be
    # planted; O_EXCL and O_NOFOLLOW, so that nothing that stands there is written to.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(temporary, flags, 0o666), "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(e.__context__, KeyboardInterrupt):  # torch.save was in the middle of writing
            raise KeyboardInterrupt from None
        if not isinstance(e, (OSError, RuntimeError)):  # the latter: torch.save on a full disk
            raise
        reason = getattr(e, "strerror", None) or getattr(e.__context__, "strerror", None)
        raise CannotWrite(f"cannot write {path}: {reason or first_line(e)}; free some space or "
                          "choose another folder") from e


def open_own(path, flags):
    """Descriptor of a file of ours that is written to in place, made where it is missing. Never
    through a link, which somebody may have planted there: OSError."""
    return os.open(path, flags | os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def flush_folder(folder):
    """Put the names in a folder on the disk: after a power cut the new file must be found, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder, seconds=0.0, name="*"):
    """Remove what write_atomic left in a folder, of the file `name` or of all, when its process was
    killed, if it is this old."""
    for stale in pathlib.Path(folder).glob(f".{name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime >= seconds:
                stale.unlink()


def make_folder(path):
    """Create a folder and its parents, and make sure that files can be made in it."""
    try:
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as e:
        fail(f"cannot write to {path}: {e.strerror}; choose another folder")
    return pathlib.Path(path)


def finite(value):
    """A JSON value with null for every NaN or infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    """Write a JSON file in one step; NaN and infinity become null."""
    text = json.dumps(finite(value), indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda f: f.write(text.encode()))


def parse_json(path):
    """A JSON object from a file; OSError where it cannot be read, ValueError where it is none."""
    with open(path) as f:
        try:
            value = json.load(f)
        except RecursionError as e:
            raise ValueError(e) from e
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def read_json(path, what):
    """A JSON object from a file; ends the program, saying `what` it should have been."""
    try:
        return parse_json(path)
    except FileNotFoundError:
        fail(f"no {what} at {path}")
    except (OSError, ValueError) as e:
        fail(f"{path} is no readable {what}: {e}")


def holds_run(folder):
    """Whether there is a run in a folder, be it one whose description is gone."""
    signs = ("run_meta.json", "ckpts/last.pt")
    return any(os.path.exists(os.path.join(folder, sign)) for sign in signs)


def read_meta(folder):
    """The dict in a run folder's run_meta.json; ends the program where it is none."""
    meta = read_json(os.path.join(folder, "run_meta.json"), "run description")
    if not isinstance(meta.get("args"), dict):
        fail(f"{folder}/run_meta.json is no run description: it holds no args")
    return meta


def read_run(folder):
    """read_meta of a run to go on with. Where the file is gone or damaged, what the checkpoint
    knows, without `created`: a run must not begin anew, over its own weights."""
    try:
        meta = parse_json(os.path.join(folder, "run_meta.json"))
        if isinstance(meta.get("args"), dict):
            return meta
        reason = "holds no args"
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or first_line(e)
    checkpoint = os.path.join(folder, "ckpts", "last.pt")
    if not os.path.isfile(checkpoint):
        fail(f"{folder}/run_meta.json is no run description ({reason}), and there is no "
             "ckpts/last.pt to read the settings from")
    return peek(checkpoint, lambda stored: {
        "kind": stored["kind"], "args": dict(stored["args"]),
        **{k: stored.get(k) for k in ("latent_scale_factor", "world_size")}})


def sha256_file(path):
    """Hex digest of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --- checkpoints and their loaders --------------------------------------------------------------

MADE_BY = {"vae": "train_vae.py", "ldm": "train_ldm.py"}
# What a later stage reads of a checkpoint.
NEEDED = {"vae": ("args", "ema"),
          "ldm": ("args", "model", "ema", "step", "class_names", "trained_classes", "latent_shape",
                  "latent_scale_factor", "vae_sha256", "ae_ckpt_path", "train_stats")}


def save_checkpoint(path, kind, state):
    """Write {'kind': kind, **state} in one step; kind is 'vae' or 'ldm'. CannotWrite: see
    replace_file."""
    replace_file(path, lambda f: torch.save({"kind": kind, **state}, f))


def load_archive(path):
    """What torch.save wrote, on the CPU; an exception of some kind where the file is damaged.

    Never runs code from the file (weights_only), and checks the archive's checksums, which
    torch.load does not.
    """
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken:
        raise ValueError(f"checksum of {broken} does not match")
    return torch.load(path, map_location="cpu", weights_only=True)


def fail_damaged(path, error):
    """End the program for what a hostile or damaged file raised: it is one thing to the user."""
    fail(f"{path} is damaged or no checkpoint of this program "
         f"({type(error).__name__}: {first_line(error)})")


def check_there(path):
    """End the program where there is no checkpoint at `path`, saying where one is near by."""
    if not os.path.isfile(path):
        inside = os.path.join(path, "ckpts", "best.pt")
        if not os.path.exists(inside):
            inside = os.path.join(path, "ckpts", "last.pt")
        hint = ", which is a folder" if os.path.isdir(path) else ""
        if os.path.exists(inside):
            hint = f", which is a run folder: give {inside}"
        fail(f"no checkpoint at {path}{hint}")


def load_checkpoint(path, kind):
    """The dict that save_checkpoint wrote, on the CPU; a damaged file ends the program with one
    line instead of training on with wrong weights."""
    check_there(path)
    try:
        state = load_archive(path)
    except Exception as e:
        fail_damaged(path, e)
    check_kind(state.get("kind") if isinstance(state, dict) else None, kind, path)
    return state


def check_kind(found, kind, path):
    """End the program where what `path` holds is of kind `found` instead of `kind`."""
    if found != kind:
        made_by = [program for name, program in MADE_BY.items() if name == found]
        by = f" but by {made_by[0]}" if made_by else ""
        fail(f"{path} was not made by {MADE_BY[kind]}{by}")


def check_complete(checkpoint, path):
    """End the program where a checkpoint of another version lacks what a later stage reads."""
    check_names(NEEDED[checkpoint["kind"]], checkpoint, path)


def check_names(names, found, path):
    """End the program where `found`, of the checkpoint at `path`, lacks one of these names."""
    if missing := [name for name in names if name not in found]:
        fail(f"{path} is of another version of this program: it lacks {', '.join(missing)}")


def peek(path, look):
    """look(dict of a checkpoint) while its weights stay on the disk; ends the program where it is
    damaged or lacks what look wants."""
    try:
        return look(torch.load(path, mmap=True, weights_only=True))
    except Exception as e:
        fail_damaged(path, e)


def stored_settings(path, kind):
    """The settings in a checkpoint, while its weights stay on the disk; ends the program as
    load_checkpoint does."""
    check_there(path)
    found, settings = peek(path, lambda stored: (stored["kind"], dict(stored["args"])))
    check_kind(found, kind, path)
    return settings


def load_weights(module, state, path):
    """load_state_dict, with one line where the architecture is another."""
    try:
        module.load_state_dict(state)
    except RuntimeError as e:
        problem = str(e).splitlines()[1].strip()[:200]
        fail(f"{path} does not fit the model's settings: {problem}")


def run_folder(ckpt_path):
    """Folder of the run that RUN/ckpts/*.pt belongs to, also where a bare name was typed."""
    path = pathlib.Path(ckpt_path)
    if len(path.parts) < 3 or ".." in path.parts:
        path = pathlib.Path(os.path.abspath(path))
    return path.parent.parent


def find_moved(ckpt_path, beside):
    """ckpt_path, or where it is not there any more, that run beside the run folder `beside`: so a
    folder of runs can be moved, or used from another working directory."""
    path = pathlib.Path(ckpt_path)
    moved = pathlib.Path(beside).parent / run_folder(path).name / "ckpts" / path.name
    return moved if moved.exists() and not path.exists() else path


def find_autoencoder(args):
    """Path of the autoencoder's checkpoint: --ae_ckpt_path, else the one beside --ae_config_path,
    else that of the newest finished train_vae.py run of the task, which a notice names.

    Newest by the date in its run_meta.json. Ends the program where there is none.
    """
    if args.ae_ckpt_path:
        resumed = getattr(args, "resume_dir", None)
        return find_moved(args.ae_ckpt_path, resumed or ".")
    if args.ae_config_path:
        return pathlib.Path(args.ae_config_path).parent / "ckpts" / "last.pt"
    found = []
    for path in pathlib.Path(args.output_root).glob("*/run_meta.json"):
        try:
            meta = parse_json(path)
            task = meta["args"].get("task")
        except (OSError, ValueError, KeyError, AttributeError) as e:
            notice(f"{path} is no readable run description ({first_line(e)}): passed over")
            continue
        if meta.get("kind") == "vae" and task == args.task:
            finished = (path.parent / "summary.json").exists()
            found.append((finished, seconds_since_1970(meta.get("created")), str(path.parent)))
    if not found:
        command = command_line("train_vae.py", **data_flags(args))
        fail(f"no autoencoder of task {args.task} in {args.output_root}: train one with "
             f"`{command}`, or name one with --ae_ckpt_path")
    finished, _, folder = max(found)
    kind = "newest finished" if finished else "newest (none has finished)"
    notice(f"autoencoder: {folder}, the {kind} of {len(found)} runs of task {args.task}")
    return pathlib.Path(folder) / "ckpts" / "last.pt"


def seconds_since_1970(text):
    """The instant that a run_meta.json's date names, whatever its time zone; 0 for no date."""
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (TypeError, ValueError):
        return 0.0


def check_class_names(names, path):
    """End the program where a class name in a checkpoint is no plain file name: it becomes one, and
    a stranger's `../x` would be written outside the folder."""
    for name in names:
        if not isinstance(name, str) or not name or name[0] == "." or "/" in name or "\0" in name:
            fail(f"{path} has a class {name!r}, which is no file name: it is not loaded")


# Settings that model.AutoencoderKL takes, in its order.
VAE_SHAPE = ("img_size", "z_channels", "base_ch", "ch_mults", "num_res_blocks", "attn_res",
             "patch_size", "linear_path", "quant_conv")


def load_autoencoder(ckpt_path, procs, config_path=None):
    """(AutoencoderKL with its averaged weights on the device, its settings, sha256 of the file).

    config_path: a run_meta.json that must describe the same architecture.
    """
    checkpoint = load_checkpoint(ckpt_path, "vae")
    check_complete(checkpoint, ckpt_path)
    settings = checkpoint["args"]
    check_names(VAE_SHAPE, settings, ckpt_path)
    if config_path:
        described = read_meta(pathlib.Path(config_path).parent)["args"]
        for name in VAE_SHAPE:
            stored = settings[name]
            if described.get(name) != (list(stored) if isinstance(stored, tuple) else stored):
                fail(f"{config_path} says {name}={described.get(name)}, but {ckpt_path} has "
                     f"{stored}: the two are not of the same run")
    vae = model.AutoencoderKL(*(settings[name] for name in VAE_SHAPE))
    load_weights(vae, checkpoint["ema"], ckpt_path)
    vae = vae.to(procs.device, memory_format=procs.memory_format).eval().requires_grad_(False)
    return vae, settings, sha256_file(ckpt_path)


AUG_DIM = 6  # numbers that tell how an image was augmented: see data.augment


def build_denoiser(settings, latent_shape, num_classes):
    """Denoiser from a dict of train_ldm.py's settings; ValueError where they contradict."""
    unet = model.UNet(latent_shape, num_classes, settings["ldm_base_ch"], settings["ldm_ch_mults"],
                      settings["ldm_num_res_blocks"], settings["ldm_attn_res"],
                      AUG_DIM if settings["augment"] else 0)
    schedule = diffusion.NoiseSchedule(settings["noise_schedule"], settings["zero_terminal_snr"])
    return diffusion.Denoiser(unet, schedule, settings["prediction"], settings["loss_weighting"])


def autoencoder_of(checkpoint, ckpt_path):
    """Path of the autoencoder that the LDM checkpoint at ckpt_path was trained with; ends the
    program where it is gone."""
    path = find_moved(checkpoint["ae_ckpt_path"], run_folder(ckpt_path))
    if not os.path.exists(path):
        fail(f"the autoencoder is not at {path} any more: give its checkpoint with --ae_ckpt_path")
    return path


def load_ldm(ckpt_path, procs, ae_ckpt_path=None, use_ema=None):
    """(Denoiser, AutoencoderKL, checkpoint dict) from an LDM checkpoint, networks on the device.

    ae_ckpt_path: where the autoencoder is now, if it was moved. use_ema None: averaged weights if
    there are any. Ends the program if the model was trained with another autoencoder.
    """
    checkpoint = load_checkpoint(ckpt_path, "ldm")
    check_complete(checkpoint, ckpt_path)
    check_class_names(checkpoint["class_names"], ckpt_path)
    num_classes = len(checkpoint["class_names"])
    check_names(("augment",), checkpoint["args"], ckpt_path)
    denoiser = build_denoiser(checkpoint["args"], checkpoint["latent_shape"], num_classes)
    if use_ema and checkpoint["ema"] is None:
        fail(f"{ckpt_path} was trained without EMA weights: give --no-use_ema")
    if use_ema is False and checkpoint["model"] is None:
        fail(f"{ckpt_path} holds averaged weights alone: take last.pt for --no-use_ema")
    averaged = checkpoint["ema"] is not None if use_ema is None else use_ema
    load_weights(denoiser, checkpoint["ema" if averaged else "model"], ckpt_path)
    denoiser = denoiser.to(procs.device, memory_format=procs.memory_format)
    denoiser = denoiser.eval().requires_grad_(False)
    path = ae_ckpt_path or autoencoder_of(checkpoint, ckpt_path)
    vae, _, vae_sha256 = load_autoencoder(path, procs)
    if vae_sha256 != checkpoint["vae_sha256"]:
        fail(f"{path} is not the autoencoder that {ckpt_path} was trained with (its hash differs); "
             "give that one with --ae_ckpt_path, or train the LDM again")
    return denoiser, vae, checkpoint


# --- sampling -----------------------------------------------------------------------------------


def compile_for_sampling(denoiser, procs):
    """Compile its network in place where procs.compile says so; its weights keep their names."""
    if procs.compile:
        denoiser.unet.compile()


def cast_weights(module, procs):
    """A copy with weights in bf16 where autocast would cast them anew in every evaluation: in bf16,
    uncompiled. Else the module itself. On a CPU the results are the same bit for bit; elsewhere
    model.Upsample sums up weights that are rounded already."""
    if procs.dtype != torch.bfloat16 or procs.compile:
        return module
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.bfloat16()
    return module


def sample_latents(denoiser, latent_shape, wanted, class_names, args, procs, tick=None):
    """Normalised latents [B, C, h, w] on the device of `wanted`, a list of (class index, number).

    args: seed, sampler, num_sampling_steps, guidance_scale, guidance_interval. A sample's noise
    comes from (seed, class name, number) on the CPU: the same on every device and in every batch.
    tick() is called before each network evaluation.
    """
    rngs = [generator("cpu", args.seed, "sample", class_names[c], number) for c, number in wanted]
    y = torch.tensor([c for c, _ in wanted], device=procs.device)

    def noise():
        parts = torch.stack([torch.randn(latent_shape, generator=rng) for rng in rngs])
        return send(parts, procs.device).contiguous(memory_format=procs.memory_format)

    return diffusion.sample(denoiser, y, noise, args.sampler, args.num_sampling_steps,
                            args.guidance_scale, args.guidance_interval, procs.autocast, tick)


@torch.no_grad()
def decode_latents(vae, z, latent_scale_factor, procs, batch_size=16):
    """Images [N, 1, H, W] in [-1, 1] on the CPU from normalised latents [N, C, h, w]."""
    images = []
    for part in z.split(batch_size):
        with procs.autocast():
            x = vae.decode(part.to(procs.device) / latent_scale_factor)
        images.append(x.clamp(-1, 1).cpu())
    return torch.cat(images)


def sample_batches(denoiser, vae, latent_scale_factor, wanted, class_names, args, procs, batch_size,
                   tick):
    """Yield ([(class index, number)], normalised latents, images in [-1, 1]), on the CPU, for
    batches of `wanted`.

    args as in sample_latents; tick(done) is called before each network evaluation, with the number
    of single-image evaluations that will then be done of len(wanted) * num_sampling_steps.
    """
    denoiser = cast_weights(denoiser, procs)
    done = 0
    for start in range(0, len(wanted), batch_size):
        batch = wanted[start:start + batch_size]
        full = batch
        if procs.compile and start > 0:  # another size would be compiled once more
            full = batch + batch[-1:] * (batch_size - len(batch))

        def count(batch=batch):
            nonlocal done
            done += len(batch)
            tick(done)

        try:
            z = sample_latents(denoiser, vae.latent_shape, full, class_names, args, procs, count)
            z = z[:len(batch)]
            x = decode_latents(vae, z, latent_scale_factor, procs)
        except RuntimeError as e:  # torch.OutOfMemoryError is one; a CPU "can't allocate memory"
            if "memory" not in str(e):
                raise
            fail(f"{len(batch)} images at once do not fit into memory: lower the batch size "
                 f"({batch_size})")
        yield batch, z.cpu(), x


class TrainedModel(NamedTuple):
    """A loaded LDM, and what is to be drawn from it."""

    denoiser: diffusion.Denoiser
    vae: model.AutoencoderKL
    checkpoint: dict
    classes: list  # indices


# What a set of samples depends on beside the checkpoint, in manifests and reports.
SAMPLING_SETTINGS = ("seed", "sampler", "num_sampling_steps", "guidance_scale",
                     "guidance_interval", "use_ema")


def split_names(text, known):
    """Names of a list with commas or colons between them; a known name may itself hold some, and
    the longest that fits counts."""
    longest_first = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
    return re.findall(rf"\s*({longest_first}|[^,:]*?)\s*[,:]", f"{text},")


def prepare_sampling(args, procs):
    """TrainedModel from the flags of args.add_sampling_arguments; what is None there is set as in
    training. Ends the program where they ask for what the model cannot do."""
    if not args.ckpt:
        fail("which model? Give --ckpt=runs/ldm_.../ckpts/best.pt")
    denoiser, vae, checkpoint = load_ldm(args.ckpt, procs, args.ae_ckpt_path, args.use_ema)
    class_names, trained = checkpoint["class_names"], checkpoint["trained_classes"]
    names = [class_names[c] for c in trained]
    if args.classes:
        names = split_names(args.classes, class_names)
    for name in names:
        if name not in class_names:
            fail(f"no class {name!r} in {args.ckpt}; it knows {', '.join(class_names)}")
        if class_names.index(name) not in trained:
            fail(f"{args.ckpt} saw no image of class {name!r} in training")
    settings = checkpoint["args"]
    if args.use_ema is None:
        args.use_ema = checkpoint["ema"] is not None
    for name in ("guidance_scale", "guidance_interval"):
        if getattr(args, name) is None:
            setattr(args, name, settings[name])
    if args.guidance_scale != 1 and settings["prob_uncond"] == 0:
        fail("this model never trained its null class (prob_uncond was 0), so guidance has nothing "
             "to guide from: give --guidance_scale=1")
    compile_for_sampling(denoiser, procs)
    classes = [class_names.index(name) for name in dict.fromkeys(names)]
    return TrainedModel(denoiser, vae, checkpoint, classes)


# --- run folder and logging ---------------------------------------------------------------------


def git_commit():
    """Commit of this code, with -dirty where it was changed; None outside a repository."""
    if not shutil.which("git"):
        return None
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def named_folder(args):
    """Run folder that --resume_dir or --run_name names, None where neither does, or the stage has
    no such flag."""
    if getattr(args, "resume_dir", None):
        return args.resume_dir
    name = getattr(args, "run_name", None)
    return os.path.join(args.output_root, name) if name else None


def new_folder(args, default_name):
    """Folder of a new run. Without --run_name it is made exclusively, so that two runs of the same
    second get two."""
    try:
        if args.run_name:
            folder = named_folder(args)
            os.makedirs(folder, exist_ok=True)
            return folder
        name = f"{args.exp_name or default_name}_{time.strftime('%Y%m%d-%H%M%S')}"
        for number in itertools.count(1):
            folder = os.path.join(args.output_root, name + (f"_{number}" if number > 1 else ""))
            with contextlib.suppress(FileExistsError):
                os.makedirs(folder)
                return folder
    except OSError as e:
        fail(f"cannot write to {folder}: {e.strerror}; choose another --output_root")


def take_lock(path, what, wait=False):
    """File at `path` whose lock says that `what` is in use; to be kept open as long as it is.

    The system gives the lock back when its process ends, however it ends, also on NFS, where that
    may take a minute after a node died: so an owner on another machine is waited for. wait: so is
    any other, as long as it takes. Ends the program where `what` is not free in the end.
    """
    try:
        lock = open(open_own(path, os.O_APPEND), "ab+", buffering=0)  # noqa: SIM115
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror}; choose another --output_root")
    here = socket.gethostname()
    for second in itertools.count():
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            owner = lock.read(200).decode("utf-8", "replace").strip() or "another process"
            patience = math.inf if wait else 0 if owner.endswith(f" on {here}") else 120
            if second >= patience:
                fail(f"{what} is in use by {owner}: wait until it ends, stop it, or give another "
                     "--run_name", EXIT_STOPPED)
            if second == 0:
                how_long = "until it ends" if wait else "up to two minutes, it may be dead"
                notice(f"{what} is in use by {owner}: waiting {how_long}")
            time.sleep(1)
        except OSError as e:  # a disk without locks
            notice(f"{what} cannot be locked ({e.strerror}): start no second run in it")
            break
    with contextlib.suppress(OSError):  # the name is for the message alone: a full disk may be
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {here}\n".encode())
    return lock


def parse_record(line):
    """The dict in a line of metrics.jsonl, {} where it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is one
        return {}
    return record if isinstance(record, dict) else {}


def on_cpu(value):
    """A copy of nested dictionaries, lists and tuples with all tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: on_cpu(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_cpu(v) for v in value)
    return value


class Run:
    """A training run's folder: checkpoints, metrics, description, W&B. Only rank 0 writes."""

    def __init__(self, args, procs, kind, default_name, facts):
        """New folder OUTPUT_ROOT/NAME, or the one of args.resume_dir. facts: for run_meta.json.

        The folder is this process group's until it ends; another one is refused.
        """
        self.procs = procs
        self.kind = kind
        self.wandb = None
        self.resumed = args.resume_dir is not None
        self.lock = None
        self.writer = concurrent.futures.ThreadPoolExecutor(1)  # of checkpoints
        self.writing = None

        def claim():
            folder = args.resume_dir or new_folder(args, default_name)
            self.lock = take_lock(os.path.join(folder, "lock"), folder)
            return folder
        self.folder = pathlib.Path(on_main(procs, claim))
        self.checkpoint_path = self.folder / "ckpts" / "last.pt"
        self.best_path = self.folder / "ckpts" / "best.pt"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.meta = {
            "kind": kind, "folder": self.folder.name, "args": vars(args), **facts,
            "command": sys.argv, "git_commit": git_commit(), "world_size": procs.world_size,
            "device": str(procs.device), "dtype": str(procs.dtype).split(".")[-1],
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "wandb_id": args.wandb_id,
            "packages": {"python": sys.version.split()[0], "torch": torch.__version__,
                         "numpy": np.__version__, "pillow": PIL.__version__}}
        self.before = {}  # the description of the run that is continued
        self.begun, self.seconds_before = time.perf_counter(), 0.0
        if self.resumed:
            old = self.before = on_main(procs, lambda: read_run(self.folder))
            self.meta["created"] = old.get("created")
            is_copy = old.get("folder") not in (None, self.folder.name)  # of another run's folder
            if not args.wandb_id and not is_copy:
                self.meta["wandb_id"] = old.get("wandb_id")
            if old.get("world_size") not in (None, procs.world_size):
                self._notice_processes(old)

    def _notice_processes(self, old):
        """Say what another number of processes changes: with as many images per step, nothing."""
        processes = self.procs.world_size
        message = f"continuing on {processes} processes instead of {old['world_size']}"
        now = step_batch(self.meta["args"]) * processes
        try:
            before = step_batch(old["args"]) * old["world_size"]
            same, left = divmod(before * self.meta["args"]["batch_per_device"], now)
        except (KeyError, TypeError):  # a damaged description
            before, same, left = "an unknown number", 0, 1
        if before == now:
            notice(f"{message}, with the same {now} images per step: only rounding changes")
            return
        advice = f"; --batch_per_device={same} would change nothing" if same and not left else ""
        notice(f"{message}, with {now} images per step instead of {before}: the step count goes "
               f"on, but epochs have another length{advice}")

    def load(self):
        """The checkpoint of a run that is continued, else None."""
        checkpoint = load_checkpoint(self.checkpoint_path, self.kind) if self.resumed else None
        if checkpoint:
            self.seconds_before = checkpoint.get("seconds", math.nan)  # of an earlier version
        return checkpoint

    def seconds(self):
        """What the run has taken so far: up to the checkpoint that it went on from, and since."""
        return self.seconds_before + time.perf_counter() - self.begun

    def start(self, args, state):
        """Make the folder and its first checkpoint, or cut metrics.jsonl back to the checkpoint."""
        if not self.procs.main:
            return
        for sub in ("ckpts", "samples"):
            make_folder(self.folder / sub)
            sweep(self.folder / sub)
        sweep(self.folder)
        if self.resumed:
            self._mend_log(state["metrics_bytes"])
        else:
            self.metrics_path.touch()
            self.save(state)  # a folder with run_meta.json always has a checkpoint
            self.wait_for_checkpoint()
        if args.wandb:
            config = {**vars(args), "world_size": self.procs.world_size}
            self.wandb = start_wandb(args, self.folder, self.meta["wandb_id"], config)
            if self.wandb is not None:
                self.meta["wandb_id"] = self.wandb.id
        write_json(self.folder / "run_meta.json", self.meta)

    def _mend_log(self, size):
        """Cut metrics.jsonl back to the `size` that it had at the checkpoint, or further, to its
        last whole line, where a power cut took the end away."""
        try:
            with open(open_own(self.metrics_path, 0), "r+b") as f:
                f.truncate(min(size, os.fstat(f.fileno()).st_size))
                end = start = 0
                for line in f:
                    start += len(line)
                    if line.endswith(b"\n") and parse_record(line):
                        end = start
                f.truncate(end)
        except OSError as e:
            fail(f"cannot write {self.metrics_path}: {e.strerror}")
        if end < size:
            notice(f"the last {size - end} bytes of {self.metrics_path} are gone or damaged, after "
                   "a power cut perhaps: cut back to its last whole line; the run itself lost "
                   "nothing")

    def save(self, state, path=None):
        """Write ckpts/last.pt, or `path`, in the background: training goes on once the weights are
        copied. The other ranks do not wait."""
        if self.procs.main:
            self.wait_for_checkpoint()
            size = self.metrics_path.stat().st_size
            state = on_cpu({**state, "metrics_bytes": size, "world_size": self.procs.world_size,
                            "seconds": self.seconds()})
            self.writing = self.writer.submit(self._write, state, path or self.checkpoint_path)

    def save_best(self, state):
        """Write ckpts/best.pt, which is to sample from and not to go on from: the averaged weights
        alone. Where a run that was started again has just found the same, it keeps its hash."""
        if not self.procs.main:
            return
        there = self.best_path.exists()
        if not there or peek(self.best_path, lambda stored: stored["best"]) != state["best"]:
            left_out = {"optimizer": None, "recent": None}
            if state["ema"] is not None:
                left_out["model"] = None
            self.save(state | left_out, self.best_path)

    def _write(self, state, path):
        with open(self.metrics_path, "rb") as f:
            os.fsync(f.fileno())  # the checkpoint counts its bytes
        save_checkpoint(path, self.kind, state)

    def wait_for_checkpoint(self):
        """Until the last checkpoint is on the disk; ends the program where it could not be
        written."""
        if self.writing is not None:
            try:
                self.writing.result()
            except CannotWrite as e:
                fail(e)
            self.writing = None

    def settle(self):
        """On every rank, until the last checkpoint is on the disk."""
        self.wait_for_checkpoint()
        barrier(self.procs)

    def log(self, step, epoch, metrics):
        """Append one line to metrics.jsonl and hand it to W&B. Non-finite numbers become null."""
        if not self.procs.main:
            return
        if self.writing is not None and self.writing.done():
            self.wait_for_checkpoint()
        try:
            with open(open_own(self.metrics_path, os.O_APPEND), "a") as f:
                f.write(json.dumps(finite({"step": step, "epoch": epoch, **metrics})) + "\n")
        except OSError as e:
            fail(f"cannot write {self.metrics_path}: {e.strerror}; free some space, then go on "
                 f"with: {self.resume_command()}")
        if self.wandb is not None:
            try:
                self.wandb.log({**metrics, "step": step, "epoch": epoch})
            except Exception as e:  # a logger that lost its server must not end training
                notice(f"W&B stopped taking metrics ({e}); training goes on, and metrics.jsonl has "
                       "everything")
                self.wandb = None

    def log_images(self, step, epoch, paths):
        """Hand picture files to W&B: {name: path} as samples/NAME."""
        if self.wandb is not None:
            import wandb
            images = {f"samples/{name}": wandb.Image(str(path), caption=f"{name}, epoch {epoch}")
                      for name, path in paths.items()}
            with contextlib.suppress(Exception):
                self.wandb.log({"step": step, **images})

    def log_verdicts(self, verdicts):
        """The level of each metrics.Verdict on the run's W&B page."""
        if self.wandb is not None:
            with contextlib.suppress(Exception):
                self.wandb.summary.update(verdict_levels(verdicts))

    def history(self, name):
        """All logged values of a metric in order; null reads as NaN."""
        values = []
        with open(self.metrics_path, "rb") as f:
            for line in f:
                record = parse_record(line)
                if name in record:
                    values.append(math.nan if record[name] is None else record[name])
        return values

    def check_steps(self, step, total_steps):
        """End the program, and leave the run as it is, where settings end before its checkpoint."""
        if step > total_steps:
            fail(f"{self.folder} has done {step} steps, but with these settings it ends after "
                 f"{total_steps}: give more --epochs or --max_steps, or fewer images per step. "
                 "Nothing was changed")

    def resume_command(self, **flags):
        """The command that continues this run."""
        return command_line(MADE_BY[self.kind], resume_dir=self.folder, **flags)

    def _upload(self, checkpoint):
        name = re.sub(r"[^\w.-]", "_", self.folder.name)  # what W&B takes
        try:
            self.wandb.log_artifact(str(checkpoint), name=name, type="model")
        except Exception as e:
            notice(f"W&B did not take {checkpoint} ({first_line(e)})")

    def _finish_wandb(self, exit_code):
        if self.wandb is not None:
            with contextlib.suppress(Exception):
                self.wandb.finish(exit_code=exit_code)

    def stop(self, step, signal_name):
        """Leave with exit code 75 and the command to go on with; the checkpoint is written.

        signal_name: None where another rank got the signal.
        """
        self.wait_for_checkpoint()
        self._finish_wandb(EXIT_STOPPED)
        by = signal_name or "on another rank"
        notice(f"stopped ({by}) at step {step}, which is saved; go on with: "
               f"{self.resume_command()}")
        raise SystemExit(EXIT_STOPPED)

    def finish(self, step, summary, verdicts, checkpoint, diverged):
        """Write summary.json with the metrics.Verdicts and close W&B, which with --wandb_artifacts
        gets the checkpoint, a path, too; diverged: end the program, saying how to go on."""
        if self.procs.main:
            path, seconds = self.folder / "summary.json", self.seconds()
            with contextlib.suppress(OSError, ValueError):
                before = parse_json(path)
                if before.get("step") == step:  # started again after its end, to do nothing
                    seconds = before.get("wall_seconds")
            summary = {"step": step, "diverged": diverged, "wall_seconds": seconds, **summary,
                       "verdicts": [v._asdict() for v in verdicts]}
            write_json(path, summary)
        if self.wandb is not None:
            numbers = {k: v for k, v in summary.items() if isinstance(v, (int, float))}
            with contextlib.suppress(Exception):
                self.wandb.summary.update(numbers | verdict_levels(verdicts))
            if self.meta["args"]["wandb_artifacts"] and not diverged:
                self._upload(checkpoint)
        self._finish_wandb(int(diverged))
        if diverged and not self.procs.main:
            raise SystemExit(EXIT_FAILED)
        if diverged:
            lower = f"{self.meta['args']['lr'] / 3:.1e}"
            fail("too many steps in a row had a non-finite loss or gradient (--max_bad_steps); "
                 f"they were skipped, and {self.checkpoint_path} is good. Go on with: "
                 f"{self.resume_command(lr=lower)}")


def tag_list(text):
    """['a', 'b'] of 'a, b', or of "['a', 'b']" as a sweep writes a list."""
    tags = [tag.strip(" '\"") for tag in text.strip("[]()").split(",")]
    return [tag for tag in tags if tag]


def verdict_levels(verdicts):
    """{verdict/METRIC: level} of metrics.Verdicts."""
    return {f"verdict/{verdict.metric}": verdict.level for verdict in verdicts}


def start_wandb(args, folder, wandb_id, config):
    """A W&B run for a run folder, offline where there is no account or network; never a prompt.
    None if it fails. wandb_id: of the one to go on with, if any; config: settings to show."""
    try:
        import wandb
        mode = os.environ.get("WANDB_MODE", "online")
        has_key = os.environ.get("WANDB_API_KEY")
        if mode == "online" and not has_key and not wandb.login(prompt=False):
            notice("no W&B account on this machine: logging offline (`wandb login` once, then "
                   "`wandb sync` the folder)")
            mode = "offline"
        options = dict(
            project=args.wandb_project, entity=args.wandb_entity, name=folder.name,
            dir=str(folder), tags=tag_list(args.wandb_tags), id=wandb_id, resume="allow",
            config=config, settings=wandb.Settings(init_timeout=30, silent=True))
        try:
            session = wandb.init(mode=mode, **options)
        except Exception as e:
            if mode != "online":
                raise
            notice(f"W&B is not reachable ({first_line(e)}): logging offline")
            session = wandb.init(mode="offline", **options)
        session.define_metric("step")
        session.define_metric("*", step_metric="step")  # a resumed run counts its own from 0
        return session
    except Exception as e:
        notice(f"W&B could not start ({type(e).__name__}: {first_line(e)}); going on without it")
        return None


def report_run(args):
    """For --check, two lines: the folder that a run would write to (empty: named by its date), and
    the step of its checkpoint (-1: none)."""
    folder = named_folder(args)
    checkpoint = os.path.join(folder or "", "ckpts", "last.pt")
    there = folder and os.path.exists(checkpoint)
    step = peek(checkpoint, lambda stored: stored["step"]) if there else -1
    print(folder or "", step, sep="\n")


# --- pictures and progress ----------------------------------------------------------------------


def to_uint8(x):
    """Images [..., H, W] in [-1, 1] as uint8, clipped and never rescaled: black stays black."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def save_image(path, x):
    """PNG of one image [1, H, W] in [-1, 1]."""
    image = Image.fromarray(to_uint8(x)[0].cpu().numpy())
    write_atomic(path, lambda f: image.save(f, "PNG"))


def load_image(path):
    """What save_image wrote, [1, H, W] in [-1, 1]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1)[None]


def save_grid(path, rows, labels):
    """PNG with a row of images for each tensor [N, 1, H, W] in [-1, 1], its label above it."""
    height, width = rows[0].shape[-2:]
    pad, text = 2, 14  # pixels between images, and for the line above them
    columns = max(len(row) for row in rows)
    size = (columns * (width + pad) + pad, len(rows) * (height + text + pad))
    sheet = Image.new("L", size, 40)
    draw = ImageDraw.Draw(sheet)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = i * (height + text + pad)
        draw.text((pad, top + 1), label, fill=255)
        for j, image in enumerate(to_uint8(row)[:, 0].cpu().numpy()):
            sheet.paste(Image.fromarray(image), (pad + j * (width + pad), top + text))
    write_atomic(path, lambda f: sheet.save(f, "PNG"))


class Progress:
    """One status line: rewritten in place on a terminal, a new line every 30 s in a log file."""

    def __init__(self, procs, label, total, done=0):
        self.label = label
        self.total = total
        self.done_before = done
        self.enabled = procs.main
        self.tty = sys.stdout.isatty()
        self.start = time.perf_counter()
        self.shown = 0.0 if self.tty else self.start
        self.width = 0

    def update(self, done, text=""):
        """done of total are finished; text: what else to show."""
        now = time.perf_counter()
        if not self.enabled or now - self.shown < (0.2 if self.tty else 30.0):
            return
        self.shown = now
        seconds = (now - self.start) / max(done - self.done_before, 1) * (self.total - done)
        percent = 100 * done // max(self.total, 1)
        line = f"{self.label} {done}/{self.total} ({percent}%) {text} {time_text(seconds)} left"
        if self.tty:
            line = line[:shutil.get_terminal_size().columns - 1]
            say("\r" + line.ljust(self.width), end="")
            self.width = len(line)
        else:
            say(line)

    def clear(self):
        """Wipe the line, so that normal output can follow."""
        if self.enabled and self.tty and self.width:
            say("\r" + " " * self.width + "\r", end="")
            self.width = 0


def time_text(seconds):
    """12 s, 3 min 20 s, 2 h 05 min, 3 d 04 h."""
    s = int(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s // 60 % 60:02d} min"
    return f"{s // 86400} d {s // 3600 % 24:02d} h"
