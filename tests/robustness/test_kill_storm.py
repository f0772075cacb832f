"""Kill a training run with SIGKILL again and again, and compare its end with an undisturbed run.

About half of the kills come at a random moment of a start. The others wait for an unfinished file:
of a checkpoint, or of a cache that was removed before. After each kill every file of the run must
be absent or readable, and the checkpoint at least as far as before; then the same command is
started again. With several processes a kill hits torchrun or one of them, by chance; the others
must then end by themselves.
"""
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT, _as_main, is_alive, python
from test_stages import assert_same_run
from test_survival import workers

import data
from lib import phantom, run
from lib.files import read_json, read_meta

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

    def __init__(self, server, stages, folder, stage, processes, rng):
        self.server, self.stages, self.folder, self.stage = server, stages, folder, stage
        self.processes, self.rng = processes, rng
        self.out = folder / "runs"
        self.run = self.out / "storm"
        self.caches = ("images", "latents") if stage == "ldm" else ("images",)
        phantom.write_phantoms(folder / "phantom", 32, 8, 32)

    def start(self, name):
        """Start the run of this name; its output goes to the files out and err."""
        argv = getattr(self.stages, self.stage)(
            name, f"--data_root={self.folder}/phantom", f"--output_root={self.out}",
            f"--max_steps={MAX_STEPS[self.stage]}", "--save_minutes=0", "--log_every=1",
            "--sample_every=4", f"--batch_per_device={8 // self.processes}",
            *(["--disc_start=8"] if self.stage == "vae" else ["--sample_batch_size=2"]))
        out, err = str(self.folder / "out"), str(self.folder / "err")
        if self.processes > 1:
            return Torchrun(argv, out, err, self.processes, self.rng)
        process = self.server.Process(target=_as_main, args=(argv, out, err, str(ROOT)))
        process.start()
        return process

    def finish(self, name):
        process = self.start(name)
        process.join()
        assert process.exitcode == 0, (self.folder / "err").read_text()

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
        process = self.start("storm")
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
        assert process.exitcode < 0, (self.folder / "err").read_text()
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
            data.read_image(path)
        return step


@pytest.mark.slow
@pytest.mark.parametrize("stage, kills, processes", [
    ("ldm", 60, 1), ("vae", 20, 1), ("ldm", 20, 2), ("vae", 15, 2)])
def test_a_storm_of_kills_changes_nothing(fork_server, stages, tmp_path, stage, kills, processes):
    rng = random.Random(0)
    s = Storm(fork_server, stages, tmp_path, stage, processes, rng)
    times = []
    for _ in range(2):  # the whole run, then a start that finds it finished
        begin = time.monotonic()
        s.finish("whole")
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
    s.finish("storm")
    s.check(MAX_STEPS[stage])
    assert_same_run(s.out / "whole", s.run, stage)
    assert not list(s.out.rglob(".*.tmp"))
    assert counts["checkpoint"] > 0 and counts["cache"] > 0
