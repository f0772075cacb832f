"""Batch order, optimiser step, files, checkpoints, signals: lib/dist.py, files.py, run.py."""
import copy
import io
import math
import os
import shutil
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, error_of, strict
from PIL import Image

import data
import train_ldm
from lib import dist, run
from lib.files import EXIT_STOPPED, write_atomic

ALONE = dist.DistContext(0, 1, torch.device("cpu"), torch.float32, "")


# --- batch order and random numbers ---


@pytest.mark.parametrize("count, batch, world", [
    (16, 4, 1), (10, 4, 1), (3, 8, 1), (1, 1, 1), (10, 3, 2), (5, 4, 3)])
def test_an_epoch_is_a_shuffle_filled_up_from_its_start(count, batch, world):
    steps = dist.BatchOrder(count, batch, 7, 0, world).epoch_steps
    assert steps == -(-count // (batch * world)) and steps > 0
    epochs = []
    for epoch in range(3):
        drawn = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            parts = [dist.BatchOrder(count, batch, 7, rank, world).indices(step)
                     for rank in range(world)]
            assert all(e == epoch and len(i) == batch for i, e in parts)
            drawn += [i for part, _ in parts for i in part.tolist()]
        assert sorted(drawn[:count]) == list(range(count))
        assert all(drawn[i] == drawn[i - count] for i in range(count, len(drawn)))
        epochs.append(tuple(drawn[:count]))
    other_seed = dist.BatchOrder(count, count, 8).indices(0)[0]
    assert count < 10 or len({*epochs, tuple(other_seed)}) == 4


def test_a_generator_is_a_function_of_its_key_alone():
    def draw(*key):
        return tuple(torch.randn(4, generator=ALONE.generator(*key)).tolist())
    first = draw(0, "ldm", 3, 1)
    assert draw(0, "ldm", 3, 1) == first
    keys = [(0, "ldm", 3, 0), (0, "ldm", 4, 1), (1, "ldm", 3, 1), (0, "vae", 3, 1),
            (0, "ldm", 31), (0, "ldm", 3, "1")]
    assert len({first, *(draw(*k) for k in keys)}) == 7


# --- optimiser step ---


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_bad_gradient_changes_neither_weights_nor_optimiser(poison, clip):
    module = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(module.parameters(), 0.1, weight_decay=0.01, fused=True)

    def after(*gradient):
        """(Was it bad?, weights and moments after the step)"""
        module.weight.grad = torch.tensor([gradient])
        _, bad = dist.clip_and_step(module, optimizer, clip)
        assert module.weight.grad is None
        state = [module.weight.detach(), *optimizer.state[module.weight].values()]
        return bad.item(), torch.cat([v.flatten() for v in state])

    after(0.5, -0.25)
    good, before = after(0.5, -0.25)
    bad, same = after(poison, 1.0)
    assert (good, bad) == (0, 1) and torch.equal(before, same)
    good, later = after(0.5, -0.25)
    assert good == 0 and not torch.equal(before, later)
    assert optimizer.state[module.weight]["step"].item() == 3


@pytest.mark.parametrize("clip", [0.5, 0.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_in_any_layout_is_that_of_the_reference(layout, clip):
    torch.manual_seed(0)
    module = torch.nn.Conv2d(6, 5, 3).to(memory_format=layout)
    other = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.AdamW(module.parameters(), 0.1, weight_decay=0.01, fused=True)
    plain = torch.optim.AdamW(other.parameters(), 0.1, weight_decay=0.01, foreach=False)
    for _ in range(3):
        x = torch.randn(2, 6, 7, 7)
        for net in (module, other):
            net(x).square().sum().backward()
        norm, bad = dist.clip_and_step(module, optimizer, clip)
        expected = torch.nn.utils.clip_grad_norm_(other.parameters(), clip or math.inf)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-4) and bad.item() == 0
        plain.step()
        plain.zero_grad()
    assert torch.allclose(module.weight, other.weight, atol=1e-5)


def test_an_optimiser_goes_on_in_another_layout():
    # A checkpoint of a GPU is in channels_last; the fused step on a CPU mixed up its moments.
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 9)
    module = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), 0.1, fused=True)
    module(x).square().mean().backward()
    dist.clip_and_step(module, optimizer, 0.0)
    weights = []
    for layout in (torch.channels_last, torch.contiguous_format):
        other = copy.deepcopy(module).to(memory_format=layout)
        resumed = torch.optim.AdamW(other.parameters(), 0.1, fused=True)
        dist.load_optimizer(resumed, copy.deepcopy(optimizer.state_dict()))
        other(x).square().mean().backward()
        dist.clip_and_step(other, resumed, 0.0)
        weights.append(other.weight)
    assert torch.allclose(*weights, atol=1e-5)


def test_running_means_leave_skipped_steps_out_and_count_them():
    means = dist.RunningMeans(ALONE, ("a", "b"))
    good, bad = torch.tensor(0.0), torch.tensor(1.0)
    for a, b, what in ((1.0, 10.0, good), (math.nan, 99.0, bad), (3.0, 20.0, good)):
        means.add((torch.tensor(a), torch.tensor(b)), what)
    assert means.read() == {"a": 2.0, "b": 15.0, "train/bad_steps": 1.0}
    means.add((torch.tensor(5.0), torch.tensor(6.0)), good)
    assert means.read() == {"a": 5.0, "b": 6.0, "train/bad_steps": 0.0}  # it starts anew
    means.add((torch.tensor(5.0), torch.tensor(6.0)), bad)
    values = means.read()
    assert values.pop("train/bad_steps") == 1.0 and all(math.isnan(v) for v in values.values())


# --- files and checkpoints ---


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("disk")])
def test_a_failed_write_keeps_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def write(f):
        f.write(b"half of the new")
        raise error
    with pytest.raises(SystemExit) as e:
        write_atomic(path, write)
    assert "last.pt" in str(e.value) and len(str(e.value).splitlines()) == 1
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["last.pt"]
    write_atomic(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["last.pt"]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("content", [
    b"", b"import os\n" * 50, pickle.dumps(Bomb()), saved({"kind": "vae", "x": Bomb()}),
    saved(torch.ones(3)), saved({"kind": 3, "args": {}}), saved({"kind": "vae", "args": {}})])
def test_what_is_no_checkpoint_is_refused_and_not_run(capsys, tmp_path, monkeypatch, content):
    """test_second_run.py has damaged ones, and those of another program."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last.pt").write_bytes(content)
    message = error_of(capsys, run.load_checkpoint, tmp_path / "last.pt", "vae")
    assert message.startswith("error: ") and "last.pt" in message
    assert not (tmp_path / "exploded").exists()


def test_weights_of_another_architecture_are_one_line(capsys):
    def build(settings):
        return torch.nn.Linear(settings["in"], 2)

    weights, settings = torch.nn.Linear(3, 2).state_dict(), {"in": 3}
    assert run.load_network(build, settings, weights, "a.pt").in_features == 3
    for bad in ({"in": 2}, {"in": 10**12}, {"in": "3"}, {"in": []}):
        message = error_of(capsys, run.load_network, build, settings | bad, weights, "a.pt")
        assert message.startswith("error: a.pt does not fit"), bad
    assert "a.pt" in error_of(capsys, run.load_network, build, {}, weights, "a.pt")


@pytest.fixture
def a_run(tmp_path):
    """A new Run at step 0."""
    args = train_ldm.parse_args([f"--output_root={tmp_path}", "--run_name=a", "--no-wandb"])
    made = run.Run(args, ALONE, "ldm", "x", {})
    made.start({"step": 0, "args": {}}, 10, train_ldm.build_parser(), {})
    return made


def test_a_run_that_was_made_meanwhile_is_not_overwritten(tmp_path, capsys):
    args = train_ldm.parse_args([f"--output_root={tmp_path}", "--run_name=a"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metrics.jsonl").touch()  # by another process, since the flags were read
    says = error_of(capsys, run.Run, args, ALONE, "ldm", "x", {}, code=EXIT_STOPPED)
    assert "type the same command again" in says


def test_non_finite_numbers_are_null_in_json_files(a_run):
    a_run.log(1, 0, {"train/loss": math.nan, "train/lr": 1.0})
    assert math.isnan(a_run.history("train/loss")[0]) and a_run.history("train/lr") == [1.0]
    a_run.finish(1, {"train/loss": math.nan}, [], a_run.last_path, False, "sample.py")
    for name in ("metrics.jsonl", "summary.json"):
        assert strict(a_run.folder / name)["train/loss"] is None


def test_a_checkpoint_holds_the_weights_of_its_step(a_run):
    weights = torch.ones(3)
    a_run.save({"step": 1, "model": weights})
    weights += 1
    a_run.save({"step": 1, "model": weights})  # the same step: the file stays as it is
    assert torch.load(a_run.last_path, weights_only=True)["model"].tolist() == [1, 1, 1]
    a_run.save({"step": 2, "model": weights})
    assert torch.load(a_run.last_path, weights_only=True)["model"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("change", ["moved", "removed", "made anew"])
def test_nothing_is_written_once_the_folder_is_gone(a_run, change):
    other = a_run.folder.with_name("b")
    a_run.folder.rename(other)
    if change == "removed":
        shutil.rmtree(other)
    if change == "made anew":
        a_run.folder.mkdir()
        (a_run.folder / "lock").touch()
    for write in (lambda: a_run.log(1, 0, {}), lambda: a_run.save({"step": 1})):
        with pytest.raises(SystemExit, match="moved or removed"):
            write()


@pytest.mark.parametrize("values", [
    (-1.0, -1.0), (1.0, 1.0), (-2.0, -1.0), (5.0, 1.0), (0.0, 1 / 255)])
def test_pictures_are_saved_without_rescaling(tmp_path, values):
    x, expected = values
    run.save_image(tmp_path / "x.png", torch.full((1, 6, 6), x))
    back = data.read_image(tmp_path / "x.png")[0]
    assert back.shape == (1, 6, 6)
    assert torch.allclose(back, torch.full_like(back, expected), atol=1e-6)


def test_a_grid_holds_every_picture_at_its_place(tmp_path):
    rows = [torch.stack([torch.full((1, 8, 8), v) for v in row]) for row in ((-1.0, 1.0), (0.0,))]
    run.save_grid(tmp_path / "g.png", rows, ["one", "two"])
    with Image.open(tmp_path / "g.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (2 * 24, 22)
    assert (sheet[14:22, 2:10] == 0).all()
    assert (sheet[14:22, 12:20] == 255).all()
    assert (sheet[38:46, 2:10] == 128).all()


# --- signals and console ---

SIGNALLED = """
import os, signal
from lib import dist
for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
    stop = dist.StopSignal()
    assert stop.name is None
    os.kill(os.getpid(), getattr(signal, name))
    assert stop.name == name
print("it goes on", flush=True)
os.kill(os.getpid(), signal.SIGINT)
print("never")
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_signals_ask_to_stop_and_a_second_interrupt_ends(monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    out = subprocess.run([sys.executable, "-c", SIGNALLED], cwd=ROOT, capture_output=True,
                         text=True, check=False)
    assert (out.returncode, out.stdout) == (-signal.SIGINT, "it goes on\n"), out.stderr
    assert out.stderr == ("" if rank else
                          "\nsaving after this step; Ctrl-C again ends without saving\n")


def test_a_progress_line_estimates_the_time_without_the_first_step(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: clock[0])
    progress = run.Progress("step", 1000)
    for seconds, done in ((90.0, 101), (4.0, 103), (27.0, 111)):  # the first compiles
        clock[0] += seconds
        progress.update(done)
    assert capsys.readouterr().out.splitlines() == [
        "step 103/1000 (10%) 0:29:54 left", "step 111/1000 (11%) 0:45:55 left"]
