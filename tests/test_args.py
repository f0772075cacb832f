"""Flags, config files, and who wins over whom."""
import math

import pytest
from conftest import error_of

import evaluate
import experiment
import find_latent_scale
import sample
import train_ldm
import train_vae


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
    (["--wandb"], True), (["--wandb=True"], True), (["--wandb=true"], True),
    (["--wandb", "1"], True), (["--no-wandb"], False), (["--wandb=false"], False),
    (["--wandb", "False"], False), (["--wandb=0"], False),
    (["--wandb", "--no-wandb"], False), (["--no-wandb", "--wandb"], True)])
def test_booleans(argv, expected):
    args = train_ldm.parse_args([*argv, "--seed=3"])
    assert args.wandb is expected and args.seed == 3


@pytest.mark.parametrize("argv, expected", [
    (["--ldm_ch_mults=1,2,4"], (1, 2, 4)), (["--ldm_ch_mults", "1:2:4"], (1, 2, 4)),
    (["--ldm_ch_mults=[1, 2, 4]"], (1, 2, 4)), (["--ldm_ch_mults=(3,)"], (3,)),
    (["--ldm_ch_mults=8"], (8,))])
def test_lists(argv, expected):
    assert train_ldm.parse_args(argv).ldm_ch_mults == expected


def test_an_empty_list_is_a_value():
    assert train_ldm.parse_args(["--ldm_attn_res="]).ldm_attn_res == ()


@pytest.mark.parametrize("text, value", [("64.0", 64), ("1e3", 1000), ("7", 7)])
def test_an_integer_may_come_as_a_float_where_it_is_one(text, value):
    epochs = train_ldm.parse_args([f"--epochs={text}"]).epochs
    assert epochs == value and type(epochs) is int


def test_a_large_seed_keeps_every_digit():
    assert train_ldm.parse_args([f"--seed={2**63 - 1}"]).seed == 2**63 - 1


def test_both_ways_to_write_a_number():
    assert train_ldm.parse_args(["--lr=1e-3", "--epochs", "7"]).lr == 1e-3
    assert train_ldm.parse_args(["--lr", "1e-3", "--epochs=7"]).epochs == 7


@pytest.mark.parametrize("name", [
    "data_root", "exp_name", "latent_scale_factor", "img_size", "zero_terminal_snr",
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
    (["--ldm_ch_mults=1,x"], "ldm_ch_mults"),
    (["--lr=nan"], "lr"), (["--lr=inf"], "lr"), (["--lr=-1"], "lr"),
    (["--epochs=0"], "epochs"), (["--epochs=1.5"], "epochs"), (["--img_size=-4"], "img_size"),
    (["--prediction=epsilon"], "prediction"), (["stray"], "stray"),
    (["--prob_uncond=1.5"], "prob_uncond"),
    (["--sampler=euler"], "ddim"), (["--ldm_ch_mults=1,0"], "ldm_ch_mults")])
def test_bad_arguments_are_refused_by_name(capsys, argv, says):
    assert says in error_of(capsys, train_ldm.parse_args, argv)


def test_a_seed_that_no_generator_takes_is_refused(capsys):
    assert "seed" in error_of(capsys, train_ldm.parse_args, [f"--seed={2**64}"])


def test_guidance_without_a_null_class_is_refused_and_allowed_at_1(capsys):
    refused = ["--prob_uncond=0", "--guidance_scale=2"]
    assert "null class" in error_of(capsys, train_ldm.parse_args, refused)
    args = train_ldm.parse_args(["--overfit_k=8", "--guidance_scale=2"])  # a config may have it
    assert args.guidance_scale == 1
    assert "no null class" in capsys.readouterr().out
    assert train_ldm.parse_args(["--prob_uncond=0", "--guidance_scale=1"]).prob_uncond == 0


# --- config files ---


@pytest.mark.parametrize("text, says", [
    ("learning_rate = 1\nlog_evry = 5", "unknown setting"),
    ("log_evry = 5", "did you mean log_every?"),
    ("epochs = 2.5", "epochs"), ("epochs = '3'", "epochs"), ("epochs = True", "epochs"),
    ("lr = 'small'", "lr"), ("lr = float('nan')", "lr"), ("lr = float('inf')", "lr"),
    ("lr = -1.0", "lr"), ("lr = None", "lr"),
    ("wandb = 2", "wandb"), ("wandb = 'yes'", "wandb"), ("ldm_ch_mults = '1,2'", "ldm_ch_mults"),
    ("ldm_ch_mults = ('1', 2)", "ldm_ch_mults"), ("ldm_ch_mults = {1: 2}", "ldm_ch_mults"),
    ("ldm_ch_mults = (1, 'x')", "ldm_ch_mults"), ("ldm_ch_mults = (1, 2.5)", "ldm_ch_mults"),
    ("prediction = 'epsilon'", "prediction"), ("task = 5", "task"), ("epochs = 0", "epochs"),
    ("lr = = 3", "SyntaxError"), ("1 / 0", "ZeroDivisionError"),
    ("raise SystemExit(0)", "SystemExit"),
    ("x = undefined", "NameError"), ("config = 'other.py'", "config")])
def test_bad_config_files_are_refused_with_file_and_setting(capsys, tmp_path, text, says):
    with pytest.raises(SystemExit) as e:
        train_ldm.parse_args([config(tmp_path, text)])
    message = str(e.value)
    assert message.startswith("error: ")
    assert says in message and "settings.py" in message
    assert len(message.splitlines()) == 1


def test_a_missing_config_file_is_named(capsys, tmp_path):
    missing = [f"--config={tmp_path}/nowhere.py"]
    assert "nowhere.py" in error_of(capsys, train_ldm.parse_args, missing)
    assert "no config file" in error_of(capsys, train_ldm.parse_args, [f"--config={tmp_path}"])


def test_config_values_arrive_in_the_arguments_types(tmp_path):
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


def test_a_continued_run_keeps_its_settings_unless_told_otherwise(tmp_path, capsys):
    folder = tmp_path / "a"
    folder.mkdir()
    argv = ["--mode=overfit_8", "--lr=1e-3", "--ldm_ch_mults=1,3", f"--output_root={tmp_path}"]
    old = vars(train_ldm.parse_args(argv))
    experiment.write_json(folder / "run_meta.json", {"args": old})
    args = train_ldm.parse_args([f"--resume_dir={folder}", "--epochs=7"])
    assert (args.mode, args.lr, args.ldm_ch_mults, args.epochs) == ("overfit_8", 1e-3, (1, 3), 7)
    assert "epochs=7 (was 1500)" in capsys.readouterr().out
    by_name = train_ldm.parse_args(["--run_name=a", f"--output_root={tmp_path}"])
    assert by_name.resume_dir == str(folder) and by_name.lr == 1e-3
    assert train_ldm.parse_args(["--run_name=b", f"--output_root={tmp_path}"]).resume_dir is None
    assert "not a run folder" in error_of(capsys, train_ldm.parse_args, [f"--resume_dir={tmp_path}/b"])


@pytest.mark.parametrize("stage", [train_vae, train_ldm, find_latent_scale, sample, evaluate])
def test_every_flag_has_one_meaning_and_a_help_text(stage):
    parser = stage.build_parser()
    assert all(a.help for a in parser._actions)
    text = parser.format_help()
    assert text.count("(default:") == len(parser._actions) - 1  # all but --help
