"""A run: its folder, checkpoints, metrics, W&B, progress line and pictures.

    runs/NAME/run_meta.json     every argument, class names, versions
              metrics.jsonl     one line per log event
              ckpts/last.pt     to go on from; best.pt: the averaged weights to sample from
              samples/*.png     labelled grids
              summary.json      final metrics and verdicts
"""
import contextlib
import datetime
import hashlib
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import time
import zipfile

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw

from lib import verdicts
from lib.args import print_settings
from lib.dist import StopSignal, load_optimizer
from lib.files import (EXIT_STOPPED, command_line, data_flags, fail, finite, first_line,
                       make_folder, named_folder, notice, read_json, read_meta, say, take_lock,
                       write_atomic, write_json, writing)

# --- checkpoints --------------------------------------------------------------------------------

CONTENTS = {  # what a checkpoint of each kind must hold
    "vae": {"args", "ema", "step"},
    "ldm": {"args", "step", "model", "ema", "best", "recent", "class_names", "trained_classes",
            "latent_shape", "latent_scale_factor", "vae_sha256", "ae_ckpt_path", "train_stats"}}


def load_checkpoint(path, kind):
    """The dict that Run.save wrote, on the CPU, with `sha256` of the very bytes that were read.

    kind: "vae" or "ldm". Code in the file is never run, and the archive's checksums are verified,
    which torch.load does not do. Ends the program if the file is missing, damaged, or of another
    kind or version.
    """
    if not os.path.isfile(path):
        fail(f"no checkpoint at {path}: give RUN/ckpts/best.pt or RUN/ckpts/last.pt")
    try:
        content = pathlib.Path(path).read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if broken := archive.testzip():
                raise ValueError(f"checksum of {broken} does not match")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if state["kind"] != kind:
            raise ValueError(f"it was made by train_{state['kind']}.py")
        if missing := CONTENTS[kind] - state.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return state | {"sha256": hashlib.sha256(content).hexdigest()}
    except Exception as e:  # a hostile or damaged file raises anything
        fail(f"{path} is damaged or no checkpoint of this program's train_{kind}.py "
             f"({type(e).__name__}: {first_line(e)})")


def load_network(build, settings, weights, path):
    """The module that build(settings) makes, with stored weights; ends the program if they do not
    fit, before anything is allocated."""
    try:
        with torch.device("meta"):
            module = build(settings)
        module.load_state_dict(weights, assign=True)
        return module
    except Exception as e:  # settings of a stranger raise anything
        fail(f"{path} does not fit its own settings, or is of another version of this program "
             f"({type(e).__name__}: {' '.join(str(e).split())[:200]})")


# --- finding runs -------------------------------------------------------------------------------


def run_folder(ckpt_path):
    """Folder of the run that RUN/ckpts/*.pt belongs to, also if a bare file name was given."""
    return pathlib.Path(os.path.normpath(os.path.join(ckpt_path, "..", "..")))


def find_autoencoder(args):
    """Checkpoint of the autoencoder: --ae_ckpt_path, else the one beside --ae_config_path, else
    that of the task's newest finished train_vae.py run, which a notice names. Ends the program if
    there is none."""
    if args.ae_ckpt_path:
        return pathlib.Path(args.ae_ckpt_path)
    if args.ae_config_path:
        return pathlib.Path(args.ae_config_path).parent / "ckpts" / "last.pt"
    found = []
    for path in pathlib.Path(args.output_root).glob("*/run_meta.json"):
        meta = read_json(path)
        finished = path.with_name("summary.json").exists()
        if finished and meta.get("kind") == "vae" and meta["args"]["task"] == args.task:
            found.append((meta["created"], path.parent))
    if not found:
        fail(f"no finished autoencoder of task {args.task} in {args.output_root}: name one with "
             f"--ae_ckpt_path, or train one: {command_line('train_vae.py', **data_flags(args))}")
    _, folder = max(found)
    notice(f"autoencoder: {folder}, the newest of {len(found)} finished runs of task {args.task}")
    return folder / "ckpts" / "last.pt"


def read_latent_scale(args, ckpt_path, vae_sha256):
    """Latent scale factor: --latent_scale_factor, with a notice if it is over 1 % off, else that of
    the run being continued, else the measured one. Ends the program with the command that measures
    it, if it is missing, damaged or of another autoencoder."""
    path = run_folder(ckpt_path) / "latent_scale.json"
    stored = read_json(path)
    if stored.get("vae_sha256") != vae_sha256:
        stored = {}
    measured, given = stored.get("latent_scale_factor"), args.latent_scale_factor
    if given is None and args.resume_dir:
        given = read_meta(args.resume_dir).get("latent_scale_factor")
    if not (given or measured):
        command = command_line("find_latent_scale.py", ae_ckpt_path=ckpt_path, **data_flags(args))
        fail(f"{path} is missing, damaged or of another autoencoder; measure it: {command}")
    if args.latent_scale_factor and measured and abs(given / measured - 1) > 0.01:
        notice(f"--latent_scale_factor={given} is {100 * (given / measured - 1):+.0f} % off the "
               f"measured {measured:.6g} in {path}")
    return given or measured


# --- the run ------------------------------------------------------------------------------------


class Run:
    """A training run's folder and console. Only rank 0 writes and prints. The folder belongs to
    this group of processes until it ends; another one is refused."""

    def __init__(self, args, ctx, kind, default, facts):
        """The folder that the flags name, else a new one, named `default` and the date. kind: "vae"
        or "ldm"; facts: more for run_meta.json."""
        self.args, self.ctx, self.kind = args, ctx, kind

        def claim():
            folder = named_folder(args) or new_folder(args.output_root, args.exp_name or default)
            self.lock = take_lock(make_folder(folder) / "lock", folder)
            if not args.resume_dir and os.path.exists(os.path.join(folder, "metrics.jsonl")):
                fail(f"{folder} was made meanwhile: type the same command again", EXIT_STOPPED)
            return folder, read_meta(folder) if args.resume_dir else {}
        folder, self.before = ctx.on_main(claim)  # description of the run that is continued
        self.folder = pathlib.Path(folder)
        self.last_path = self.folder / "ckpts" / "last.pt"
        self.best_path = self.folder / "ckpts" / "best.pt"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.saved_step, self.save_time = -1, time.perf_counter()
        self.wandb = args.wandb and ctx.is_main  # later W&B's object for this run
        self.meta = {
            "kind": kind, "args": vars(args), **facts,
            "command": sys.argv, "git_commit": git_commit(), "world_size": ctx.world_size,
            "device": str(ctx.device), "dtype": str(ctx.dtype).split(".")[-1],
            "created": self.before.get("created", time.strftime("%Y-%m-%dT%H:%M:%S%z")),
            "wandb_id": args.wandb_id or self.before.get("wandb_id"),
            "packages": {"python": sys.version.split()[0], "torch": torch.__version__,
                         "numpy": np.__version__, "pillow": PIL.__version__}}

    @staticmethod
    def report(args, kind):
        """Print for --check the folder that a run of this kind would write to (empty: named by its
        date), and the step of the checkpoint in it (-1: none)."""
        folder = named_folder(args) or ""
        path = os.path.join(folder, "ckpts", "last.pt")
        found = folder and os.path.exists(path)
        print(folder, load_checkpoint(path, kind)["step"] if found else -1, sep="\n")

    def load(self):
        """Checkpoint of the run that is continued, else None."""
        if not self.args.resume_dir:
            return None
        checkpoint = load_checkpoint(self.last_path, self.kind)
        self.saved_step = checkpoint["step"]
        return checkpoint

    def restore(self, modules, optimizers=()):
        """Load {module: its stored weights} and {optimizer: its stored state}; ends the program if
        a network has another shape."""
        try:
            for module, state in modules.items():
                module.load_state_dict(state)
        except RuntimeError as e:
            fail(f"stored weights of other settings or version: {' '.join(str(e).split())[:200]}")
        for optimizer, state in dict(optimizers).items():
            load_optimizer(optimizer, state)

    def start(self, state, total_steps, parser, facts):
        """Print the settings with facts {name: text}, and write the first files or cut
        metrics.jsonl back to the checkpoint. From here on signals wait for the end of a step."""
        step = state["step"]
        if step > total_steps:
            fail(f"{self.folder} has done {step} steps, but with these settings it ends after "
                 f"{total_steps}: give more --epochs or --max_steps, or fewer images per step")
        self.stop_signal = StopSignal()
        self.progress = Progress("step", total_steps)
        self.log_step, self.log_time = step, time.perf_counter()
        if not self.ctx.is_main:
            return
        self.meta["changed"] = [*print_settings(self.args, parser, {
            "run folder": self.folder, "continues at step": step, **facts,
            "device": f"{self.ctx.device} x {self.ctx.world_size}, {self.ctx.dtype}, "
                      f"compile {self.ctx.compile or 'off'}"})]
        for name in ("ckpts", "samples"):
            make_folder(self.folder / name)
        self.track(self._start_wandb)
        # Before the first checkpoint: a folder with a checkpoint always has a description.
        write_json(self.folder / "run_meta.json", self.meta)
        if self.args.resume_dir:
            # Cut back to the checkpoint's step, whose evaluation is done again.
            text = "".join(json.dumps(finite(r)) + "\n" for r in read_records(self.metrics_path)
                           if (r["step"], "train/loss" not in r) <= (step, False))
            write_atomic(self.metrics_path, lambda f: f.write(text.encode()))
        else:
            self.save(state)
        if self.ctx.compile:
            say(f"step {step}/{total_steps}: compiling, which takes up to a few minutes")

    # --- the training loop ---

    def save_if_due(self, state, now):
        """Save state() if --save_minutes are over or `now`; if a signal asked any rank to stop,
        save and leave."""
        due = time.perf_counter() - self.save_time > 60 * self.args.save_minutes
        flags = torch.tensor([self.stop_signal.name is not None, due and self.ctx.is_main]).float()
        if self.ctx.world_size > 1:  # on the CPU: this must not wait for the GPU
            torch.distributed.all_reduce(flags, group=self.ctx.cpu_group)
        stopping, due = flags.bool().tolist()  # alike on all ranks
        if stopping or due or now:
            self.save(state())
        if stopping:
            self.ctx.gather_objects(None)  # the first to end takes the others along
            self._leave()

    def stop_if_asked(self, state):
        """Within an evaluation: save state() and leave, if a signal asked rank 0 to."""
        if self.stop_signal.name and self.ctx.is_main:
            self.save(state())
            self._leave()

    def save(self, state):
        """Write ckpts/last.pt, once per step: a finished run started again keeps its hash."""
        if state["step"] == self.saved_step:
            return
        self.saved_step, self.save_time = state["step"], time.perf_counter()
        if self.ctx.is_main:
            self._write(self.last_path, state)

    def _write(self, path, state):
        self._check_lock()
        write_atomic(path, lambda f: torch.save({"kind": self.kind, **state}, f))

    def save_best(self, state):
        """Write ckpts/best.pt, the averaged weights alone. A run that was started again and has
        just found the same keeps its hash."""
        if not self.ctx.is_main:
            return
        with contextlib.suppress(Exception):  # missing or damaged: it is written anew
            stored = torch.load(self.best_path, mmap=True, weights_only=True)
            if stored["best"] == state["best"]:
                return
        model = state["model"] if state["ema"] is None else None
        self._write(self.best_path, state | {"model": model, "optimizer": None, "recent": None})

    def _check_lock(self):
        """End the program if the folder is no longer ours: moved, removed, perhaps made anew."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.lock.fileno()), os.stat(self.folder / "lock")):
                return
        fail(f"{self.folder} was moved or removed during this run: go on with --resume_dir")

    def log(self, step, epoch, metrics, pictures=()):
        """Append a line to metrics.jsonl and hand it to W&B with pictures {name: path}. Non-finite
        numbers become null."""
        self.log_step, self.log_time = step, time.perf_counter()  # images per second are since then
        if not self.ctx.is_main:
            return
        self._check_lock()
        line = json.dumps(finite({"step": step, "epoch": epoch, **metrics})) + "\n"
        with writing(self.metrics_path), open(self.metrics_path, "a") as f:
            f.write(line)

        def send():
            import wandb
            self.wandb.log({**metrics, "step": step, "epoch": epoch} | {
                f"samples/{name}": wandb.Image(str(path), caption=f"{name}, epoch {epoch}")
                for name, path in dict(pictures).items()})
        self.track(send)

    def _start_wandb(self):
        """Start or resume a W&B run: offline without account or network, never with a prompt."""
        import wandb
        args, online = self.args, os.environ.get("WANDB_MODE", "online") == "online"
        options = dict(
            project=args.wandb_project, entity=args.wandb_entity, name=self.folder.name,
            dir=str(self.folder), id=self.meta["wandb_id"], resume="allow",
            tags=[t for tag in args.wandb_tags.split(",") if (t := tag.strip(" []()'\""))],
            config=vars(args) | {"world_size": self.ctx.world_size},
            settings=wandb.Settings(init_timeout=30, silent=True))
        try:
            if online and not wandb.login(prompt=False, verify=False):
                raise RuntimeError("no account on this machine: `wandb login` once")
            self.wandb = wandb.init(**options)
        except Exception as e:  # whatever an unreachable server raises
            notice(f"W&B failed ({first_line(e)}): logging offline; `wandb sync` the folder later")
            self.wandb = wandb.init(**options, mode="offline")
        self.meta["wandb_id"] = self.wandb.id
        self.wandb.define_metric("step")
        self.wandb.define_metric("*", step_metric="step")  # a resumed run counts its own from 0

    def track(self, action):
        """action() on W&B, if it is in use; if it fails, say so once and go on without."""
        try:
            if self.wandb:
                action()
        except Exception as e:  # whatever a lost server raises
            notice(f"W&B failed ({first_line(e)}): going on without; metrics.jsonl has all")
            self.wandb = None

    def log_training(self, step, epoch, metrics, images_per_step):
        """Log metrics of training steps with images per second, on the console too; returns all."""
        per_second = (step - self.log_step) / (time.perf_counter() - self.log_time)
        metrics = metrics | {"train/images_per_second": per_second * images_per_step}
        self.log(step, epoch, metrics)
        numbers = "  ".join(f"{name.removeprefix('train/')} {value:.4g}"
                            for name, value in metrics.items())
        say(f"step {step} epoch {epoch}: {numbers}")
        return metrics

    def log_evaluation(self, step, epoch, metrics, pictures, found=()):
        """Log an evaluation: metrics, pictures {name: path} and verdicts."""
        self.log(step, epoch, metrics, pictures)
        numbers = "".join(f"  {name} {value:.4f}" for name, value in metrics.items()
                          if name.startswith("val/"))
        paths = ", ".join(str(path) for path in pictures.values())
        say(f"epoch {epoch}, step {step}:{numbers}  {paths}")
        if found:
            say(verdicts.format_verdicts(found))

    def save_grid(self, name, rows, labels):
        """Path of samples/NAME.png with a row of images for each tensor; see save_grid."""
        self._check_lock()
        path = self.folder / "samples" / f"{name}.png"
        save_grid(path, rows, labels)
        return path

    def history(self, name):
        """All logged values of a metric in order; NaN if one was not finite."""
        return [record[name] for record in read_records(self.metrics_path) if name in record]

    # --- its end ---

    def resume_command(self, **flags):
        """The command that continues this run."""
        return command_line(f"train_{self.kind}.py", resume_dir=self.folder, **flags)

    def _leave(self):
        """Exit with code 75 and the command to go on with."""
        self.track(lambda: self.wandb.finish(EXIT_STOPPED))
        by = self.stop_signal.name or "on another rank"
        notice(f"stopped ({by}) at step {self.saved_step}, which is saved; go on with: "
               f"{self.resume_command()}")
        raise SystemExit(EXIT_STOPPED)

    def finish(self, step, summary, found, checkpoint, diverged, program, **flags):
        """Write summary.json with the verdicts `found`, close W&B, and print the command that
        follows: program with flags. diverged: end the program, saying how to go on."""
        if self.ctx.is_main:
            if diverged or self.kind == "vae":  # those of an LDM's evaluation are printed already
                say(verdicts.format_verdicts(found))
            if checkpoint == self.best_path:
                say(f"the one to use: {checkpoint}, of epoch {summary['best']['epoch']}, "
                    f"with the lowest val/loss ({summary['best']['loss']:.4g})")
            write_json(self.folder / "summary.json", {
                "step": step, "diverged": diverged, **summary,
                "verdicts": [v._asdict() for v in found]})
        self.track(lambda: self.wandb.finish(int(diverged)))
        if diverged:
            lower = self.resume_command(lr=f"{self.args.lr / 3:.1e}")
            self.ctx.on_main(lambda: fail(
                "too many steps in a row had a non-finite loss or gradient (--max_bad_steps) and "
                f"were skipped; {self.last_path} is good, go on with: {lower}"))
        self.ctx.gather_objects(None)  # all is written now: the first to end takes others along
        say("report: " + command_line("report.py", self.folder))
        say("next: " + command_line(program, **flags))


def new_folder(output_root, name):
    """Folder OUTPUT_ROOT/NAME_DATE, made exclusively: two runs of the same second get two."""
    folder = make_folder(output_root) / f"{name}_{time.strftime('%Y%m%d-%H%M%S')}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        return str(folder)
    return new_folder(output_root, f"{name}_2")


def git_commit():
    """Commit of this code, with -dirty if it was changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):  # no git
        found = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True,
                               text=True, check=False)
        return found.stdout.strip() or None


def read_records(path):
    """[dict] of the lines of metrics.jsonl with a step, NaN for null, without damaged ones."""
    records = []
    if os.path.isfile(path):
        for line in pathlib.Path(path).read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
                record = json.loads(line)
                if isinstance(record["step"], int) and record["step"] >= 0:
                    records.append({n: math.nan if v is None else v for n, v in record.items()})
    return records


# --- pictures and progress ----------------------------------------------------------------------


def to_uint8(x):
    """Images [..., H, W] in [-1, 1] as uint8, clipped and never rescaled: black stays black."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def save_image(path, x):
    """PNG of one image [1, H, W] in [-1, 1]."""
    image = Image.fromarray(to_uint8(x)[0].cpu().numpy())
    write_atomic(path, lambda f: image.save(f, "PNG"))


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
    """A line every 15 s: what share is done, and the time left."""

    def __init__(self, label, total):
        self.label, self.total, self.shown = label, total, time.perf_counter()
        self.since = None  # (done, time) of the first update: before it something may compile

    def update(self, done):
        """done of total are finished."""
        now = time.perf_counter()
        self.since = self.since or (done, now)
        before, since = self.since
        if now - self.shown < 15 or done == before:
            return
        self.shown = now
        left = (now - since) / (done - before) * (self.total - done)
        say(f"{self.label} {done}/{self.total} ({100 * done // self.total}%) "
            f"{datetime.timedelta(seconds=int(left))} left")
