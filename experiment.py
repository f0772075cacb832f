"""What every stage shares about a run: arguments, processes, random numbers, run folder, checkpoints, logging."""
import argparse
import atexit
import contextlib
import datetime
import difflib
import functools
import gc
import hashlib
import json
import math
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel as DDP

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request with a checkpoint on disk; the same command goes on from it


def fail(message):
    """End the program with one line on standard error and exit code 1."""
    rank = os.environ.get("RANK", "0")
    raise SystemExit(f"error{'' if rank == '0' else f' (rank {rank})'}: {message}")


def first_line(error):
    """What an exception says, short enough for one line of output."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def notice(message):
    """One line from rank 0 that the reader should not miss."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {message}", flush=True)


# --- arguments ---------------------------------------------------------------------------------------------


def boolean(text):
    """'True', 'false', '1', 'no', ... as a bool."""
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


boolean.kind = bool


def int_list(text):
    """'1,2,4', '1:2:4' or '[1, 2, 4]' as a tuple of integers; an empty string is the empty tuple."""
    try:
        return tuple(int(part) for part in re.split("[,:]", text.strip("[]() ")) if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers such as 1,2,4") from None


int_list.kind = tuple


def interval(text):
    """argparse type: 'LOW,HIGH' (or ':') as two floats with 0 <= LOW <= HIGH <= 1."""
    try:
        low, high = (float(part) for part in re.split("[,:]", text.strip("()[] ")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers such as 0.2,0.8") from None
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not an interval within 0,1")
    return low, high


interval.kind = tuple


def at_least(low, kind=int, high=math.inf):
    """argparse type: a finite number of `kind` from `low` to `high`."""
    def convert(text):
        try:
            value = kind(text)
            finite = math.isfinite(value)  # OverflowError: an integer beyond all floats
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None
        if not finite or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must be a number of at least {low}"
                                             + (f" and at most {high}" if high < math.inf else ""))
        return value
    convert.kind = kind
    return convert


def or_none(convert):
    """`convert`, but the text None is None: what W&B agents write for "not set"."""
    def convert_or_none(text):
        return None if text == "None" else convert(text)
    convert_or_none.kind = getattr(convert, "kind", str)
    return convert_or_none


class BooleanFlag(argparse.Action):
    """--flag, --flag=True, --flag=false and --no-flag."""

    BARE = object()  # the value of a flag without one

    def __init__(self, option_strings, dest, **kwargs):
        negative = ["--no-" + o[2:] for o in option_strings]
        super().__init__([*option_strings, *negative], dest, nargs="?", const=self.BARE, type=boolean, metavar="BOOL",
                         **kwargs)

    def __call__(self, parser, namespace, value, option):
        negative = option.startswith("--no-")
        if negative and value is not self.BARE:
            parser.error(f"{option} takes no value; use --{option[5:]}={not value}")
        setattr(namespace, self.dest, not negative if value is self.BARE else value)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=min(110, shutil.get_terminal_size().columns))


def make_parser(doc):
    """Parser of one stage, with the arguments that all stages know."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("data").add_argument
    add("--data_root", help="folder of TASK/SPLIT/CLASS/*.png; none: the phantom set")
    add("--task", default="TB", help="folder below data_root; ALL_CXR joins all tasks")
    add("--split", default="train", help="split to use")
    add("--img_size", type=at_least(1), default=256, help="side in pixels")
    add("--class_filter", type=at_least(-1), default=-1, help="index of the only class to use; -1: all")
    add("--skip_bad_images", action=BooleanFlag, default=False, help="leave out unreadable images and count them")
    add("--num_workers", type=at_least(0), default=4, help="threads that decode images while the cache is built")
    add = parser.add_argument_group("run").add_argument
    add("--config", help="Python file of `name = value` lines; the command line wins over it")
    add("--seed", type=at_least(0, int, 2**63 - 1), default=0, help="of weights, order and noise")
    add("--output_root", default="runs", help="folder of run folders and caches")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
        help="autocast type; auto: bf16 where the hardware multiplies it")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile; auto: on for CUDA")
    return parser


def add_training_arguments(parser, lr, epochs, batch_per_device):
    """Arguments that both trainers know."""
    group = {g.title: g for g in parser._action_groups}["run"]
    add = group.add_argument
    add("--exp_name", help="first part of the run folder's name; none: from stage and task")
    add("--run_name", help="whole name of the run folder; an existing run of this name is continued")
    add("--resume_dir", help="run folder to continue, with its own settings where none are given")
    add("--save_minutes", type=at_least(0, float), default=10.0, help="time between checkpoints")
    add("--max_bad_steps", type=at_least(1), default=20, help="stop after this many non-finite steps in a row")
    add = parser.add_argument_group("logging").add_argument
    add("--log_every", type=at_least(1), default=100, help="steps between log lines")
    add("--sample_every", type=at_least(1), default=10, help="epochs between evaluations")
    add("--wandb", action=BooleanFlag, default=False, help="log to Weights & Biases")
    add("--wandb_project", default="cxr-ldm", help="W&B project")
    add("--wandb_entity", help="W&B user or team")
    add("--wandb_tags", default="", help="comma list")
    add("--wandb_id", help="W&B run to continue")
    add = parser.add_argument_group("optimiser").add_argument
    add("--lr", type=at_least(0, float), default=lr, help="AdamW learning rate after warm-up")
    add("--weight_decay", type=at_least(0, float), default=0.01, help="AdamW weight decay")
    add("--grad_clip", type=at_least(0, float), default=1.0, help="L2 norm to clip gradients to; 0: off")
    add("--epochs", type=at_least(1), default=epochs, help="passes over the data")
    add("--max_steps", type=at_least(0), default=0, help="stop after this many optimiser steps; 0: by epochs")
    add("--batch_per_device", type=at_least(1), default=batch_per_device, help="images a process and micro-step")
    add("--overfit_one", action=BooleanFlag, default=False, help="train on a single image")
    add("--overfit_k", type=at_least(0), default=0, help="train on K images; 0: all")
    add("--repeat_len", type=at_least(1), default=100, help="times that overfit_one repeats its image an epoch")


def _closest(name, known):
    match = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _check_config_value(path, action, value):
    """A config file's value in the argument's own type; a wrong type ends the program."""
    kind = getattr(action.type, "kind", str)
    allowed = {float: (int, float), tuple: (tuple, list)}.get(kind, (kind,))
    if value is None and action.default is None:
        return None
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        fail(f"{path}: {action.dest} = {value!r} is a {type(value).__name__}, expected {kind.__name__}")
    if action.choices and value not in action.choices:
        fail(f"{path}: {action.dest} = {value!r}, expected one of {', '.join(action.choices)}")
    if action.type is None or kind is bool:
        return value
    try:
        return action.type(",".join(map(str, value)) if kind is tuple else str(value))
    except argparse.ArgumentTypeError as e:
        fail(f"{path}: {action.dest}: {e}")


def read_config(path, parser):
    """Settings of a config file: Python, run in an empty namespace, whose public names are arguments.

    Ends the program where the file is missing or broken, a name is no argument, or a value has the wrong type.
    """
    if not os.path.isfile(path):
        fail(f"no config file {path}")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        fail(f"{path}: {type(e).__name__}: {first_line(e)}")
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    settings = {}
    for name, value in names.items():
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue
        if name not in actions:
            fail(f"{path}: unknown setting {name!r}{_closest(name, actions)}")
        try:
            settings[name] = _check_config_value(path, actions[name], value)
        except ValueError as e:  # an integer too long to print
            fail(f"{path}: {name}: {e}")
    return settings


def parse_args(parser, argv=None, presets=None):
    """Settings as a Namespace: defaults < preset < settings of the run being continued < --config < command line.

    presets: function from the settings as far as known to a dict of new defaults; raises ValueError on bad ones.
    """
    argv = sys.argv[1:] if argv is None else argv
    dests = [a.dest for a in parser._actions if a.dest != "help"]
    for action in parser._actions:
        if action.default is None:
            action.type = or_none(action.type or str)
    unset = object()
    parsed, unknown = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(dests, unset)))
    if unknown:
        options = [o for a in parser._actions for o in a.option_strings]
        parser.error(f"unknown argument {unknown[0]}{_closest(unknown[0].split('=')[0], options)}")
    given = {k: v for k, v in vars(parsed).items() if v is not unset}
    defaults = {d: parser.get_default(d) for d in dests}
    config = read_config(given["config"], parser) if given.get("config") else {}

    known = {**defaults, **config, **given}
    stored = {}
    folder = known.get("resume_dir")
    if not folder and known.get("run_name"):
        folder = os.path.join(known["output_root"], known["run_name"])
    if folder and os.path.exists(os.path.join(folder, "run_meta.json")):
        path, actions = os.path.join(folder, "run_meta.json"), {a.dest: a for a in parser._actions}
        stored = {k: _check_config_value(path, actions[k], tuple(v) if isinstance(v, list) else v)
                  for k, v in read_meta(folder)["args"].items() if k in defaults}
        for name in {**config, **given}.keys() & stored.keys():
            new = {**config, **given}[name]
            if new != stored[name] and name not in ("config", "resume_dir"):
                notice(f"{folder} continues with {name}={new} (was {stored[name]})")
    elif known.get("resume_dir"):
        fail(f"--resume_dir={folder} is no run folder (no run_meta.json in it)")
    known = {**defaults, **stored, **config, **given}
    try:
        preset = presets(known) if presets else {}
    except ValueError as e:
        fail(e)
    settings = {**defaults, **preset, **stored, **config, **given, "resume_dir": folder if stored else None}
    return argparse.Namespace(**settings)


def print_settings(args, parser, facts):
    """Table of all settings by group, `*` before those that differ from the defaults, then the facts found."""
    print(parser.description.split("\n")[0])
    for group in parser._action_groups:
        cells = []
        for a in group._group_actions:
            if a.dest == "help":
                continue
            value = getattr(args, a.dest)
            mark = "*" if value != a.default else " "
            value = ",".join(map(str, value)) if isinstance(value, tuple) else value
            cells.append(f"{mark}{a.dest:<21} {value!s:<14}")
        if cells:
            print(f"-- {group.title}")
        for i in range(0, len(cells), 3):
            print(" ".join(cells[i:i + 3]).rstrip())
    print("-- this run")
    for name, value in facts.items():
        print(f" {name:<21} {value}")
    sys.stdout.flush()


# --- processes ---------------------------------------------------------------------------------------------


class Processes(NamedTuple):
    """Where this process stands: torchrun's numbers and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of autocast; float32 means off
    compile: bool

    @property
    def main(self):
        return self.rank == 0

    @property
    def memory_format(self):
        """channels_last for the GPU's convolutions; on CPUs the plain layout was faster (README, speed)."""
        return torch.channels_last if self.device.type == "cuda" else torch.contiguous_format

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def setup_processes(args):
    """Join the process group where torchrun started us, and pick device and precision."""
    world_size, rank, local_rank = (int(os.environ.get(k, d)) for k, d in
                                    (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        fail(f"--device={args.device} is not usable here ({first_line(e)}); use --device=cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # torchrun gives each process one thread; share the cores instead.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if "OMP_NUM_THREADS" not in os.environ or world_size > 1:
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        cpu = torch.cpu.get_capabilities()
        fast_bf16 = bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))  # emulated bf16 is slower than float32
    else:
        fast_bf16 = False
    bf16 = args.dtype == "bf16" or (args.dtype == "auto" and fast_bf16)
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # Rank 0 alone builds caches, which can take long; the others wait.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
        atexit.register(leave_processes)
    compiled = args.compile == "on" or (args.compile == "auto" and device.type == "cuda")
    return Processes(rank, world_size, device, torch.bfloat16 if bf16 else torch.float32, compiled)


def leave_processes():
    """Leave the process group at the program's end, when nothing else holds it any more.

    DDP must be gone by then. If it is the last to let go of the group, it joins gloo's threads with Python's lock held,
    while one of them may want that lock to free the tensor of the last all_reduce: the program never ends.
    """
    if not hasattr(sys, "last_value"):  # after an exception other ranks may never arrive, and its frames hold DDP
        gc.collect()
        dist.destroy_process_group()


def broadcast(procs, value):
    """Rank 0's picklable value, on every rank."""
    if procs.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def average(procs, tensor):
    """Mean of a tensor over the ranks (in place)."""
    if procs.world_size > 1:
        dist.all_reduce(tensor)
        tensor /= procs.world_size
    return tensor


def gather(procs, mine):
    """CPU tensors [n_rank, ...] of all ranks in the order in which items were dealt out: item i to rank i % world."""
    if procs.world_size == 1:
        return mine
    counts = [torch.zeros(1, dtype=torch.long) for _ in range(procs.world_size)]
    dist.all_gather(counts, torch.tensor([len(mine)]))
    most = max(int(c) for c in counts)
    padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)[:sum(int(c) for c in counts)]


def data_parallel(procs, module, *example):
    """DDP around `module` where there are several processes; example: inputs [B, ...] such as it will get.

    One pass is thrown away: DDP settles the order in which it adds gradients up only after the first, and from
    three processes on a run that was stopped would otherwise continue with other rounding.
    """
    if procs.world_size == 1:
        return module
    module = DDP(module, gradient_as_bucket_view=True)
    with procs.autocast():
        out = module(*example)
    (out[0] if isinstance(out, tuple) else out).float().mean().backward()
    module.zero_grad(set_to_none=True)
    return module


@contextlib.contextmanager
def main_first(procs):
    """Rank 0 runs the block while the others wait, then they run it: for files that only one should write."""
    if procs.world_size > 1 and not procs.main:
        dist.all_reduce(torch.zeros(1))
    yield
    if procs.world_size > 1 and procs.main:
        dist.all_reduce(torch.zeros(1))


def generator(device, *key):
    """Random generator on `device` that depends on nothing but the key, such as (seed, 'train', step, rank)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def batch_indices(step, order_len, batch, seed, rank=0, world_size=1):
    """(positions of this rank's items in the data, epoch) for optimiser step `step` (from 0).

    An epoch is a shuffle from (seed, epoch), cut into batches of batch * world_size; the last one is filled up
    from the shuffle's start, so that no epoch is empty and every rank always has `batch` items.
    """
    epoch, i = divmod(step, steps_per_epoch(order_len, batch, world_size))
    start = (i * world_size + rank) * batch
    return epoch_order(order_len, seed, epoch).take(np.arange(start, start + batch), mode="wrap"), epoch


@functools.lru_cache(maxsize=1)
def epoch_order(order_len, seed, epoch):
    """Shuffled positions; kept for the epoch, since shuffling a hundred thousand takes milliseconds."""
    return np.random.default_rng([seed, epoch]).permutation(order_len)


def steps_per_epoch(order_len, batch, world_size):
    return math.ceil(order_len / (batch * world_size))


class Stopped(Exception):
    """Raised in a block under `StopSignal.immediate` when a signal asks to stop."""


class StopSignal:
    """SIGINT (Ctrl-C), SIGTERM and SIGUSR1 ask training to finish its step, save and leave.

    A second Ctrl-C ends the program at once.
    """

    def __init__(self, procs):
        self.procs = procs
        self.name = None
        self.is_immediate = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self.name == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if self.is_immediate:
            raise Stopped

    @contextlib.contextmanager
    def immediate(self):
        """A block without anything to lose, such as an evaluation: a signal raises Stopped in it at once."""
        if self.poll(False)[0]:  # all ranks together, and so after rank 0's checkpoint is on disk
            raise Stopped
        self.is_immediate = True
        try:
            yield
        finally:
            self.is_immediate = False

    def poll(self, save_due):
        """(stop, save), the same on all ranks: whether any rank got a signal, and whether rank 0 finds a save due."""
        flags = torch.tensor([float(self.name is not None), float(save_due and self.procs.main)])
        if self.procs.world_size > 1:
            dist.all_reduce(flags)  # on the CPU, so that it does not wait for the GPU
        return tuple(bool(f) for f in flags)


class Window:
    """Sums of a few numbers over the steps since the last log line, but for steps that were skipped: those are counted.

    Lives on the device and is read at log steps only. Part of the checkpoint, so that a resumed run logs the same.
    """

    def __init__(self, procs, names):
        self.procs, self.names = procs, names
        self.sums = torch.zeros(len(names) + 2, device=procs.device)  # good steps and bad ones come last

    def add(self, values, bad):
        """values: 0-dim tensors in the order of `names`; bad: 1.0 where the step was skipped."""
        row = torch.stack([*(v.detach() for v in values), torch.ones_like(bad)])
        self.sums += torch.cat([torch.where(bad > 0, torch.zeros_like(row), row), bad[None]])

    def means(self):
        """{name: mean over steps and ranks} as floats, NaN where no step was good, and train/bad_steps, the number of
        skipped steps; starts the next window."""
        *sums, good, bad = average(self.procs, self.sums).tolist()
        self.sums = torch.zeros_like(self.sums)
        return {n: s / good if good else math.nan for n, s in zip(self.names, sums, strict=True)} | {"train/bad_steps": bad}

    def state(self):
        """[world_size, len(names) + 2] on all ranks."""
        if self.procs.world_size == 1:
            return self.sums[None].cpu()
        rows = [torch.zeros_like(self.sums) for _ in range(self.procs.world_size)]
        dist.all_gather(rows, self.sums)
        return torch.stack(rows).cpu()

    def load(self, rows):
        if rows.shape[1] != len(self.sums):  # a run of another version of this program: its next log line covers less
            return
        same = len(rows) == self.procs.world_size
        self.sums = (rows[self.procs.rank] if same else rows.mean(0)).to(self.sums.device)


def skipped_text(train_metrics):
    """End of a log line: how many steps were skipped since the last one, if any."""
    bad = train_metrics["train/bad_steps"]
    return f", {bad:.0f} non-finite steps skipped" if bad else ""


# --- optimiser step ----------------------------------------------------------------------------------------


def clip_and_step(module, optimizer, grad_clip):
    """Clip the L2 norm of the gradients to grad_clip (0: do not clip), step, and clear them.

    Returns (norm before clipping, 1.0 if it was not finite else 0.0), tensors on the device: a non-finite step
    is skipped inside the fused optimiser, alike on all ranks since their gradients are equal, without waiting for
    the GPU.
    """
    grad_norm = torch.nn.utils.clip_grad_norm_(module.parameters(), grad_clip or math.inf)
    bad = (~torch.isfinite(grad_norm)).float()
    optimizer.grad_scale, optimizer.found_inf = None, bad
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm.detach(), bad


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


# --- files -------------------------------------------------------------------------------------------------


def write_atomic(path, write):
    """Call write(file) on a temporary file beside `path`, flush it to disk, then put it in place in one step.

    A reader sees the old file or the new one, never a part; where writing fails the old one stays.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = getattr(e, "strerror", None) or getattr(e.__context__, "strerror", None) or first_line(e)
        fail(f"cannot write {path}: {reason}; free some space or choose another --output_root")
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def make_folder(path):
    """Create a folder and its parents, and make sure that files can be made in it."""
    try:
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as e:
        fail(f"cannot write to {path}: {e.strerror}; choose another --output_root")
    return pathlib.Path(path)


def finite(value):
    """A JSON value with null for every NaN or infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    text = json.dumps(finite(value), indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda f: f.write(text.encode()))


def read_json(path, what):
    """A JSON object from a file; ends the program with what it should have been."""
    try:
        with open(path) as f:
            value = json.load(f)
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value
    except FileNotFoundError:
        fail(f"no {what} at {path}")
    except (OSError, ValueError, RecursionError) as e:
        fail(f"{path} is no readable {what}: {e}")


def read_meta(folder):
    meta = read_json(os.path.join(folder, "run_meta.json"), "run description")
    if not isinstance(meta.get("args"), dict):
        fail(f"{folder}/run_meta.json is no run description: it holds no args")
    return meta


def sha256_file(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def save_checkpoint(path, kind, state):
    """Write {'kind': kind, **state} in one step; kind is 'vae' or 'ldm'."""
    write_atomic(path, lambda f: torch.save({"kind": kind, **state}, f))


def load_checkpoint(path, kind):
    """The dict that save_checkpoint wrote, on the CPU.

    Never runs code from the file (weights_only) and checks the archive's checksums, so that a damaged file ends
    the program with one line instead of training on with wrong weights.
    """
    if not os.path.isfile(path):
        fail(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise ValueError(f"checksum of {broken} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a hostile or damaged file raises, it is one thing to the user
        fail(f"{path} is damaged or no checkpoint of this program ({type(e).__name__}: {first_line(e)})")
    if not isinstance(state, dict) or state.get("kind") != kind:
        found = state.get("kind") if isinstance(state, dict) else None
        made_by = {"vae": "train_vae.py", "ldm": "train_ldm.py"}
        fail(f"{path} was not made by {made_by[kind]}" + (f" but by {made_by[found]}" if found in made_by else ""))
    return state


def load_weights(module, state, path):
    """load_state_dict with one line where the architecture is another."""
    try:
        module.load_state_dict(state)
    except RuntimeError as e:
        fail(f"{path} does not fit the model's settings: {str(e).splitlines()[1].strip()[:200]}")


# --- run folder and logging --------------------------------------------------------------------------------


def git_commit():
    here = os.path.dirname(os.path.abspath(__file__))
    out = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"],
                         capture_output=True, text=True, check=False) if shutil.which("git") else None
    return out.stdout.strip() if out and out.returncode == 0 else None


class Run:
    """A training run's folder: checkpoints, metrics, description, W&B. Only rank 0 writes."""

    def __init__(self, args, procs, kind, default_name, facts):
        """New folder OUTPUT_ROOT/NAME, or the one of args.resume_dir. facts go into run_meta.json."""
        self.procs = procs
        self.kind = kind
        self.wandb = None
        name = args.run_name or f"{args.exp_name or default_name}_{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = pathlib.Path(broadcast(procs, args.resume_dir or os.path.join(args.output_root, name)))
        self.checkpoint_path = self.folder / "ckpts" / "last.pt"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.resumed = args.resume_dir is not None
        self.meta = {
            "kind": kind, "args": vars(args), **facts, "command": sys.argv, "git_commit": git_commit(),
            "world_size": procs.world_size, "device": str(procs.device), "dtype": str(procs.dtype).split(".")[-1],
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "wandb_id": args.wandb_id,
            "packages": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                         "pillow": PIL.__version__}}
        if self.resumed:
            old = read_meta(self.folder)
            self.meta.update(created=old.get("created"), wandb_id=args.wandb_id or old.get("wandb_id"))
            if old.get("world_size") != procs.world_size:
                notice(f"continuing on {procs.world_size} processes instead of {old.get('world_size')}: the step count "
                       "goes on, but batches, epoch length and noise are those of the new number")

    def load(self):
        """The checkpoint of a run that is continued, else None."""
        return load_checkpoint(self.checkpoint_path, self.kind) if self.resumed else None

    def start(self, args, state, last_line=None):
        """Make the folder and its first checkpoint, or cut metrics.jsonl back to where the checkpoint was."""
        if self.procs.main:
            for sub in ("ckpts", "samples"):
                make_folder(self.folder / sub)
            if self.resumed:
                for stale in self.checkpoint_path.parent.glob(".*.tmp"):  # of a process that was killed
                    stale.unlink(missing_ok=True)
                size = state["metrics_bytes"]
                if self.metrics_path.exists() and self.metrics_path.stat().st_size > size:
                    os.truncate(self.metrics_path, size)
            else:
                self.metrics_path.touch()
                self.save(state)  # a folder with run_meta.json always has a checkpoint
            if args.wandb:
                self.wandb = start_wandb(args, self)
            write_json(self.folder / "run_meta.json", self.meta)

    def save(self, state):
        """Write ckpts/last.pt (rank 0; the others wait for nothing)."""
        if self.procs.main:
            size = self.metrics_path.stat().st_size
            save_checkpoint(self.checkpoint_path, self.kind, {**state, "metrics_bytes": size})

    def log(self, step, epoch, metrics):
        """Append one line to metrics.jsonl and hand it to W&B. Non-finite numbers become null."""
        if not self.procs.main:
            return
        try:
            with open(self.metrics_path, "a") as f:
                f.write(json.dumps(finite({"step": step, "epoch": epoch, **metrics})) + "\n")
        except OSError as e:
            fail(f"cannot write {self.metrics_path}: {e.strerror}; free some space, then go on with "
                 f"--resume_dir={self.folder}")
        if self.wandb is not None:
            try:
                self.wandb.log({**metrics, "step": step, "epoch": epoch})
            except Exception as e:  # a logger that lost its server must not end training
                notice(f"W&B stopped taking metrics ({e}); training goes on, metrics.jsonl has everything")
                self.wandb = None

    def log_images(self, step, paths):
        """Hand picture files to W&B as {'samples/NAME': picture}."""
        if self.wandb is not None:
            import wandb
            with contextlib.suppress(Exception):
                self.wandb.log({"step": step, **{f"samples/{k}": wandb.Image(str(p)) for k, p in paths.items()}})

    def history(self, name):
        """All logged values of a metric in order; null reads as NaN."""
        values = []
        with open(self.metrics_path) as f:
            for line in f:
                record = json.loads(line)
                if name in record:
                    values.append(math.nan if record[name] is None else record[name])
        return values

    def end(self, step, summary, stopped, diverged, together):
        """Close the run. Finished: write summary.json. Stopped (a signal's name or False) or diverged: leave the
        program with what to do next and exit code 75 or 1. together: no rank is still in an evaluation."""
        program = {"vae": "train_vae.py", "ldm": "train_ldm.py"}[self.kind]
        if self.procs.main and not stopped:
            write_json(self.folder / "summary.json", {"step": step, "diverged": diverged, **summary})
        if self.wandb is not None:
            with contextlib.suppress(Exception):
                self.wandb.summary.update({k: v for k, v in summary.items() if isinstance(v, (int, float))})
                self.wandb.finish(exit_code=EXIT_STOPPED if stopped else int(diverged))
        if self.procs.world_size > 1 and together:
            dist.all_reduce(torch.zeros(1))  # torchrun ends all once one has left: wait for rank 0's checkpoint
        if stopped:
            by = stopped if isinstance(stopped, str) else "on another rank"
            notice(f"stopped ({by}) at step {step}, which is saved; go on with: "
                   f"python {program} --resume_dir={self.folder}")
            raise SystemExit(EXIT_STOPPED)
        if diverged:
            lr = self.meta["args"]["lr"]
            fail(f"too many steps in a row had a non-finite loss or gradient (--max_bad_steps); they were skipped, and "
                 f"{self.checkpoint_path} is good. Go on with: python {program} --resume_dir={self.folder} "
                 f"--lr={lr / 3:.1e}")


def start_wandb(args, run):
    """A W&B run, offline where there is no account or no network; never a prompt. None if W&B cannot start."""
    try:
        import wandb
        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not os.environ.get("WANDB_API_KEY") and not wandb.login(prompt=False):
            notice("no W&B account on this machine: logging offline (`wandb login` once, then `wandb sync` the folder)")
            mode = "offline"
        options = dict(project=args.wandb_project, entity=args.wandb_entity, name=run.folder.name, dir=str(run.folder),
                       tags=[t for t in args.wandb_tags.split(",") if t], id=run.meta["wandb_id"], resume="allow",
                       config={**vars(args), "world_size": run.procs.world_size})
        settings = wandb.Settings(init_timeout=30, silent=True)
        try:
            session = wandb.init(mode=mode, settings=settings, **options)
        except Exception as e:
            if mode != "online":
                raise
            notice(f"W&B is not reachable ({first_line(e)}): logging offline")
            session = wandb.init(mode="offline", settings=settings, **options)
        session.define_metric("step")
        session.define_metric("*", step_metric="step")  # a resumed W&B run counts its own steps from 0
        run.meta["wandb_id"] = session.id
        return session
    except Exception as e:
        notice(f"W&B could not start ({type(e).__name__}: {first_line(e)}); "
               "training goes on without it")
        return None


def to_uint8(x):
    """Images [..., H, W] in [-1, 1] as uint8, values outside clipped: no rescaling, black stays black."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def save_image(path, x):
    """PNG of one image [1, H, W] in [-1, 1]."""
    write_atomic(path, lambda f: Image.fromarray(to_uint8(x)[0].cpu().numpy()).save(f, "PNG"))


def load_image(path):
    """What save_image wrote, [1, H, W] in [-1, 1]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1)[None]


def save_grid(path, rows, labels):
    """PNG with one row of images for each tensor [N, 1, H, W] in [-1, 1] of `rows`, its label above it."""
    height, width = rows[0].shape[-2:]
    pad, text = 2, 14
    sheet = Image.new("L", (max(len(r) for r in rows) * (width + pad) + pad, len(rows) * (height + text + pad)), 40)
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
        self.label, self.total, self.start_done = label, total, done
        self.enabled, self.tty = procs.main, sys.stdout.isatty()
        self.start = time.perf_counter()
        self.shown = self.start if not self.tty else 0.0
        self.width = 0

    def update(self, done, text=""):
        """done of total are finished; text is what else to show."""
        now = time.perf_counter()
        if not self.enabled or now - self.shown < (0.2 if self.tty else 30.0):
            return
        self.shown = now
        left = (now - self.start) / max(done - self.start_done, 1) * (self.total - done)
        line = f"{self.label} {done}/{self.total} ({100 * done // max(self.total, 1)}%) {text} {time_text(left)} left"
        if self.tty:
            line = line[:shutil.get_terminal_size().columns - 1]
            print("\r" + line.ljust(self.width), end="", flush=True)
            self.width = len(line)
        else:
            print(line, flush=True)

    def clear(self):
        """Wipe the line, so that normal output can follow."""
        if self.enabled and self.tty and self.width:
            print("\r" + " " * self.width + "\r", end="", flush=True)
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
