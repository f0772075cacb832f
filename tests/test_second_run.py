"""The second run: what is there already, what has changed since, and commands typed elsewhere."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import error_of, start, tree_hashes

import experiment
import train_ldm
import train_vae


def only_error(result):
    assert "Traceback" not in result.err, result.err
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    return lines[0]


@pytest.fixture
def ldm(workspace):
    """ldm(NAME or None, ...): argv of a short run of train_ldm.py; None: without a name."""
    def argv(name, *more):
        named = [f"--run_name={name}"] if name else []
        return ["train_ldm.py", *workspace.common, f"--config={workspace.ldm_config}",
                f"--ae_ckpt_path={workspace.vae_ckpt}", "--num_sampling_steps=2",
                "--sample_batch_size=2", *named, *more]
    return argv


# --- settings that end before the checkpoint ---


@pytest.mark.parametrize("more", [["--batch_per_device=16"], ["--max_steps=4"], ["--epochs=1"]])
def test_settings_that_end_before_the_checkpoint_change_nothing(workspace, quick, ldm, more):
    assert quick(*ldm("x", "--epochs=4")).code == 0
    before = tree_hashes(workspace.out / "x")
    result = quick(*ldm("x", *more))
    assert result.code == experiment.EXIT_FAILED and "has done 8 steps" in only_error(result)
    assert tree_hashes(workspace.out / "x") == before
    result = quick("train_vae.py", f"--resume_dir={workspace.out / 'v'}", "--max_steps=10")
    assert result.code == experiment.EXIT_FAILED and "has done 100 steps" in only_error(result)


# --- whose folder is it ---


def test_two_unnamed_runs_of_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment.time, "strftime", lambda *_: "20260101-000000")
    args = train_ldm.parse_args([f"--output_root={tmp_path}"])
    names = [os.path.basename(experiment.new_folder(args, "ldm")) for _ in range(3)]
    assert names == ["ldm_20260101-000000", "ldm_20260101-000000_2", "ldm_20260101-000000_3"]


def test_a_folder_in_use_is_refused_while_its_process_lives_and_only_then(workspace, quick, ldm):
    folder = workspace.out / "x"
    script, *argv = ldm("x", "--max_steps=100000", "--sample_every=100000", "--log_every=1")
    process = start(script, *argv)
    try:
        for line in process.stdout:
            if line.startswith("step 2 "):
                break
        process.send_signal(signal.SIGSTOP)  # it holds the folder, and does nothing else
        result = quick(script, *argv)
        message = only_error(result)
        assert result.code == experiment.EXIT_STOPPED  # to be tried again
        assert f"in use by process {process.pid} on " in message
        result = quick("train_ldm.py", f"--resume_dir={folder}", "--max_steps=3")
        assert result.code == experiment.EXIT_STOPPED and "in use by" in only_error(result)
    finally:
        process.kill()  # it cannot tidy up
        process.communicate()
    assert (folder / "lock").exists()
    result = quick(script, *argv, "--max_steps=3")
    assert result.code == 0, result.err


HOLD = """
import fcntl, sys, time
lock = open(sys.argv[1], "a+")
fcntl.lockf(lock, fcntl.LOCK_EX)
lock.write(sys.argv[2])
lock.flush()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path, as one on another machine would."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "lock",
                                "process 7 on node9"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_an_owner_on_another_machine_is_waited_for(holder, tmp_path, monkeypatch, capsys):
    """A node that died gives its lock back only after a while."""
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 5:
            holder.kill()
            holder.wait()
    monkeypatch.setattr(experiment.time, "sleep", sleep)
    lock = experiment.take_lock(tmp_path / "lock", tmp_path)
    lock.close()
    assert len(waited) == 5 and "process 7 on node9" in capsys.readouterr().out


def test_an_owner_on_another_machine_is_not_waited_for_for_ever(holder, tmp_path, monkeypatch,
                                                                capsys):
    waited = []
    monkeypatch.setattr(experiment.time, "sleep", waited.append)
    line = error_of(capsys, experiment.take_lock, tmp_path / "lock", tmp_path,
                    code=experiment.EXIT_STOPPED)
    assert "in use by process 7 on node9" in line  # to be tried again
    assert sum(waited) == 120


@pytest.mark.parametrize("content", [None, b"", bytes(300), b"{}"])
def test_a_run_without_its_description_goes_on_from_its_checkpoint(
        workspace, quick, ldm, content):
    """It must not begin anew, over its own weights."""
    assert quick(*ldm("x", "--max_steps=4")).code == 0
    description = workspace.out / "x/run_meta.json"
    before = experiment.read_meta(description.parent)
    description.unlink()
    if content is not None:
        description.write_bytes(content)
    script, *argv = ldm("x", "--max_steps=6")
    result = quick(script, *argv)
    assert result.code == 0 and "run_meta.json is gone or damaged" in result.out, result.err
    assert "continues at step     4" in result.out
    after = experiment.read_meta(description.parent)
    assert after["args"] == before["args"] | {"max_steps": 6, "resume_dir": str(description.parent)}
    (workspace.out / "x/ckpts/last.pt").unlink()
    if content is not None:
        description.write_bytes(content)
        result = quick(script, *argv)
        assert result.code == experiment.EXIT_FAILED
        assert "no ckpts/last.pt to read the settings from" in only_error(result)


def counted_by(folder):
    """Bytes of metrics.jsonl that the checkpoint of a run counts: all but the last evaluation."""
    return experiment.load_checkpoint(folder / "ckpts/last.pt", "ldm")["metrics_bytes"]


def cut(text):
    return text[:-60]


def zeroed(text):
    return text[:-60] + bytes(60)


def torn(text):
    return text[:-60] + b"\xff\xfe" + text[-58:-1] + b"{"


@pytest.mark.parametrize("damage", [cut, zeroed, torn, lambda text: b"", lambda text: None])
def test_a_power_cut_that_took_the_end_of_the_log_does_not_end_the_run(
        workspace, quick, ldm, damage):
    """The checkpoint was on the disk, the lines of metrics.jsonl that it counts were not."""
    log = workspace.out / "x/metrics.jsonl"
    assert quick(*ldm("x", "--max_steps=8")).code == 0
    whole = log.read_bytes()[:counted_by(workspace.out / "x")]
    damaged = damage(whole)
    log.unlink()
    if damaged is not None:
        log.write_bytes(damaged)
    result = quick(*ldm("x", "--max_steps=12"))
    assert result.code == 0, result.err
    assert "cut back to its last whole line" in result.out
    assert "continues at step     8" in result.out
    lines = log.read_bytes().splitlines(keepends=True)
    kept = [line for line in whole.splitlines(keepends=True) if line in lines]
    assert lines[:len(kept)] == kept
    assert len(kept) == (len(whole.splitlines()) - 1 if damaged else 0)
    steps = [json.loads(line)["step"] for line in lines[len(kept):]]
    assert min(steps) > 8 and max(steps) == 12
    assert quick(*ldm("x", "--max_steps=12")).out.count("cut back") == 0


def test_an_unreadable_line_of_the_log_is_passed_over(workspace, quick, ldm):
    log = workspace.out / "x/metrics.jsonl"
    assert quick(*ldm("x", "--max_steps=8")).code == 0
    lines = log.read_bytes()[:counted_by(log.parent)].splitlines(keepends=True)
    lines[0] = bytes(len(lines[0]) - 1) + b"\n"
    log.write_bytes(b"".join(lines))
    result = quick(*ldm("x", "--max_steps=12"))
    assert result.code == 0, result.err
    assert log.read_bytes().startswith(b"".join(lines)) and "cut back" not in result.out


@pytest.mark.parametrize("name, says", [
    ("metrics.jsonl", "Is a directory"), ("ckpts/last.pt", "last.pt, which is a folder"),
    ("lock", "Is a directory"), ("samples", "samples")])
def test_a_folder_where_a_file_belongs_is_one_line(workspace, quick, ldm, name, says):
    assert quick(*ldm("x", "--max_steps=4")).code == 0
    path = workspace.out / "x" / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("")  # and the other way round
    else:
        path.unlink()
        path.mkdir()
    result = quick(*ldm("x", "--max_steps=8"))
    assert result.code == experiment.EXIT_FAILED and says in only_error(result)
    assert str(path) in only_error(result)


# --- data that changed ---


@pytest.mark.parametrize("script", ["train_ldm.py", "train_vae.py"])
def test_data_that_changed_between_two_starts_are_said(workspace, quick, ldm, script, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(workspace.data, root)
    if script == "train_ldm.py":
        argv = ldm("x", f"--data_root={root}")
    else:
        argv = [script, *workspace.common, f"--config={workspace.vae_config}", "--run_name=x",
                f"--data_root={root}"]
    assert quick(*argv, "--max_steps=1").code == 0
    unchanged = quick(*argv, "--max_steps=2")
    assert unchanged.code == 0 and "last started" not in unchanged.out
    (root / "TB/train/tb/00003.png").unlink()
    train = root / "TB/train"
    (train / "normal").rename(train / "x")
    (train / "tb").rename(train / "normal")
    (train / "x").rename(train / "tb")
    changed = quick(*argv, "--max_steps=3")
    assert changed.code == 0, changed.err
    line, = (line for line in changed.out.splitlines() if "last started" in line)
    assert "class normal has 7 images, it had 8" in line
    assert "class tb now holds the images that were normal" in line
    assert "last started" not in quick(*argv, "--max_steps=4").out


def test_a_scale_of_other_images_is_said_and_a_resumed_run_keeps_its_own(workspace, quick, ldm,
                                                                         tmp_path):
    root = tmp_path / "data"
    shutil.copytree(workspace.data, root)
    scale = ["find_latent_scale.py", *workspace.common, f"--data_root={root}",
             f"--ae_ckpt_path={workspace.vae_ckpt}"]
    assert quick(*scale).code == 0
    argv = ldm("x", f"--data_root={root}")
    first = quick(*argv, "--max_steps=1")
    assert first.code == 0 and "have changed" not in first.out, first.err
    for i in range(5):
        (root / f"TB/train/tb/{i:05d}.png").unlink()
    changed = quick(*ldm("y", f"--data_root={root}", "--max_steps=1"))
    assert changed.code == 0 and "class tb has 3 images, it had 8" in changed.out
    assert quick(*scale).code == 0
    resumed = quick(*argv, "--max_steps=2")
    assert resumed.code == 0, resumed.err
    states = [torch.load(workspace.out / f"{name}/ckpts/last.pt", weights_only=True)
              for name in ("x", "y")]
    assert states[0]["latent_scale_factor"] == states[1]["latent_scale_factor"]  # the first one


def test_without_a_data_root_a_model_of_real_images_is_not_measured_on_phantoms(workspace, quick):
    before = json.loads((workspace.out / "v/latent_scale.json").read_text())
    result = quick("find_latent_scale.py", f"--output_root={workspace.out}",
                   f"--ae_ckpt_path={workspace.vae_ckpt}")
    assert result.code == 0 and f"using that of the autoencoder, {workspace.data}" in result.out
    after = json.loads((workspace.out / "v/latent_scale.json").read_text())
    assert after["latent_scale_factor"] == before["latent_scale_factor"]
    result = quick("evaluate.py", f"--ckpt={workspace.ldm_ckpt}", f"--output_root={workspace.out}",
                   "--num_samples=2", "--num_sampling_steps=2", "--classifier_steps=2")
    assert result.code == 0 and f"using that of the model, {workspace.data}" in result.out


# --- which autoencoder ---


def test_a_finished_autoencoder_comes_before_a_newer_one_that_was_broken_off(workspace, quick):
    runs = workspace.out
    meta = json.loads((runs / "v/run_meta.json").read_text())
    dates = {"v": "2026-01-01T12:30:00+0200", "newer": "2026-01-01T11:00:00+0000",
             "unfinished": "2027-01-01T00:00:00+0000", "undated": None}
    for name, date in dates.items():
        if name != "v":
            shutil.copytree(runs / "v", runs / name)
        (runs / name / "run_meta.json").write_text(json.dumps({**meta, "created": date}))
    (runs / "unfinished/summary.json").unlink()
    result = quick("find_latent_scale.py", *workspace.common)
    assert result.code == 0, result.err
    assert f"autoencoder: {runs / 'newer'}, the newest finished of 4 runs" in result.out
    for name in ("v", "newer", "undated"):
        (runs / name / "summary.json").unlink()
    result = quick("find_latent_scale.py", *workspace.common)
    assert f"autoencoder: {runs / 'unfinished'}, the newest (none has finished)" in result.out


# --- typed elsewhere ---


def test_commands_are_printed_so_that_they_can_be_pasted(workspace, quick):
    root = workspace.root / "my files"
    root.mkdir()
    shutil.copytree(workspace.data, root / "data")
    argv = ["train_vae.py", f"--data_root={root / 'data'}", f"--output_root={root / 'runs'}",
            f"--config={workspace.vae_config}", "--run_name=ae 1", "--max_steps=1"]
    out = quick(*argv).out
    for more in ([], ["--max_steps=1", f"--config={workspace.ldm_config}", "--run_name=l 1",
                      "--num_sampling_steps=2"], ["--num_samples=1", "--num_sampling_steps=2"]):
        command = re.search("^next: python (.*)$", out, re.M).group(1)
        result = quick(*shlex.split(command), *more, cwd=workspace.root)
        assert result.code == 0, result.err
        out = result.out
    assert (root / "runs/l 1/samples_ancestral_0/grid.png").exists()


def test_a_bare_name_typed_beside_the_checkpoint_is_found(workspace, quick):
    scale = (workspace.out / "v/latent_scale.json").read_bytes()
    (workspace.out / "v/latent_scale.json").unlink()
    vae, ldm = workspace.out / "v/ckpts", workspace.out / "l/ckpts"
    result = quick("find_latent_scale.py", *workspace.common, "--ae_ckpt_path=last.pt", cwd=vae)
    assert result.code == 0, result.err
    assert (workspace.out / "v/latent_scale.json").read_bytes() == scale
    result = quick("train_ldm.py", *workspace.common, f"--config={workspace.ldm_config}",
                   "--ae_ckpt_path=last.pt", "--max_steps=1", "--run_name=b",
                   "--num_sampling_steps=2", cwd=vae)
    assert result.code == 0, result.err
    result = quick("sample.py", "--ckpt=last.pt", "--num_samples=1", "--num_sampling_steps=2",
                   cwd=ldm)
    assert result.code == 0, result.err
    assert (workspace.out / "l/samples_ancestral_0/grid.png").exists()


def test_a_folder_of_runs_can_be_moved(workspace, quick, ldm):
    relative = [a.replace(f"{workspace.root}/", "") for a in ldm("x", "--max_steps=1")]
    assert quick(*relative, cwd=workspace.root).code == 0
    moved = workspace.root / "elsewhere/runs"
    moved.parent.mkdir()
    workspace.out.rename(moved)
    result = quick("train_ldm.py", f"--resume_dir={moved / 'x'}", "--max_steps=2", cwd=moved)
    assert result.code == 0, result.err
    result = quick("sample.py", f"--ckpt={moved / 'x/ckpts/last.pt'}", "--num_samples=1",
                   "--num_sampling_steps=2", cwd=moved)
    assert result.code == 0, result.err


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".x", "", "a\0b", 3])
def test_a_class_that_is_no_file_name_is_not_loaded(workspace, quick, name):
    path = workspace.ldm_ckpt
    state = torch.load(path, weights_only=True)
    torch.save({**state, "class_names": [name, "tb"]}, path)
    before = tree_hashes(workspace.root)
    result = quick("sample.py", f"--ckpt={path}", "--num_samples=1", "--num_sampling_steps=2")
    assert result.code == experiment.EXIT_FAILED and "no file name" in only_error(result)
    assert tree_hashes(workspace.root) == before


@pytest.mark.parametrize("flag", ["--run_name=cache", "--run_name=.", "--run_name=a/b",
                                  "--exp_name=../x", "--run_name="])
def test_a_run_is_one_folder_below_the_output_root(capsys, flag):
    assert "folder name" in error_of(capsys, train_ldm.parse_args, [flag])


def test_paths_know_the_home_folder_and_are_not_empty(capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = train_ldm.parse_args(["--data_root=~/data", "--output_root", "~/runs"])
    assert (args.data_root, args.output_root) == ("/home/me/data", "/home/me/runs")
    assert "unset" in error_of(capsys, train_ldm.parse_args, ["--data_root="])


def test_a_run_folder_given_as_a_checkpoint_is_told_so(workspace, quick):
    result = quick("sample.py", f"--ckpt={workspace.out / 'l'}")
    assert result.code == experiment.EXIT_FAILED
    assert f"give {workspace.ldm_ckpt.with_name('best.pt')}" in only_error(result)


def test_a_checkpoint_of_another_version_is_one_line(workspace, quick):
    state = torch.load(workspace.ldm_ckpt, weights_only=True)
    del state["trained_classes"]
    torch.save(state, workspace.ldm_ckpt)
    result = quick("sample.py", f"--ckpt={workspace.ldm_ckpt}")
    assert result.code == experiment.EXIT_FAILED
    assert "it lacks trained_classes" in only_error(result)


def test_a_broken_description_of_another_run_is_passed_over(workspace, quick):
    (workspace.out / "old").mkdir()
    (workspace.out / "old/run_meta.json").write_text("")
    result = quick("find_latent_scale.py", *workspace.common)
    assert result.code == 0 and "old/run_meta.json" in result.out, result.err


@pytest.mark.parametrize("kind", ["vae", "ldm"])
def test_settings_of_the_optimiser_that_are_given_on_resume_are_used(workspace, quick, ldm, kind):
    argv = ldm("x") if kind == "ldm" else [
        "train_vae.py", *workspace.common, f"--config={workspace.vae_config}", "--run_name=x"]
    assert quick(*argv, "--max_steps=1", "--weight_decay=0.1").code == 0
    assert quick(*argv, "--max_steps=2", "--weight_decay=0.2").code == 0
    state = torch.load(workspace.out / "x/ckpts/last.pt", weights_only=True)
    for name in ("optimizer",) if kind == "ldm" else ("vae_optimizer", "disc_optimizer"):
        assert [g["weight_decay"] for g in state[name]["param_groups"]] == [0.2]


def test_a_copied_run_folder_is_another_run_for_wandb(tmp_path, monkeypatch):
    alone = experiment.Processes(0, 1, torch.device("cpu"), torch.float32, False)
    args = train_ldm.parse_args([f"--output_root={tmp_path}", "--run_name=a", "--no-wandb"])
    first = experiment.Run(args, alone, "ldm", "x", {})
    first.meta["wandb_id"] = "abc"
    first.start(args, {})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name, expected in (("a", "abc"), ("b", None)):
        again = train_ldm.parse_args([f"--resume_dir={tmp_path / name}"])
        assert experiment.Run(again, alone, "ldm", "x", {}).meta["wandb_id"] == expected


def test_a_terminal_that_was_closed_saves_the_run(workspace, ldm):
    script, *argv = ldm("x", "--max_steps=100000", "--sample_every=100000", "--log_every=1")
    process = start(script, *argv)
    for line in process.stdout:
        if line.startswith("step 3 "):
            process.send_signal(signal.SIGHUP)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == experiment.EXIT_STOPPED, out + err
    assert torch.load(workspace.out / "x/ckpts/last.pt", weights_only=True)["step"] >= 3


def test_a_reader_that_goes_does_not_end_training(workspace, ldm):
    """`python train_ldm.py | head`, or `| tee log` at Ctrl-C."""
    script, *argv = ldm("x", "--max_steps=12", "--log_every=1")
    process = start(script, *argv)
    for line in process.stdout:
        if line.startswith("step 2 "):
            break
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 0, err
    assert json.loads((workspace.out / "x/summary.json").read_text())["step"] == 12


def test_a_scale_of_other_images_is_noticed_before_training(workspace, quick, ldm):
    path = workspace.out / "v/latent_scale.json"
    scale = json.loads(path.read_text())
    path.write_text(json.dumps({**scale, "latent_scale_factor": 3 * scale["latent_scale_factor"],
                                "std": scale["std"] / 3}))
    result = quick(*ldm("x", "--max_steps=1"))
    assert result.code == 0 and "standard deviation of 3.0" in result.out, result.out


# --- settings that make no sense ---


@pytest.mark.parametrize("argv", [["--prob_uncond=1"], ["--ema_decay=1.5"], ["--ema_decay=-1"]])
def test_settings_that_learn_nothing_are_refused(capsys, argv):
    assert argv[0].split("=")[0] in error_of(capsys, train_ldm.parse_args, argv)
    if "ema" in argv[0]:
        assert "--ema_decay" in error_of(capsys, train_vae.parse_args, argv)


def test_latents_that_are_noise_have_a_verdict(workspace, quick):
    for logvar, level in ((-30.0, "OK"), (0.0, "WATCH"), (4.0, "BAD")):
        state = torch.load(workspace.vae_ckpt, weights_only=True)
        bias = next(k for k in reversed(state["ema"]) if k.startswith("encoder") and "bias" in k)
        channels = len(state["ema"][bias]) // 2
        state["ema"][bias.replace("bias", "weight")][channels:] = 0  # the log-variances
        state["ema"][bias][channels:] = logvar
        torch.save(state, workspace.vae_ckpt)
        result = quick("find_latent_scale.py", *workspace.common,
                       f"--ae_ckpt_path={workspace.vae_ckpt}")
        assert result.code == 0, result.err
        assert re.search(rf"^{level} +posterior_noise_share", result.out, re.M), result.out


# --- what a sweep writes ---


@pytest.mark.parametrize("text, value", [
    ("[1, 2, 4]", (1, 2, 4)), ("'1,2,4'", (1, 2, 4)), ("['1', '2']", (1, 2)), ("1:2", (1, 2)),
    ('"8"', (8,)), ("[]", ())])
def test_lists_as_an_agent_writes_them(text, value):
    assert train_ldm.parse_args([f"--ldm_ch_mults={text}"]).ldm_ch_mults == value


@pytest.mark.parametrize("text", ["[0.2, 0.8]", "(0.2, 0.8)", "'0.2,0.8'", "0.2:0.8"])
def test_intervals_as_an_agent_writes_them(text):
    assert train_ldm.parse_args([f"--guidance_interval={text}"]).guidance_interval == (0.2, 0.8)


@pytest.mark.parametrize("text", ["one, two words", "['one', 'two words']", '["one","two words",]'])
def test_tags_as_an_agent_writes_them(text):
    assert experiment.tag_list(text) == ["one", "two words"]
    assert experiment.tag_list("") == experiment.tag_list("[]") == []


def test_dates_are_compared_as_instants():
    def instant(text):
        return experiment.seconds_since_1970(text)
    assert instant("2025-10-26T12:30:00+0200") < instant("2025-10-26T11:00:00+0000")
    assert instant("yesterday") == instant(None) == instant(5) == 0
