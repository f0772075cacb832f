"""Flags, config files and precedence."""
import math

import pytest
from conftest import ROOT, error_of

import evaluate
import find_latent_scale
import sample
import train_ldm
import train_vae
from lib import args as command_line
from lib.files import write_json


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
    from_config = config(tmp_path, "mode = 'overfit_one'\nepochs = 5\n")
    args = train_ldm.parse_args([from_config, "--epochs=1000"])
    assert (args.overfit_k, args.batch_per_device, args.log_every) == (1, 1, 10)
    assert args.epochs == 1000  # a value equal to the default wins, too


@pytest.mark.parametrize("argv, expected", [
    (["--wandb"], True), (["--wandb=True"], True), (["--wandb=true"], True),
    (["--wandb", "1"], True), (["--no-wandb"], False), (["--wandb=false"], False),
    (["--wandb", "False"], False), (["--wandb=0"], False),
    (["--wandb", "--no-wandb"], False), (["--no-wandb", "--wandb"], True)])
def test_booleans(argv, expected):
    args = train_ldm.parse_args([*argv, "--seed=3"])
    assert args.wandb is expected and args.seed == 3


@pytest.mark.parametrize("text, value", [
    ("1,2,4", (1, 2, 4)), ("1:2:4", (1, 2, 4)), ("[1, 2, 4]", (1, 2, 4)), ("(3,)", (3,)),
    ("8", (8,)), ("'1,2,4'", (1, 2, 4)), ("['1', '2']", (1, 2)), ('"8"', (8,)), ("", ()),
    ("[]", ())])
def test_lists_as_people_and_sweep_agents_write_them(text, value):
    assert train_ldm.parse_args([f"--ldm_ch_mults={text}"]).ldm_ch_mults == value
    assert train_ldm.parse_args(["--guidance_interval=0.2:0.8"]).guidance_interval == (0.2, 0.8)


@pytest.mark.parametrize("name, text, value", [
    ("epochs", "64.0", 64), ("epochs", "1e3", 1000), ("epochs", "7", 7), ("lr", "1e-3", 1e-3),
    ("seed", str(2**63 - 1), 2**63 - 1)])
def test_numbers_in_every_notation(name, text, value):
    for argv in ([f"--{name}={text}"], [f"--{name}", text]):
        parsed = getattr(train_ldm.parse_args(argv), name)
        assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("name", [
    "data_root", "exp_name", "latent_scale_factor", "img_size", "zero_terminal_snr",
    "ae_ckpt_path", "wandb_id"])
def test_none_of_a_sweep_agent_leaves_a_setting_unset(name):
    unset = vars(train_ldm.parse_args([]))
    assert vars(train_ldm.parse_args([f"--{name}=None"])) == unset


@pytest.mark.parametrize("argv, says", [
    (["--wandb=perhaps"], "perhaps"), (["--lr=None"], "lr"),
    (["--learning_rat=1"], "unknown argument"), (["--seed=2e99"], "seed"),
    ([f"--seed={2**64}"], "seed"), (["--guidance_interval=0.8,0.2"], "guidance_interval"),
    (["--guidance_interval=0.2"], "guidance_interval"), (["--data_root="], "variable unset"),
    (["--run_name=cache"], "folder name"), (["--run_name=."], "folder name"),
    (["--run_name=a/b"], "folder name"), (["--exp_name=../x"], "folder name"),
    (["--run_name="], "folder name"), (["--ema_decay=1.5"], "ema_decay"),
    (["--prob_uncond=1"], "prob_uncond"),
    (["--grad_clp=1"], "did you mean --grad_clip?"),
    (["--batch_per=2"], "did you mean --batch_per_device?"),  # no abbreviations
    (["--ldm_ch_mults=1,x"], "ldm_ch_mults"),
    (["--lr=nan"], "lr"), (["--lr=inf"], "lr"), (["--lr=-1"], "lr"),
    (["--epochs=0"], "epochs"), (["--epochs=1.5"], "epochs"), (["--img_size=-4"], "img_size"),
    (["--prediction=epsilon"], "prediction"), (["stray"], "stray"),
    (["--prob_uncond=1.5"], "prob_uncond"),
    (["--sampler=euler"], "ddim"), (["--ldm_ch_mults=1,0"], "ldm_ch_mults")])
def test_bad_arguments_are_refused_by_name(capsys, argv, says):
    assert says in error_of(capsys, train_ldm.parse_args, argv)


@pytest.mark.parametrize("stage, typed, meant", [
    (train_ldm, "--learning_rate=1", "--lr"), (train_ldm, "--batch-size", "--batch_per_device"),
    (train_vae, "--num_train_epochs", "--epochs"), (train_ldm, "--image_size=64", "--img_size"),
    (train_vae, "--resume", "--resume_dir"), (train_vae, "--output_dir=x", "--output_root"),
    (sample, "--output_dir=x", "--out_dir"), (sample, "--ckpt_path=x", "--ckpt")])
def test_a_flag_of_other_programs_names_ours(capsys, stage, typed, meant):
    parse = getattr(stage, "parse_args", stage.build_parser().parse)
    assert error_of(capsys, parse, [typed]).endswith(f"did you mean {meant}?")


@pytest.mark.parametrize("stage, kind", [(train_ldm, "vae"), (train_vae, "ldm")])
def test_a_config_of_the_other_stage_is_called_so(capsys, stage, kind):
    given = [f"--config={ROOT}/config/cpu_{kind}.py"]
    assert "it is a config of the other trainer" in error_of(capsys, stage.parse_args, given)


def test_paths_know_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = train_ldm.parse_args(["--data_root=~/data", "--output_root", "~/runs"])
    assert (args.data_root, args.output_root) == ("/home/me/data", "/home/me/runs")


def test_guidance_needs_a_null_class(capsys):
    refused = ["--prob_uncond=0", "--guidance_scale=2"]
    assert "null class" in error_of(capsys, train_ldm.parse_args, refused)
    args = train_ldm.parse_args(["--overfit_k=8", "--guidance_scale=2"])  # a config may have it
    assert args.guidance_scale == 1
    assert train_ldm.parse_args(["--prob_uncond=0", "--guidance_scale=1"]).prob_uncond == 0


# --- config files ---


@pytest.mark.parametrize("text, says", [
    ("learning_rate = 1\nlog_evry = 5", "did you mean lr?"),
    ("log_evry = 5", "did you mean log_every?"),
    ("epochs = 2.5", "epochs"), ("epochs = '3'", "epochs"), ("epochs = True", "epochs"),
    ("lr = 'small'", "lr"), ("lr = float('nan')", "lr"), ("lr = float('inf')", "lr"),
    ("lr = -1.0", "lr"), ("lr = None", "lr"),
    ("wandb = 2", "wandb"), ("wandb = 'yes'", "wandb"), ("ldm_ch_mults = '1,2'", "ldm_ch_mults"),
    ("ldm_ch_mults = {1: 2}", "ldm_ch_mults"),
    ("ldm_ch_mults = (1, 'x')", "ldm_ch_mults"), ("ldm_ch_mults = (1, 2.5)", "ldm_ch_mults"),
    ("prediction = 'epsilon'", "prediction"), ("task = 5", "task"), ("epochs = 0", "epochs"),
    ("lr = = 3", "SyntaxError"), ("1 / 0", "ZeroDivisionError"),
    ("raise SystemExit(0)", "SystemExit"),
    ("x = undefined", "NameError"), ("task = None", "task"),
    ("epochs: 64\nlr = 1", "`epochs: ...` sets nothing"),  # YAML is an annotation in Python
    ('{"lr": 1}', "sets nothing: a config is lines of"),  # JSON
    ("config = 'other.py'", "config")])
def test_an_error_names_the_config_file_and_the_setting(capsys, tmp_path, text, says):
    with pytest.raises(SystemExit) as e:
        train_ldm.parse_args([config(tmp_path, text)])
    message = str(e.value)
    assert message.startswith("error: ")
    assert says in message and "settings.py" in message
    assert len(message.splitlines()) == 1


def test_a_missing_config_file_is_named(capsys, tmp_path):
    missing = [f"--config={tmp_path}/nowhere.py"]
    assert "nowhere.py" in error_of(capsys, train_ldm.parse_args, missing)
    assert str(tmp_path) in error_of(capsys, train_ldm.parse_args, [f"--config={tmp_path}"])


def test_config_values_are_converted_to_the_type_of_the_flag(tmp_path):
    text = ("import math\n_half = 0.5\nlr = 1\nldm_ch_mults = [1, 2]\n"
            "weight_decay = _half * math.pi\nexp_name = None\n")
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
    values = (args.batch_per_device, args.epochs, args.log_every, args.sample_every, args.wandb)
    assert values == TABLE[mode]
    assert args.num_sampling_steps == 500
    k = {"full_train": 0, "overfit_one": 1}.get(mode) if mode[-1].isalpha() else int(mode[8:])
    assert args.overfit_k == k
    assert args.overfit_one == (mode == "overfit_one")
    assert args.mode == mode
    off = (args.prob_uncond, args.guidance_scale, args.warmup_steps)
    assert off == ((0.1, 1.0, 500) if mode == "full_train" else (0.0, 1.0, 0))


def test_the_stable_defaults_of_the_contract():
    args = train_ldm.parse_args([])
    assert (args.lr, args.weight_decay, args.grad_clip) == (3e-5, 0.01, 1.0)
    assert (args.ema_decay, args.use_ema) == (0.999, True)
    assert (args.ldm_base_ch, args.ldm_ch_mults) == (96, (1, 2, 4))
    assert (args.ldm_num_res_blocks, args.ldm_attn_res) == (2, (16,))
    assert args.cache_latents and args.class_filter == -1 and args.output_root == "runs"


@pytest.mark.parametrize("short, mode", [
    ("--overfit_one", "overfit_one"), ("--overfit_k=1", "overfit_one"),
    ("--overfit_k=8", "overfit_8"), ("--overfit_k=32", "overfit_32")])
def test_short_forms_are_the_modes(short, mode):
    assert train_ldm.parse_args([short]) == train_ldm.parse_args([f"--mode={mode}"])


def test_any_k_is_a_mode():
    args = train_ldm.parse_args(["--mode=overfit_5"])
    values = (args.overfit_k, args.batch_per_device, args.epochs, args.prob_uncond)
    assert values == (5, 5, 1500, 0.0)
    assert train_ldm.parse_args(["--overfit_k=100"]).batch_per_device == 16


@pytest.mark.parametrize("argv", [
    ["--mode=overfit_8", "--overfit_k=16"], ["--overfit_one", "--overfit_k=8"],
    ["--mode=overfit_16", "--overfit_one"], ["--mode=overfit_0"], ["--mode=fast"],
    ["--mode=overfit_"], ["--mode=overfit_8x"]])
def test_conflicting_or_unknown_modes_are_refused(capsys, argv):
    assert "mode" in error_of(capsys, train_ldm.parse_args, argv)


def test_schedule_and_terminal_snr_follow_the_prediction():
    kinds = {p: train_ldm.parse_args([f"--prediction={p}"]) for p in ("eps", "v", "x0", "flow")}
    schedules = {p: args.noise_schedule for p, args in kinds.items()}
    assert schedules == dict(eps="cosine", v="cosine", x0="cosine", flow="flow")
    terminal = {p: args.zero_terminal_snr for p, args in kinds.items()}
    assert terminal == dict(eps=False, v=True, x0=True, flow=True)
    assert train_ldm.parse_args(["--no-zero_terminal_snr"]).zero_terminal_snr is False


@pytest.fixture
def stored(tmp_path):
    """stored(FLAGS...) -> flags that continue the run `a`, made with these flags."""
    def make(*argv, **changes):
        (tmp_path / "a").mkdir()
        args = vars(train_ldm.parse_args([*argv, f"--output_root={tmp_path}"]))
        write_json(tmp_path / "a/run_meta.json", {"args": args | changes})
        (tmp_path / "a/metrics.jsonl").touch()
        return [f"--resume_dir={tmp_path / 'a'}"]
    return make


def test_a_continued_run_keeps_its_settings(stored, tmp_path, capsys):
    resume = stored("--mode=overfit_8", "--lr=1e-3", "--ldm_ch_mults=1,3", "--num_workers=3")
    args = train_ldm.parse_args([*resume, "--epochs=7", config(tmp_path, "num_workers = 2")])
    assert (args.mode, args.lr, args.ldm_ch_mults) == ("overfit_8", 1e-3, (1, 3))
    assert (args.epochs, args.num_workers) == (7, 2)
    out = capsys.readouterr().out
    assert "epochs=7 (was 1500)" in out and "num_workers=2 (was 3)" in out
    assert out.count("(was") == 2


def test_a_run_is_continued_by_its_name(stored, tmp_path, capsys):
    folder = stored("--lr=1e-3")[0].removeprefix("--resume_dir=")
    args = train_ldm.parse_args(["--run_name=a", f"--output_root={tmp_path}"])
    assert args.resume_dir == folder and args.lr == 1e-3
    assert train_ldm.parse_args(["--run_name=b", f"--output_root={tmp_path}"]).resume_dir is None
    refused = [f"--resume_dir={tmp_path}/b"]
    assert "not a run folder" in error_of(capsys, train_ldm.parse_args, refused)


def test_none_unsets_a_setting_of_the_continued_run(stored):
    resume = stored("--latent_scale_factor=2", "--max_steps=5")
    args = train_ldm.parse_args([*resume, "--latent_scale_factor=None", "--max_steps=None"])
    assert args.latent_scale_factor is None and args.max_steps is None


def test_a_run_of_another_version_goes_on(stored):
    args = train_ldm.parse_args(stored("--lr=1e-3", no_such_setting=3, sampler="dpmpp_sde"))
    assert args.lr == 1e-3 and not hasattr(args, "no_such_setting")
    assert args.sampler == "dpmpp_2m_sde"  # as it is called today


def test_a_damaged_setting_of_a_run_names_its_file(stored, capsys):
    message = error_of(capsys, train_ldm.parse_args, stored(lr="fast"))
    assert "a/run_meta.json: lr is a str" in message


def test_trainers_print_and_store_what_was_changed(capsys):
    parser = command_line.trainer_parser("First line.\nMore.", 64, 1e-4, 5, 8, "start here")
    args = parser.parse(["--wandb", "--lr=1e-3"])
    assert (args.img_size, args.epochs, args.batch_per_device) == (64, 5, 8)
    changed = command_line.print_settings(args, parser, {"device": "abacus"})
    assert changed == {"wandb": True, "lr": 1e-3}
    assert capsys.readouterr().out.split() == [
        "--", "settings", "that", "differ", "from", "--help", "wandb", "True",
        "lr", "0.001", "--", "this", "run", "device", "abacus"]


@pytest.mark.parametrize("stage", [train_vae, train_ldm, find_latent_scale, sample, evaluate])
def test_every_flag_has_one_meaning_and_a_help_text(stage):
    parser = stage.build_parser()
    assert all(a.help for a in parser._actions)
    text = parser.format_help()
    assert text.count("(default:") == len(parser._actions) - 1  # all but --help
