"""The second run: what is there already, what has changed since, and commands typed elsewhere."""
import json
import re
import shlex
import shutil
import signal

import pytest
import torch
from conftest import only_error, start, strict, tree_hashes

from lib import run
from lib.files import EXIT_FAILED, EXIT_STOPPED


# --- settings that end before the checkpoint ---


def test_settings_that_end_before_the_checkpoint_change_nothing(workspace, quick):
    before = tree_hashes(workspace.out)
    for script, name, more, steps in (("train_ldm.py", "l", "--max_steps=4", 20),
                                      ("train_vae.py", "v", "--epochs=1", 100)):
        line = only_error(quick(script, f"--resume_dir={workspace.out / name}", more))
        assert f"has done {steps} steps" in line
    assert tree_hashes(workspace.out) == before


# --- whose folder is it ---


def test_unnamed_runs_of_one_second_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr(run.time, "strftime", lambda *_: "20260101-000000")
    assert len({run.new_folder(tmp_path, "ldm") for _ in range(3)}) == 3


def test_a_folder_is_refused_while_its_process_lives(workspace, quick):
    argv = workspace.ldm("x", "--max_steps=100000", "--sample_every=100000", "--log_every=1")
    process = start(*argv)
    try:
        for line in process.stdout:
            if line.startswith("step 2 "):
                break
        process.send_signal(signal.SIGSTOP)  # it holds the folder, and does nothing else
        result = quick(*argv)
        assert result.code == EXIT_STOPPED  # to be tried again
        assert f"in use by process {process.pid} on " in only_error(result)
    finally:
        process.kill()  # it cannot tidy up
        process.communicate()
    assert (workspace.out / "x/lock").exists()
    result = quick(*argv, "--max_steps=3")
    assert result.code == 0, result.err


# --- damaged files ---


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-60])


def spoil(path):
    path.write_bytes(path.read_bytes()[:-60] + bytes(30) + b"\xff{\n")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def drop_a_key(path):
    state = torch.load(path, weights_only=True)
    del state["trained_classes"]
    torch.save(state, path)


DAMAGE = [  # file of a run, what happens to it, what the one line says
    ("run_meta.json", remove, "run_meta.json"),
    ("run_meta.json", lambda path: path.write_bytes(b"{}"), "run_meta.json"),
    ("ckpts/last.pt", remove, "no checkpoint at"),
    ("ckpts/last.pt", cut, "is damaged"),
    ("ckpts/last.pt", flip_a_bit, "is damaged"),
    ("ckpts/last.pt", drop_a_key, "trained_classes"),
]


@pytest.mark.parametrize("name, damage, says", DAMAGE)
def test_a_damaged_run_is_refused_and_left_alone(workspace, quick, name, damage, says):
    folder = workspace.out / "l"
    damage(folder / name)
    before = tree_hashes(folder / "ckpts")
    result = quick("train_ldm.py", "--run_name=l", *workspace.common, "--max_steps=24")
    assert result.code == EXIT_FAILED, result.out
    line = only_error(result)
    assert says in line and str(folder / name) in line
    assert tree_hashes(folder / "ckpts") == before


@pytest.mark.parametrize("damage", [cut, remove, spoil])
def test_a_damaged_log_keeps_its_whole_lines(workspace, quick, damage):
    """After a power cut the checkpoint may be on the disk and the end of metrics.jsonl not."""
    log = workspace.out / "l/metrics.jsonl"
    whole = log.read_bytes().splitlines()
    damage(log)
    damaged = log.read_bytes().splitlines() if log.exists() else []
    result = quick(*workspace.ldm("l", "--max_steps=24"))
    assert result.code == 0, result.err
    lines = log.read_bytes().splitlines()
    kept = [line for line in whole[:-1] if line in damaged]  # the last evaluation is done again
    assert lines[:len(kept)] == kept
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps) and steps[-1] == 24


# --- data that changed ---


@pytest.mark.parametrize("script, name", [("train_ldm.py", "l"), ("train_vae.py", "v")])
def test_data_that_changed_between_two_starts_are_said(workspace, quick, script, name, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(workspace.data, root)
    argv = [script, f"--resume_dir={workspace.out / name}", f"--data_root={root}"]
    unchanged = quick(*argv)
    assert unchanged.code == 0 and "last started" not in unchanged.out, unchanged.err
    (root / "TB/train/tb/00003.png").unlink()
    changed = quick(*argv, "--epochs=1000")
    assert changed.code == 0, changed.err
    line, = (line for line in changed.out.splitlines() if "last started" in line)
    assert "tb 8, now normal 8, tb 7" in line
    best = strict(workspace.out / name / "summary.json").get("best")
    (root / "TB/val/tb/00001.png").unlink()
    changed = quick(*argv, "--epochs=1000")
    assert changed.code == 0, changed.err
    if best:  # the old lowest loss is of other images
        assert "the validation images have changed" in changed.out
        assert strict(workspace.out / name / "summary.json")["best"]["loss"] != best["loss"]


def test_a_continued_run_keeps_its_scale(workspace, quick, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(workspace.data, root)
    before = run.load_checkpoint(workspace.ldm_ckpt, "ldm")["latent_scale_factor"]
    for i in range(5):
        (root / f"TB/train/tb/{i:05d}.png").unlink()
    other = quick(*workspace.ldm("y", f"--data_root={root}", "--max_steps=1"))
    assert other.code == 0, other.err
    assert quick("find_latent_scale.py", *workspace.common, f"--data_root={root}",
                 f"--ae_ckpt_path={workspace.vae_ckpt}").code == 0
    assert strict(workspace.out / "v/latent_scale.json")["latent_scale_factor"] != before
    resumed = quick(*workspace.ldm("l", f"--data_root={root}", "--max_steps=21"))
    assert resumed.code == 0, resumed.err
    state = run.load_checkpoint(workspace.ldm_ckpt, "ldm")
    assert state["step"] == 21 and state["latent_scale_factor"] == before


def test_a_model_of_real_images_is_not_measured_on_phantoms(workspace, quick):
    before = strict(workspace.out / "v/latent_scale.json")["latent_scale_factor"]
    few = ["--num_samples=3", "--num_sampling_steps=2", "--classifier_steps=2"]
    for argv in (["find_latent_scale.py", f"--ae_ckpt_path={workspace.vae_ckpt}"],
                 ["evaluate.py", f"--ckpt={workspace.ldm_ckpt}", *few]):
        result = quick(*argv, f"--output_root={workspace.out}")
        assert result.code == 0 and f", {workspace.data}" in result.out
    assert strict(workspace.out / "v/latent_scale.json")["latent_scale_factor"] == before


# --- which autoencoder ---


def test_the_newest_finished_autoencoder_is_used(workspace, quick):
    runs = workspace.out
    meta = strict(runs / "v/run_meta.json")
    for name, date in (("newer", "2026-01-02T11:00:00+0000"), ("unfinished", "2027")):
        shutil.copytree(runs / "v", runs / name)
        (runs / name / "run_meta.json").write_text(json.dumps({**meta, "created": date}))
    (runs / "v/run_meta.json").write_text(json.dumps({**meta, "created": "2026-01-01"}))
    (runs / "unfinished/summary.json").unlink()
    (runs / "broken").mkdir()
    (runs / "broken/run_meta.json").write_text("")
    check = ["find_latent_scale.py", *workspace.common, "--check"]
    result = quick(*check)
    assert result.code == 0, result.err
    assert f"autoencoder: {runs / 'newer'}, the newest of 2 finished runs" in result.out
    for name in ("v", "newer"):
        (runs / name / "summary.json").unlink()
    assert "no finished autoencoder" in only_error(quick(*check))


# --- typed elsewhere ---


def test_commands_are_printed_so_that_they_can_be_pasted(workspace, quick):
    root = workspace.root / "my files"
    root.mkdir()
    shutil.copytree(workspace.data, root / "data")
    argv = ["train_vae.py", f"--data_root={root / 'data'}", f"--output_root={root / 'runs'}",
            f"--config={workspace.vae_config}", "--run_name=ae 1", "--max_steps=1"]
    out = quick(*argv).out
    few = "--num_sampling_steps=2"
    for more in ([], ["--max_steps=1", f"--config={workspace.ldm_config}", "--run_name=l 1", few],
                 ["--num_samples=1", few]):
        command = re.search("^next: python (.*)$", out, re.M).group(1)
        result = quick(*shlex.split(command), *more, cwd=workspace.root)
        assert result.code == 0, result.err
        out = result.out
    assert (root / "runs/l 1/samples_ancestral_2_guidance1_seed0/grid.png").exists()


@pytest.mark.parametrize("kind", ["vae", "ldm"])
def test_a_new_weight_decay_is_used_on_resume(workspace, quick, kind):
    name, step = {"vae": ("v", 101), "ldm": ("l", 21)}[kind]
    result = quick(f"train_{kind}.py", f"--resume_dir={workspace.out / name}",
                   f"--max_steps={step}", "--weight_decay=0.2")
    assert result.code == 0, result.err
    state = torch.load(workspace.out / f"{name}/ckpts/last.pt", weights_only=True)
    for name in ("optimizer",) if kind == "ldm" else ("vae_optimizer", "disc_optimizer"):
        assert [g["weight_decay"] for g in state[name]["param_groups"]] == [0.2]


def test_a_reader_that_goes_does_not_end_training(workspace):
    """`python train_ldm.py | head`, or `| tee log` at Ctrl-C."""
    process = start(*workspace.ldm("x", "--max_steps=6", "--log_every=1", "--sample_every=1000"))
    for line in process.stdout:
        if line.startswith("step 2 "):
            break
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 0, err
    assert strict(workspace.out / "x/summary.json")["step"] == 6


def test_latents_of_another_size_are_noticed_before_training(workspace, quick):
    path = workspace.out / "v/latent_scale.json"
    scale = strict(path)
    path.write_text(json.dumps({**scale, "latent_scale_factor": 3 * scale["latent_scale_factor"]}))
    result = quick(*workspace.ldm("x", "--max_steps=1"))
    assert result.code == 0 and "standard deviation of 3.0" in result.out, result.out
