"""No run is lost: stops at awkward moments, several processes, NaN on one rank, kills."""
import itertools
import pathlib
import re
import signal
import time

import pytest
import torch
from conftest import LIMIT_S, ROOT, is_alive, read_jsonl, run, start, strict
from test_stages import assert_same_run

from lib.files import EXIT_FAILED, EXIT_STOPPED
from lib.run import load_checkpoint


# --- commands -----------------------------------------------------------------------------------


@pytest.fixture
def command(stages, tmp_path):
    """command(stage, RUN_NAME, ...) -> argv of a short run below tmp_path/runs, with no cache yet.

    Two steps per epoch, a log line each step, evaluations at steps 4, 8 and 12.
    """
    own = {"vae": ["--disc_start=3"], "ldm": ["--sample_batch_size=2", "--num_sampling_steps=4"]}

    def argv(stage, name, *more):
        kind = stage[-3:]
        return [*getattr(stages, kind)(name, f"--output_root={tmp_path / 'runs'}")[1:], *own[kind],
                "--max_steps=12", "--sample_every=2", "--log_every=1", *more]
    return argv


HOOK = """
import hashlib, importlib, itertools, os, pathlib, signal, sys, time
sys.path.insert(0, {root!r})

def before(place, action):
    # Call action(number of the call, *args) before each call of the function `place`, such as
    # data.LatentSet._encode.
    module, *path, name = place.split(".")
    if module == "lib":
        module += "." + path.pop(0)
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), itertools.count(1)
    def hooked(*args, **kwargs):
        action(next(calls), *args)
        return original(*args, **kwargs)
    setattr(owner, name, hooked)
{body}
import {stage}
{stage}.main()
"""


def hooked(folder, stage, body):
    """Path of a script that is `stage`, once the lines `body` have been run."""
    path = folder / f"hooked_{len(list(folder.glob('hooked_*')))}.py"
    path.write_text(HOOK.format(root=str(ROOT), stage=stage, body=body))
    return str(path)


def left_over(root):
    """Temporary files below root."""
    return [p.name for p in pathlib.Path(root).rglob(".*")]


# --- one process, stopped at awkward moments ----------------------------------------------------

SEND = """
def send(call, *args):
    if call == {call}:
        os.kill(os.getpid(), signal.{name})
before({place!r}, send)
"""

# (function, the call of it that the signal comes before, signal, step at which the run is saved).
# KILLED: the handlers are not there yet, and the signal ends the process on the spot. FINISHES:
# all that is left is done before the next look at the signal. Each line goes on where the last
# one left.
KILLED, FINISHES = -1, -2
MOMENTS = [
    ("lib.decode.read_grey", 5, "SIGTERM", KILLED),  # while images are decoded
    ("data.LatentSet._encode", 1, "SIGUSR1", KILLED),  # while latents are encoded
    ("torch.save", 1, "SIGTERM", 0),  # while the first checkpoint is written
    ("os.replace", 1, "SIGUSR1", 0),  # while run_meta.json is put in place
    ("lib.run.Run.save", 3, "SIGTERM", 3),  # before the checkpoint of step 2
    ("lib.run.Run.save", 2, "SIGUSR1", 4),  # before that of step 4 and the evaluation there
    ("lib.dist.clip_and_step", 3, "SIGUSR1", 7),  # in the middle of an epoch
    ("sample.sample_latents", 1, "SIGTERM", 8),  # while images are sampled
    ("lib.run.save_grid", 2, "SIGUSR1", 9),  # evaluation all but done
    ("lib.run.save_grid", 2, "SIGTERM", FINISHES),  # the last picture of the last evaluation
]


def test_stops_at_awkward_moments_change_nothing(command, quick, tmp_path):
    result = quick("train_ldm.py", *command("train_ldm", "whole"))
    assert result.code == 0, result.err
    (tmp_path / "runs/cache").rename(tmp_path / "cache of the other run")
    args = command("train_ldm", "parts")
    folder = tmp_path / "runs/parts"
    for place, call, name, step in MOMENTS:
        script = hooked(tmp_path, "train_ldm", SEND.format(place=place, call=call, name=name))
        # A checkpoint each step; else at stops and evaluations only.
        often = place == "lib.run.Run.save"
        result = quick(script, *args, f"--save_minutes={0 if often else 60}")
        code = {KILLED: -getattr(signal, name), FINISHES: 0}.get(step, EXIT_STOPPED)
        assert result.code == code, (place, result.out, result.err)
        if step in (KILLED, FINISHES):
            continue
        assert f"stopped ({name}) at step {step}, " in result.out, (place, result.out)
        assert load_checkpoint(folder / "ckpts/last.pt", "ldm")["step"] == step
        assert not (folder / "summary.json").exists()
    result = quick("train_ldm.py", *args)
    assert result.code == 0, result.err
    assert_same_run(tmp_path / "runs/whole", folder, "ldm")
    assert len(left_over(folder)) <= 2  # of the two that were killed while they wrote


# --- two processes ------------------------------------------------------------------------------


def workers(process):
    """Process ids of a torchrun's workers, by rank."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    ranks = {}
    for pid in map(int, children.split()):
        variables = pathlib.Path(f"/proc/{pid}/environ").read_text().split("\0")
        env = dict(v.split("=", 1) for v in variables if "=" in v)
        if "RANK" in env:
            ranks[int(env["RANK"])] = pid
    return [ranks[rank] for rank in sorted(ranks)]


def wait_for(process, text):
    """Read its output up to the line that starts with `text`."""
    for line in process.stdout:
        if line.startswith(text):
            break


def finished(process):
    """Output of a process that must end by itself."""
    try:
        return "".join(process.communicate(timeout=LIMIT_S))
    finally:
        process.terminate()  # torchrun takes its workers along, by force after 30 s


ON_RANK_1 = """
def send(call, *args):
    if call == 1 and os.environ["RANK"] == "1":
        time.sleep(0.5)  # rank 0 is done with its part and waits
        os.kill(os.getpid(), signal.SIGUSR1)
before("sample.sample_latents", send)
"""


def test_two_stopped_processes_end_like_two_that_were_not(command, tmp_path):
    """By a signal on one rank in an evaluation, and by one to torchrun, which passes it on."""
    run("train_ldm.py", *command("train_ldm", "whole", "--batch_per_device=4"), processes=2)
    folder = tmp_path / "runs/parts"
    args = command("train_ldm", "parts", "--batch_per_device=4")
    finished(start(hooked(tmp_path, "train_ldm", ON_RANK_1), *args, processes=2))
    # Rank 1 waits for the next poll: the evaluation at step 4 and a step are done.
    assert load_checkpoint(folder / "ckpts/last.pt", "ldm")["step"] == 5
    assert not (folder / "summary.json").exists()
    process = start("train_ldm.py", *args, processes=2)
    wait_for(process, "step 6 ")
    process.terminate()
    out = finished(process)
    step = load_checkpoint(folder / "ckpts/last.pt", "ldm")["step"]
    assert 5 < step < 12 and out.count(f"stopped (SIGTERM) at step {step}, ") == 1
    out, _ = run("train_ldm.py", *args, processes=2)
    assert re.search(rf"continues at step\s+{step}\n", out)
    assert_same_run(tmp_path / "runs/whole", folder, "ldm")


@pytest.mark.slow
def test_three_processes_in_two_parts_end_like_three_in_one(command, together, tmp_path):
    """The sum of three gradients depends on their order, which a resume must not change."""
    def three(*argv):
        results = together([("train_ldm.py", *argv)] * 3, ranks=True)
        assert [r.code for r in results] == [0, 0, 0], results[0].err
    three(*command("train_ldm", "whole", "--batch_per_device=2"))
    # An epoch has three steps: both runs have a log line and an evaluation there.
    for steps in (6, 12):
        three(*command("train_ldm", "parts", "--batch_per_device=2"), f"--max_steps={steps}")
    assert_same_run(tmp_path / "runs/whole", tmp_path / "runs/parts", "ldm")


LEAVE = """
path = sys.argv.pop(1)
def report(*args):
    import gc, torch
    held = sum(isinstance(o, torch.nn.parallel.DistributedDataParallel) for o in gc.get_objects())
    pathlib.Path(path + os.environ["RANK"]).write_text(str(held))
before("torch.distributed.destroy_process_group", report)
"""


def test_nothing_holds_the_process_group_at_its_end(command, tmp_path):
    """Else some runs of several processes would never end: lib.dist.leave_group."""
    script = hooked(tmp_path, "train_vae", LEAVE)
    run(script, tmp_path / "held_", *command("train_vae", "run", "--batch_per_device=4"),
        processes=2, timeout=90)
    assert [(tmp_path / f"held_{rank}").read_text() for rank in (0, 1)] == ["0", "0"]


@pytest.mark.parametrize("stage", ["train_ldm", pytest.param("train_vae", marks=pytest.mark.slow)])
def test_processes_that_share_a_batch_do_what_one_does(command, together, tmp_path, stage):
    """The same images in the same order with the same noise: what differs is rounding."""
    def train(name, processes, *more):
        argv = [f"{stage}.py", *command(stage, name, f"--batch_per_device={8 // processes}",
                                        "--dtype=fp32", *more)]
        results = together([argv] * processes, ranks=processes > 1)
        assert [r.code for r in results] == [0] * processes, results[0].err
        return results[0].out

    train("start", 1, "--max_steps=1")
    for name, processes in (("one", 1), ("two", 2), ("four", 4)):
        train(name, processes, "--max_steps=6")
    train("mixed", 4, "--max_steps=3")
    train("mixed", 1, "--max_steps=6")
    train("other", 1, "--max_steps=6", "--seed=1")

    def weights(name):
        state = load_checkpoint(tmp_path / "runs" / name / "ckpts/last.pt", stage[-3:])
        return torch.cat([v.flatten() for v in state["model"].values()])
    start, one, other = map(weights, ("start", "one", "other"))
    way = (one - start).norm()
    for name in ("two", "four", "mixed"):
        assert (weights(name) - one).norm() < 0.02 * way, name
        logs = [read_jsonl(tmp_path / f"runs/{n}/metrics.jsonl") for n in ("one", name)]
        for metric in ("train/loss", "val/loss", "val/train_loss", "copies/share"):
            alone, shared = ([r[metric] for r in log if metric in r] for log in logs)
            assert shared == pytest.approx(alone, rel=1e-3), (name, metric)
    assert (other - one).norm() > way  # what another seed would make of it


def test_ranks_end_when_torchrun_was_killed(command, tmp_path):
    """Else they would train on beside the next start."""
    argv = ["train_ldm.py", *command("train_ldm", "orphans", "--batch_per_device=4"),
            "--max_steps=100000", "--sample_every=100000"]
    process = start(*argv, processes=2)
    wait_for(process, "step 3 ")
    ranks = workers(process)
    process.kill()
    deadline = time.monotonic() + LIMIT_S
    while any(map(is_alive, ranks)):
        assert time.monotonic() < deadline, "they train on"
        time.sleep(0.1)
    out = "".join(process.communicate())
    step = load_checkpoint(tmp_path / "runs/orphans/ckpts/last.pt", "ldm")["step"]
    assert step >= 3 and f"stopped (SIGTERM) at step {step}, " in out


# Poisons the latents of rank 1 at steps 2, 3 and from 7 on, and writes a line for each step: a
# digest of all weights and optimiser states after it, and whether they are finite.
POISON = """
rank = os.environ["RANK"]
log = open(sys.argv.pop(1) + rank, "w", buffering=1)
now = []
import model, torch
from lib import dist
before("lib.dist.BatchOrder.indices", lambda call, order, step: now.append(step))
original = model.Posterior.sample
def sample(self, noise):
    z = original(self, noise)
    bad = now and rank == "1" and (now[-1] in (2, 3) or now[-1] >= 7)
    return z * float("nan") if bad else z
model.Posterior.sample = sample
step = dist.clip_and_step
def spy(module, optimizer, clip):
    result = step(module, optimizer, clip)
    moments = optimizer.state_dict()["state"].values()
    tensors = [*module.state_dict().values(), *(v for m in moments for v in m.values())]
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
    finite = all(t.isfinite().all() for t in tensors)
    print(now[-1], type(module).__name__, digest, finite, result[1].item(), file=log)
    return result
dist.clip_and_step = spy
"""


@pytest.mark.parametrize("stage", ["train_ldm", "train_vae"])
def test_a_nan_on_one_rank_is_skipped_by_both(command, together, tmp_path, stage):
    script = hooked(tmp_path, stage, POISON)
    args = command(stage, "bad", "--batch_per_device=4", "--save_minutes=0", "--log_every=1",
                   "--max_bad_steps=4", "--max_steps=20", "--sample_every=100",
                   *(["--disc_start=1"] if stage == "train_vae" else []))
    results = together([(script, tmp_path / "steps_", *args)] * 2, ranks=True)
    assert [r.code for r in results] == [EXIT_FAILED] * 2, results[0].err + results[1].err
    assert results[1].err == ""  # one process speaks
    assert "--max_bad_steps" in results[0].err and "--resume_dir" in results[0].err

    logs = [(tmp_path / f"steps_{rank}").read_text() for rank in (0, 1)]
    one, two = ([line.split() for line in log.splitlines()] for log in logs)
    assert one == two
    assert all(finite == "True" for *_, finite, _ in one)
    for module in {name for _, name, *_ in one}:
        steps = [(int(step), digest, float(bad))
                 for step, name, digest, _, bad in one if name == module]
        assert [step for step, _, bad in steps if bad] == [2, 3, 7, 8, 9, 10]
        assert steps[-1][0] == 10
        for (_, old, _), (_, new, bad) in itertools.pairwise(steps):
            assert (old == new) == bool(bad)  # a bad step changes nothing, a good one does

    folder = tmp_path / "runs/bad"
    state = load_checkpoint(folder / "ckpts/last.pt", stage[-3:])
    assert (state["step"], state["bad_steps"].item()) == (10, 3)  # of the step before the last
    assert strict(folder / "summary.json")["diverged"] is True
    records = read_jsonl(folder / "metrics.jsonl")
    null = [r["step"] for r in records if "train/loss" in r and r["train/loss"] is None]
    assert null == [3, 4, 8, 9, 10, 11] == [r["step"] for r in records if r.get("train/bad_steps")]
