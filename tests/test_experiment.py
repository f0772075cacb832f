"""Arguments, batch order, optimiser step, files and checkpoints of experiment.py."""
import io
import json
import math
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT

import experiment
import sample
import train_ldm
import train_vae


@pytest.fixture
def alone(monkeypatch):
    """A single process on the CPU."""
    return experiment.Processes(0, 1, torch.device("cpu"), torch.float32, False)


def error_of(capsys, function, *args, **kwargs):
    """The last line of the message that a call ends the program with."""
    with pytest.raises(SystemExit) as e:
        function(*args, **kwargs)
    text = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err.strip()
    assert e.value.code not in (0, None) and text
    return text.splitlines()[-1]


def config(tmp_path, text):
    path = tmp_path / "settings.py"
    path.write_text(text)
    return f"--config={path}"


# --- precedence and flags ---


def test_precedence_defaults_preset_config_command_line(tmp_path):
    from_config = config(tmp_path, "log_every = 7\nsample_every = 8\n")
    args = train_ldm.parse_args(["--mode=overfit_16", from_config, "--sample_every=9"])
    assert args.lr == 3e-5  # default
    assert args.epochs == 1500  # preset over the default 1000
    assert args.log_every == 7  # config over the preset's 25
    assert args.sample_every == 9  # command line over config's 8


def test_a_config_file_can_choose_the_mode(tmp_path):
    args = train_ldm.parse_args([config(tmp_path, "mode = 'overfit_one'\n")])
    assert (args.overfit_k, args.batch_per_device, args.log_every) == (1, 1, 10)


def test_a_value_equal_to_the_default_still_beats_preset_and_config(tmp_path):
    from_config = config(tmp_path, "epochs = 5\n")
    assert train_ldm.parse_args(["--mode=overfit_8", from_config, "--epochs=1000"]).epochs == 1000


@pytest.mark.parametrize("argv, expected", [
    (["--wandb"], True), (["--wandb=True"], True), (["--wandb=true"], True), (["--wandb", "1"], True),
    (["--no-wandb"], False), (["--wandb=false"], False), (["--wandb", "False"], False), (["--wandb=0"], False),
    (["--wandb", "--no-wandb"], False), (["--no-wandb", "--wandb"], True)])
def test_booleans(argv, expected):
    args = train_ldm.parse_args([*argv, "--seed=3"])
    assert args.wandb is expected and args.seed == 3


@pytest.mark.parametrize("argv, expected", [
    (["--ldm_ch_mults=1,2,4"], (1, 2, 4)), (["--ldm_ch_mults", "1:2:4"], (1, 2, 4)),
    (["--ldm_ch_mults=[1, 2, 4]"], (1, 2, 4)), (["--ldm_ch_mults=(3,)"], (3,)), (["--ldm_ch_mults=8"], (8,))])
def test_lists(argv, expected):
    assert train_ldm.parse_args(argv).ldm_ch_mults == expected


def test_an_empty_list_is_a_value():
    assert train_ldm.parse_args(["--ldm_attn_res="]).ldm_attn_res == ()


def test_both_ways_to_write_a_number():
    assert train_ldm.parse_args(["--lr=1e-3", "--epochs", "7"]).lr == 1e-3
    assert train_ldm.parse_args(["--lr", "1e-3", "--epochs=7"]).epochs == 7


@pytest.mark.parametrize("name", ["data_root", "exp_name", "latent_scale_factor", "img_size", "zero_terminal_snr",
                                  "ae_ckpt_path", "wandb_id"])
def test_none_as_sweep_agents_pass_it_leaves_an_optional_setting_unset(name):
    unset = vars(train_ldm.parse_args([]))
    assert vars(train_ldm.parse_args([f"--{name}=None"])) == unset


def test_none_for_a_setting_that_needs_a_value_is_refused(capsys):
    assert "lr" in error_of(capsys, train_ldm.parse_args, ["--lr=None"])


@pytest.mark.parametrize("argv, says", [
    (["--no-wandb=true"], "takes no value"), (["--wandb=perhaps"], "perhaps"),
    (["--learning_rat=1"], "unknown argument"), (["--grad_clp=1"], "did you mean --grad_clip?"),
    (["--batch_per=2"], "did you mean --batch_per_device?"),  # no abbreviations
    (["--ldm_ch_mults=1,x"], "ldm_ch_mults"), (["--lr=nan"], "lr"), (["--lr=inf"], "lr"), (["--lr=-1"], "lr"),
    (["--epochs=0"], "epochs"), (["--epochs=1.5"], "epochs"), (["--img_size=-4"], "img_size"),
    (["--prediction=epsilon"], "prediction"), (["stray"], "stray"),
    (["--prob_uncond=1.5"], "prob_uncond"), (["--prob_uncond=0"], "--guidance_scale=1"),
    (["--sampler=euler", "--prediction=v"], "ddim")])
def test_bad_arguments_are_refused_by_name(capsys, argv, says):
    assert says in error_of(capsys, train_ldm.parse_args, argv)


def test_a_seed_that_no_generator_takes_is_refused(capsys):
    assert "seed" in error_of(capsys, train_ldm.parse_args, [f"--seed={2**64}"])


def test_guidance_without_a_null_class_is_refused_and_allowed_at_1(capsys):
    assert "null class" in error_of(capsys, train_ldm.parse_args, ["--prob_uncond=0", "--guidance_scale=2"])
    assert train_ldm.parse_args(["--overfit_k=8", "--guidance_scale=2"]).guidance_scale == 1  # config/cpu_ldm.py has it
    assert "no null class" in capsys.readouterr().out
    assert train_ldm.parse_args(["--prob_uncond=0", "--guidance_scale=1"]).prob_uncond == 0


# --- config files ---


@pytest.mark.parametrize("text, says", [
    ("learning_rate = 1\nlog_evry = 5", "unknown setting"), ("log_evry = 5", "did you mean log_every?"),
    ("epochs = 2.0", "epochs"), ("epochs = '3'", "epochs"), ("epochs = True", "epochs"), ("lr = 'small'", "lr"),
    ("lr = float('nan')", "lr"), ("lr = float('inf')", "lr"), ("lr = -1.0", "lr"), ("lr = None", "lr"),
    ("wandb = 1", "wandb"), ("wandb = 'yes'", "wandb"), ("ldm_ch_mults = 4", "ldm_ch_mults"),
    ("ldm_ch_mults = (1, 'x')", "ldm_ch_mults"), ("ldm_ch_mults = (1, 2.5)", "ldm_ch_mults"),
    ("prediction = 'epsilon'", "prediction"), ("task = 5", "task"), ("epochs = 0", "epochs"),
    ("lr = = 3", "SyntaxError"), ("1 / 0", "ZeroDivisionError"), ("raise SystemExit(0)", "SystemExit"),
    ("x = undefined", "NameError"), ("config = 'other.py'", "config")])
def test_bad_config_files_are_refused_with_file_and_setting(capsys, tmp_path, text, says):
    with pytest.raises(SystemExit) as e:
        train_ldm.parse_args([config(tmp_path, text)])
    message = str(e.value.code)
    assert message.startswith("error: ") and says in message and "settings.py" in message
    assert len(message.splitlines()) == 1


def test_a_missing_config_file_is_named(capsys, tmp_path):
    assert "nowhere.py" in error_of(capsys, train_ldm.parse_args, [f"--config={tmp_path}/nowhere.py"])
    assert "no config file" in error_of(capsys, train_ldm.parse_args, [f"--config={tmp_path}"])


def test_config_values_arrive_in_the_arguments_types(tmp_path):
    text = "import math\n_half = 0.5\nlr = 1\nldm_ch_mults = [1, 2]\nweight_decay = _half * math.pi\nexp_name = None\n"
    args = train_ldm.parse_args([config(tmp_path, text)])
    assert args.lr == 1.0 and isinstance(args.lr, float)
    assert args.ldm_ch_mults == (1, 2) and args.exp_name is None
    assert args.weight_decay == 0.5 * math.pi


# --- the contract's presets ---

TABLE = {  # mode: batch_per_device, epochs, log_every, sample_every, wandb
    "full_train": (16, 1000, 100, 10, True), "overfit_one": (1, 1000, 10, 5, False),
    "overfit_8": (8, 1500, 25, 10, True), "overfit_16": (16, 1500, 25, 10, True),
    "overfit_32": (16, 1500, 50, 10, True)}


@pytest.mark.parametrize("mode", TABLE)
def test_every_preset_of_the_contract(mode):
    args = train_ldm.parse_args([f"--mode={mode}"])
    assert (args.batch_per_device, args.epochs, args.log_every, args.sample_every, args.wandb) == TABLE[mode]
    assert args.num_sampling_steps == 500
    k = {"full_train": 0, "overfit_one": 1}.get(mode) if mode[-1].isalpha() else int(mode[8:])
    assert args.overfit_k == k and args.overfit_one == (mode == "overfit_one") and args.mode == mode
    off = (args.prob_uncond, args.guidance_scale, args.warmup_steps)
    assert off == ((0.1, 4.0, 500) if mode == "full_train" else (0.0, 1.0, 0))


def test_the_stable_defaults_of_the_contract():
    args = train_ldm.parse_args([])
    assert (args.lr, args.weight_decay, args.grad_clip, args.ema_decay, args.use_ema) == (3e-5, 0.01, 1.0, 0.999, True)
    assert (args.ldm_base_ch, args.ldm_ch_mults, args.ldm_num_res_blocks, args.ldm_attn_res) == (96, (1, 2, 4), 2, (16,))
    assert args.cache_latents and args.class_filter == -1 and args.output_root == "runs"


@pytest.mark.parametrize("short, mode", [("--overfit_one", "overfit_one"), ("--overfit_k=1", "overfit_one"),
                                         ("--overfit_k=8", "overfit_8"), ("--overfit_k=32", "overfit_32")])
def test_short_forms_are_the_modes(short, mode):
    assert train_ldm.parse_args([short]) == train_ldm.parse_args([f"--mode={mode}"])


def test_any_k_is_a_mode():
    args = train_ldm.parse_args(["--mode=overfit_5"])
    assert (args.overfit_k, args.batch_per_device, args.epochs, args.prob_uncond) == (5, 5, 1500, 0.0)
    assert train_ldm.parse_args(["--overfit_k=100"]).batch_per_device == 16


@pytest.mark.parametrize("argv", [["--mode=overfit_8", "--overfit_k=16"], ["--overfit_one", "--overfit_k=8"],
                                  ["--mode=overfit_16", "--overfit_one"], ["--mode=overfit_0"], ["--mode=fast"],
                                  ["--mode=overfit_"], ["--mode=overfit_8x"]])
def test_conflicting_or_unknown_modes_are_refused(capsys, argv):
    assert "mode" in error_of(capsys, train_ldm.parse_args, argv)


def test_schedule_and_terminal_snr_follow_the_prediction():
    kinds = {p: train_ldm.parse_args([f"--prediction={p}"]) for p in ("eps", "v", "x0", "flow")}
    assert {p: a.noise_schedule for p, a in kinds.items()} == dict(eps="cosine", v="cosine", x0="cosine", flow="flow")
    assert {p: a.zero_terminal_snr for p, a in kinds.items()} == dict(eps=False, v=True, x0=True, flow=True)
    assert train_ldm.parse_args(["--no-zero_terminal_snr"]).zero_terminal_snr is False


def test_a_continued_run_keeps_its_settings_unless_told_otherwise(tmp_path, capsys):
    folder = tmp_path / "a"
    folder.mkdir()
    old = vars(train_ldm.parse_args(["--mode=overfit_8", "--lr=1e-3", "--ldm_ch_mults=1,3", f"--output_root={tmp_path}"]))
    experiment.write_json(folder / "run_meta.json", {"args": old})
    args = train_ldm.parse_args([f"--resume_dir={folder}", "--epochs=7"])
    assert (args.mode, args.lr, args.ldm_ch_mults, args.epochs) == ("overfit_8", 1e-3, (1, 3), 7)
    assert "epochs=7 (was 1500)" in capsys.readouterr().out
    by_name = train_ldm.parse_args(["--run_name=a", f"--output_root={tmp_path}"])
    assert by_name.resume_dir == str(folder) and by_name.lr == 1e-3
    assert train_ldm.parse_args(["--run_name=b", f"--output_root={tmp_path}"]).resume_dir is None
    assert "no run folder" in error_of(capsys, train_ldm.parse_args, [f"--resume_dir={tmp_path}/b"])


@pytest.mark.parametrize("stage", [train_vae, train_ldm, sample])
def test_every_flag_has_one_meaning_and_a_help_text(stage):
    parser = stage.make_parser()
    assert all(a.help for a in parser._actions)
    text = parser.format_help()
    assert text.count("(default:") == len(parser._actions) - 1  # all but --help


# --- batch order and random numbers ---


@pytest.mark.parametrize("count, batch, world", [(16, 4, 1), (10, 4, 1), (3, 8, 1), (1, 1, 1), (10, 3, 2), (5, 4, 3)])
def test_an_epoch_is_a_shuffle_filled_up_from_its_start(count, batch, world):
    steps = experiment.steps_per_epoch(count, batch, world)
    assert steps == -(-count // (batch * world)) and steps > 0
    for epoch in range(3):
        drawn = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            parts = [experiment.batch_indices(step, count, batch, 7, rank, world) for rank in range(world)]
            assert all(e == epoch and len(i) == batch for i, e in parts)
            drawn += [i for part, _ in parts for i in part.tolist()]
        assert sorted(drawn[:count]) == list(range(count))
        assert all(drawn[i] == drawn[i - count] for i in range(count, len(drawn)))


def test_ranks_share_what_one_process_with_the_whole_batch_sees():
    for step in range(7):
        whole, epoch = experiment.batch_indices(step, 20, 8, 1)
        parts = [experiment.batch_indices(step, 20, 4, 1, rank, 2)[0] for rank in (0, 1)]
        assert np.array_equal(whole, np.concatenate(parts))
    halves = [experiment.batch_indices(0, 20, 4, 1, rank, 2)[0] for rank in (0, 1)]
    assert not set(halves[0]) & set(halves[1])


def test_epochs_and_seeds_differ():
    def order(seed, epoch):
        return experiment.batch_indices(epoch, 50, 50, seed)[0].tolist()
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1, 2)}) == 6


def test_a_generator_is_a_function_of_its_key_alone():
    def draw(*key):
        return tuple(torch.randn(4, generator=experiment.generator("cpu", *key)).tolist())
    first = draw(0, "ldm", 3, 1)
    torch.manual_seed(123)
    assert draw(0, "ldm", 3, 1) == first
    keys = [(0, "ldm", 3, 0), (0, "ldm", 4, 1), (1, "ldm", 3, 1), (0, "vae", 3, 1), (0, "ldm", 31), (0, "ldm", 3, "1")]
    assert len({first, *(draw(*k) for k in keys)}) == 7


# --- optimiser step ---


def small_model(weights=(3.0, 4.0)):
    module = torch.nn.Linear(2, 1, bias=False)
    module.weight.data[:] = torch.tensor([weights])
    return module, torch.optim.AdamW(module.parameters(), 0.1, weight_decay=0.01, fused=True)


@pytest.mark.parametrize("clip, factor", [(1.0, 0.2), (10.0, 1.0), (0.0, 1.0)])
def test_clipping_scales_the_gradient_to_the_norm(clip, factor):
    module = torch.nn.Linear(2, 1, bias=False)
    before = module.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), 1.0, fused=True)
    module.weight.grad = torch.tensor([[3.0, 4.0]])
    norm, bad = experiment.clip_and_step(module, optimizer, clip)
    assert norm.item() == pytest.approx(5.0) and bad.item() == 0
    assert torch.allclose(before - module.weight, factor * torch.tensor([[3.0, 4.0]]), atol=1e-5)
    assert module.weight.grad is None


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_bad_gradient_changes_neither_weights_nor_optimiser(poison, clip):
    module, optimizer = small_model()
    for _ in range(2):
        module.weight.grad = torch.tensor([[0.5, -0.25]])
        experiment.clip_and_step(module, optimizer, clip)

    def snapshot():
        return [module.weight.detach().clone(), *(v.clone() for v in optimizer.state[module.weight].values())]
    before = snapshot()
    module.weight.grad = torch.tensor([[poison, 1.0]])
    _, bad = experiment.clip_and_step(module, optimizer, clip)
    assert bad.item() == 1 and module.weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True))
    module.weight.grad = torch.tensor([[0.5, -0.25]])
    _, bad = experiment.clip_and_step(module, optimizer, clip)
    assert bad.item() == 0 and not torch.equal(before[0], module.weight)
    assert optimizer.state[module.weight]["step"].item() == 3


def test_a_good_step_is_plain_adamw():
    module, optimizer = small_model()
    other, plain = small_model()
    for gradient in ([[0.3, 0.4]], [[-0.1, 0.2]]):
        module.weight.grad, other.weight.grad = torch.tensor(gradient), torch.tensor(gradient)
        experiment.clip_and_step(module, optimizer, 1.0)
        plain.step()
    assert torch.equal(module.weight, other.weight)


def test_window_means_leave_skipped_steps_out_and_count_them(alone):
    window = experiment.Window(alone, ("a", "b"))
    good, bad = torch.tensor(0.0), torch.tensor(1.0)
    window.add((torch.tensor(1.0), torch.tensor(10.0)), good)
    window.add((torch.tensor(math.nan), torch.tensor(99.0)), bad)
    window.add((torch.tensor(3.0), torch.tensor(20.0)), good)
    other = experiment.Window(alone, ("a", "b"))
    other.load(window.state())  # as a resumed run
    for w in (window, other):
        assert w.means() == {"a": 2.0, "b": 15.0, "train/bad_steps": 1.0}
        w.add((torch.tensor(5.0), torch.tensor(6.0)), good)
        assert w.means() == {"a": 5.0, "b": 6.0, "train/bad_steps": 0.0}  # a new window
        for _ in range(2):
            w.add((torch.tensor(5.0), torch.tensor(6.0)), bad)
        means = w.means()
        assert means.pop("train/bad_steps") == 2.0 and all(math.isnan(v) for v in means.values())
    other.load(torch.ones(1, 3))  # written by a version that counted no bad steps
    other.add((torch.tensor(5.0), torch.tensor(6.0)), good)
    assert other.means()["b"] == 6.0


# --- files and checkpoints ---


@pytest.mark.parametrize("error", [ValueError("x"), OSError(28, "No space left on device"), RuntimeError("disk"),
                                   KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, error):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def write(f):
        f.write(b"half of the new")
        raise error
    with pytest.raises(SystemExit if isinstance(error, (OSError, RuntimeError)) else type(error)) as e:
        experiment.write_atomic(path, write)
    if isinstance(e.value, SystemExit):
        assert "last.pt" in e.value.code and len(e.value.code.splitlines()) == 1
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["last.pt"]
    experiment.write_atomic(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["last.pt"]


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    experiment.save_checkpoint(path, "vae", {"model": {"w": torch.arange(5000.0)}, "args": {"ch_mults": (1, 2)}})
    return path


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_checkpoint_comes_back_as_it_was(checkpoint):
    state = experiment.load_checkpoint(checkpoint, "vae")
    assert torch.equal(state["model"]["w"], torch.arange(5000.0)) and state["args"] == {"ch_mults": (1, 2)}


def test_only_undamaged_checkpoints_of_the_kind_are_loaded(capsys, tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    whole = checkpoint.read_bytes()
    with zipfile.ZipFile(checkpoint) as archive:
        info = max(archive.infolist(), key=lambda i: i.file_size)
    flipped = bytearray(whole)
    flipped[info.header_offset + 4000] ^= 1  # inside the weights
    foreign, bomb, zipped = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": {"w": torch.ones(2)}}, foreign)
    torch.save(torch.ones(3), zipped)
    torch.save({"kind": "vae", "x": Bomb()}, bomb)
    cases = {"flip": bytes(flipped), "cut": whole[:len(whole) // 2], "foreign": foreign.getvalue(), "empty": b"",
             "text": b"import os\n" * 50, "pickle": pickle.dumps(Bomb()), "bomb": bomb.getvalue(),
             "tensor": zipped.getvalue()}
    for name, content in cases.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        message = error_of(capsys, experiment.load_checkpoint, path, "vae")
        assert message.startswith("error: ") and f"{name}.pt" in message, name
    assert not (tmp_path / "exploded").exists()
    assert "train_vae.py" in error_of(capsys, experiment.load_checkpoint, checkpoint, "ldm")
    assert "no checkpoint" in error_of(capsys, experiment.load_checkpoint, tmp_path / "nothing.pt", "vae")


def test_weights_of_another_architecture_are_one_line(capsys):
    message = error_of(capsys, experiment.load_weights, torch.nn.Linear(2, 2), torch.nn.Linear(3, 2).state_dict(), "a.pt")
    assert "a.pt" in message and "weight" in message


def test_non_finite_numbers_are_null_in_json_files(tmp_path, alone):
    args = train_ldm.parse_args([f"--output_root={tmp_path}", "--run_name=a", "--no-wandb"])
    run = experiment.Run(args, alone, "ldm", "x", {})
    run.start(args, {})
    run.log(1, 0, {"train/loss": math.nan, "train/lr": 1.0})
    assert math.isnan(run.history("train/loss")[0]) and run.history("train/lr") == [1.0]
    run.end(1, {"train/loss": math.nan}, False, False, True)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")
    assert json.loads((run.folder / "metrics.jsonl").read_text(), parse_constant=refuse)["train/loss"] is None
    assert json.loads((run.folder / "summary.json").read_text(), parse_constant=refuse)["train/loss"] is None


@pytest.mark.parametrize("values", [(-1.0, -1.0), (1.0, 1.0), (-2.0, -1.0), (5.0, 1.0), (0.0, 1 / 255)])
def test_pictures_are_saved_without_rescaling(tmp_path, values):
    x, expected = values
    experiment.save_image(tmp_path / "x.png", torch.full((1, 4, 6), x))
    back = experiment.load_image(tmp_path / "x.png")
    assert back.shape == (1, 4, 6) and torch.allclose(back, torch.full_like(back, expected), atol=1e-6)


def test_a_grid_holds_every_picture_at_its_place(tmp_path):
    rows = [torch.stack([torch.full((1, 8, 8), v) for v in row]) for row in ((-1.0, 1.0), (0.0,))]
    experiment.save_grid(tmp_path / "g.png", rows, ["one", "two"])
    with experiment.Image.open(tmp_path / "g.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (2 * 24, 22)
    assert (sheet[14:22, 2:10] == 0).all() and (sheet[14:22, 12:20] == 255).all() and (sheet[38:46, 2:10] == 128).all()


# --- signals and console ---

SIGNALLED = """
import os, signal, sys
import torch, experiment
procs = experiment.Processes(0, 1, torch.device("cpu"), torch.float32, False)
for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
    stop = experiment.StopSignal(procs)
    assert stop.poll(False) == (False, False) and stop.poll(True) == (False, True)
    os.kill(os.getpid(), getattr(signal, name))
    assert stop.poll(False) == (True, False) and stop.name == name
    try:
        with stop.immediate():
            print("never")
    except experiment.Stopped:
        pass
    stop = experiment.StopSignal(procs)
    try:
        with stop.immediate():
            os.kill(os.getpid(), getattr(signal, name))
            print("never")
    except experiment.Stopped:
        print(name, "stopped at once")
try:
    os.kill(os.getpid(), signal.SIGINT)
    print("never")
except KeyboardInterrupt:
    print("the second ends")
"""


def test_signals_ask_to_stop_and_a_second_interrupt_ends():
    out = subprocess.run([sys.executable, "-c", SIGNALLED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines() == ["SIGTERM stopped at once", "SIGUSR1 stopped at once", "SIGINT stopped at once",
                                       "the second ends"]


def test_progress_writes_whole_lines_to_a_file(capsys, alone, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(experiment.time, "perf_counter", lambda: clock[0])
    progress = experiment.Progress(alone, "step", 10)
    for done in range(1, 11):
        clock[0] += 16.0
        progress.update(done, "loss 1")
    progress.clear()
    out = capsys.readouterr().out
    assert "\r" not in out and out.endswith("\n")
    lines = out.splitlines()
    assert len(lines) == 5 and lines[0] == "step 2/10 (20%) loss 1 2 min 08 s left"


@pytest.mark.parametrize("seconds, text", [(0, "0 s"), (59.9, "59 s"), (60, "1 min 00 s"), (200, "3 min 20 s"),
                                           (7500, "2 h 05 min"), (273600, "3 d 04 h")])
def test_time_text(seconds, text):
    assert experiment.time_text(seconds) == text
