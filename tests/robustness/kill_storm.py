"""Kill a training run with SIGKILL again and again, and compare its end with an undisturbed run.

    python tests/robustness/kill_storm.py --stage=ldm --kills=50 --seed=0
    python tests/robustness/kill_storm.py --stage=ldm --kills=15 --processes=2

About half of the kills come at a random moment of a start. The others wait for an unfinished file:
of a checkpoint, or of a cache that was removed before. After each kill every file of the run must
be absent or readable, and the checkpoint at least as far as before; then the same command is
started again. Exit code 1 otherwise. With several processes a kill hits torchrun or one of them, by
chance; the others must then end by themselves.
"""
import argparse
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from conftest import ROOT, TINY_LDM, TINY_VAE, _as_main, is_alive, python  # noqa: E402
from test_stages import assert_same_run  # noqa: E402
from test_survival import workers  # noqa: E402

from lib import run  # noqa: E402
from lib.args import at_least  # noqa: E402
from lib.files import read_json, read_meta  # noqa: E402

MAX_STEPS = {"ldm": 120, "vae": 40}
AIMED = 120.0  # seconds that a kill waits for its file, on a busy machine too


class Torchrun:
    """A stage on several processes, with the interface of a multiprocessing.Process."""

    def __init__(self, argv, out, err, processes, rng):
        command = [*python(processes), str(ROOT / argv[0]), *argv[1:]]
        with open(out, "w") as out_file, open(err, "w") as err_file:
            self.process = subprocess.Popen(command, stdout=out_file, stderr=err_file,
                                            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        self.rng = rng
        self.victim, self.ranks = None, []

    @property
    def pid(self):
        """Of the process that writes files."""
        return workers(self.process)[0]

    def is_alive(self):
        return self.process.poll() is None

    def kill(self):
        """Send SIGKILL to torchrun or one of its processes, after which all must end."""
        self.ranks = workers(self.process) if self.is_alive() else []
        self.victim = self.rng.choice([self.process.pid, *self.ranks])
        try:
            os.kill(self.victim, signal.SIGKILL)
        except ProcessLookupError:
            self.victim = None  # too late

    def join(self):
        self.process.wait(120)
        while any(map(is_alive, self.ranks)):  # they must end without torchrun too
            time.sleep(0.02)

    @property
    def exitcode(self):
        code = self.process.returncode
        return -signal.SIGKILL if code and self.victim else code


class Storm:
    """The folder of a storm, and a fork server that starts stages without importing torch."""

    def __init__(self, folder, stage, processes, rng):
        self.folder, self.stage, self.script = folder, stage, f"train_{stage}.py"
        self.processes, self.rng = processes, rng
        self.out = folder / "runs"
        self.run = self.out / "storm"
        self.caches = ("images", "latents") if stage == "ldm" else ("images",)
        self.server = multiprocessing.get_context("forkserver")
        self.server.set_forkserver_preload(["torch._dynamo", "torch.distributed", "conftest"])
        (folder / "vae.py").write_text(TINY_VAE)
        (folder / "ldm.py").write_text(TINY_LDM)

    def start(self, *argv):
        """Start a stage; its output goes to the files out and err."""
        out, err = str(self.folder / "out"), str(self.folder / "err")
        if self.processes > 1 and argv[0] == self.script and "--run_name=v" not in argv:
            return Torchrun(argv, out, err, self.processes, self.rng)
        process = self.server.Process(target=_as_main, args=(argv, out, err, str(ROOT)))
        process.start()
        return process

    def finish(self, *argv):
        process = self.start(*argv)
        process.join()
        if process.exitcode:
            error = (self.folder / "err").read_text()
            raise AssertionError(f"{argv} ended with {process.exitcode}\n{error}")

    def command(self, name):
        argv = [self.script, f"--data_root={self.folder}/phantom", f"--output_root={self.out}",
                f"--run_name={name}", f"--config={self.folder}/{self.stage}.py",
                f"--max_steps={MAX_STEPS[self.stage]}", "--save_minutes=0",
                "--log_every=1", "--sample_every=4",
                f"--batch_per_device={8 // self.processes}"]
        if self.stage == "vae":
            return [*argv, "--disc_start=8"]
        return [*argv, f"--ae_ckpt_path={self.out}/v/ckpts/last.pt",
                "--num_sampling_steps=4", "--sample_batch_size=2"]

    def prepare(self):
        """Make data and, for the second stage, an autoencoder with its latent scale."""
        common = [f"--data_root={self.folder}/phantom", f"--output_root={self.out}"]
        self.finish("lib/phantom.py", f"--out={self.folder}/phantom",
                    "--num_train=32", "--num_val=8", "--img_size=32")
        if self.stage == "ldm":
            self.finish("train_vae.py", *common, f"--config={self.folder}/vae.py",
                        "--run_name=v", "--max_steps=10")
            self.finish("find_latent_scale.py", *common,
                        f"--ae_ckpt_path={self.out}/v/ckpts/last.pt")

    def open_files(self, kind):
        """Files that exist only while something is made, or because it was killed meanwhile."""
        if kind == "checkpoint":
            return set(self.out.glob("storm/ckpts/.*.tmp"))
        return {path for path in self.out.glob("cache/*.status") if 0 in path.read_bytes()}

    def unfinished(self, kind):
        """Whether this start has begun a checkpoint or cache and not finished it."""
        return not self.open_files(kind) <= self.left[kind]

    def kill(self, aim, moment, skip):
        """Start the run, kill it, and return what it was doing: a key of `counts` below.

        The kill comes `moment` seconds after the start, or earlier while a file of kind `aim` is
        made, after `skip` such files.
        """
        for path in self.open_files("checkpoint"):
            path.unlink()  # the next write would take its name over
        self.left = {kind: self.open_files(kind) for kind in ("checkpoint", "cache")}
        process = self.start(*self.command("storm"))
        deadline = time.monotonic() + moment
        was_open = False
        while process.is_alive() and time.monotonic() < deadline:
            is_open = aim is not None and self.unfinished(aim)
            if is_open and skip == 0:
                break
            skip -= was_open and not is_open
            was_open = is_open
            time.sleep(0.0002)
        process.kill()
        process.join()
        if process.exitcode == 0:
            return "finished"
        if process.exitcode > 0:
            error = (self.folder / "err").read_text()
            raise AssertionError(f"a start after a kill failed\n{error}")
        for kind in ("checkpoint", "cache"):
            if self.unfinished(kind):
                return kind
        return "other"

    def check(self, step):
        """Read everything that exists; return the checkpoint's step, at least `step`."""
        ckpt = self.run / "ckpts/last.pt"
        if ckpt.exists():
            read_meta(self.run)  # otherwise the run could not go on
            reached = run.load_checkpoint(ckpt, self.stage)["step"]
            assert reached >= step, f"the checkpoint went back from step {step} to {reached}"
            step = reached
            records = run.read_records(self.run / "metrics.jsonl")
            logged = {record["step"] for record in records}
            assert set(range(1, step + 1)) <= logged, "metrics.jsonl is short"
        if (self.run / "summary.json").exists():
            read_json(self.run / "summary.json", "summary")
        for path in self.run.glob("samples/*.png"):
            run.load_image(path)
        return step


def storm(folder, stage, kills, seed, processes):
    """The summary line; AssertionError or SystemExit if a file is broken or the runs differ."""
    rng = random.Random(seed)
    s = Storm(folder, stage, processes, rng)
    s.prepare()
    shutil.rmtree(s.out / "cache", ignore_errors=True)
    times = []
    for _ in range(2):  # the whole run, then a start that finds it finished
        begin = time.monotonic()
        s.finish(*s.command("whole"))
        times.append(time.monotonic() - begin)
    # Time for a start and a few steps, so that most starts come to a new checkpoint.
    horizon = times[1] + 5 * (times[0] - times[1]) / MAX_STEPS[stage]
    shutil.rmtree(s.out / "cache")

    counts = dict.fromkeys(("checkpoint", "cache", "other", "finished"), 0)
    step = 0
    for number in range(kills):
        if number % 10 == 9:
            shutil.rmtree(s.out / "cache", ignore_errors=True)
        missing = [kind for kind in s.caches
                   if not any(0 not in path.read_bytes()
                              for path in (s.out / "cache").glob(f"{kind}_*.status"))]
        if rng.random() < 0.5:
            aim, moment, skip = None, rng.uniform(0, horizon), 0
        elif missing and counts["cache"] <= counts["checkpoint"]:
            aim, moment, skip = "cache", AIMED, rng.randrange(len(missing))
        else:
            aim, moment, skip = "checkpoint", AIMED, rng.randrange(3)
        counts[s.kill(aim, moment, skip)] += 1
        step = s.check(step)
    s.finish(*s.command("storm"))
    s.check(MAX_STEPS[stage])
    assert_same_run(s.out / "whole", s.run, stage)
    stray = list(s.out.rglob(".*.tmp"))
    assert not stray, stray
    return (f"kill storm {stage}, {processes} processes, seed {seed}: {kills} kills, "
            f"{counts['checkpoint']} inside checkpoint writing, {counts['cache']} inside cache "
            f"building, {counts['finished']} too late; step {step} before the last start; no "
            "temporary file left; equal to the undisturbed run")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=at_least(1), default=50)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--processes", type=at_least(1), default=1)
    parser.add_argument("--stage", choices=tuple(MAX_STEPS), default="ldm")
    parser.add_argument("--folder", help="empty folder to work in; default: a new temporary one")
    args = parser.parse_args()
    folder = pathlib.Path(args.folder or tempfile.mkdtemp()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(storm(folder, args.stage, args.kills, args.seed, args.processes))
    if not args.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
