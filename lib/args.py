"""Command lines: argument types, the flags that stages share, config files, and precedence.

Everything is argparse. Presets, the settings of the run being continued and config files are
converted and checked by the type of each flag, then serve as defaults of the command line.
"""
import argparse
import difflib
import math
import os
import re
import runpy
import signal
import types

from lib.files import EXIT_STOPPED, fail, first_line, named_folder, notice, read_meta

# --- types --------------------------------------------------------------------------------------


def boolean(text):
    """argparse type: 'True', 'false', '1', 'no', ... as a bool."""
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


def integer(text):
    """Integer from '7', '64.0' or '1e3'; raises ValueError if it is not one."""
    try:
        return int(text)  # float would round large seeds
    except ValueError:
        if not float(text).is_integer():
            raise
        return int(float(text))


def at_least(low, kind=integer, high=math.inf):
    """argparse type: a finite number of `kind` from low to high."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not at least {low}, at most {high}")
        return value
    convert.__name__ = kind.__name__  # as argparse names it in "invalid float value"
    return convert


def list_items(text):
    """Items of '1,2,4', '1:2:4' or '[1, 2, 4]', quoted or not."""
    return re.sub("[\\[\\]()'\",:]", " ", text).split()


def int_list(text):
    """argparse type: a list such as '1,2,4' as a tuple of positive integers."""
    return tuple(at_least(1)(item) for item in list_items(text))


def float_list(text):
    """argparse type: a list such as '1,2.5' as a tuple of numbers."""
    return tuple(float(item) for item in list_items(text))


def interval(text):
    """argparse type: 'LOW,HIGH' as two floats with 0 <= LOW < HIGH <= 1."""
    low, high = (float(item) for item in list_items(text))
    if not 0 <= low < high <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not LOW,HIGH with 0 <= LOW < HIGH <= 1")
    return low, high


def file_path(text):
    """argparse type: a path, with ~ for the home folder; not empty, as from an unset variable."""
    if not text:
        raise argparse.ArgumentTypeError("empty path: is a variable unset?")
    return os.path.expanduser(text)


def folder_name(text):
    """argparse type: the name of one folder, except `cache`, which holds the caches."""
    if text in ("", ".", "..", "cache") or "/" in text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a run's folder name")
    return text


class BooleanFlag(argparse.Action):
    """--flag, --flag=True, --flag=false and --no-flag."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__([*option_strings, f"--no-{dest}"], dest, nargs="?", const=True,
                         type=boolean, metavar="BOOL", **kwargs)

    def __call__(self, parser, namespace, value, option):
        if value is not None:
            value = value != option.startswith("--no-")
        setattr(namespace, self.dest, value)


# --- parser -------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each flag; the module's docstring unchanged."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the closest flag; doc: the program's docstring."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        fail(message)

    def _get_value(self, action, text):
        # A W&B agent passes None for a setting that is not set.
        if text == "None" and action.default is None:
            return None
        return super()._get_value(action, text)

    def parse(self, argv, settings=()):
        """Namespace of argv. settings: {name: value} used instead of the flags' defaults."""
        args, unknown = self.parse_known_args(argv, argparse.Namespace(**dict(settings)))
        if unknown:
            match = closest(unknown[0].split("=")[0], self._option_string_actions)
            self.error(f"unknown argument {unknown[0]}{match}")
        return args


MEANINGS = {  # flag: what DiT, diffusers and nanoGPT call it, if that does not look similar
    "lr": "learning_rate base_learning_rate",
    "batch_per_device": "batch_size train_batch_size global_batch_size",
    "grad_clip": "max_grad_norm", "epochs": "num_train_epochs", "img_size": "resolution",
    "ckpt": "ckpt_path checkpoint_path model model_path resume"}


def closest(name, known):
    """'; did you mean X?' if one of the known names means the same or is similar, else ''."""
    word = name.lstrip("-").replace("-", "_")
    dashes = "--" * name.startswith("--")
    match = [dashes + flag for flag, words in MEANINGS.items()
             if word in words.split() and dashes + flag in known]
    match = match or difflib.get_close_matches(dashes + word, known, 1, 0.5)
    return f"; did you mean {match[0]}?" if match else ""


def make_parser(doc):
    """Parser with the flags that every stage has."""
    parser = Parser(doc)
    add = parser.add_argument_group("run").add_argument
    add("--config", type=file_path, help="Python file of `name = value`; the command line wins")
    add("--seed", type=at_least(0, high=2**63 - 1), default=0, help="of weights, order and noise")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser


def add_data_arguments(parser, split="train", img_size=256):
    """Flags of data.open_images; img_size None: that of the model in use."""
    add = parser.add_argument_group("data").add_argument
    add("--data_root", type=file_path, help="folder of TASK/SPLIT/CLASS/*.png; None: phantoms")
    add("--task", default="TB", help="folder below data_root; ALL_CXR joins all tasks")
    add("--split", default=split, help="split to use")
    add("--img_size", type=at_least(1), default=img_size, help="side; None: as the model in use")
    add("--class_filter", type=at_least(-1), default=-1, help="index of the only class; -1: all")
    add("--skip_bad_images", action=BooleanFlag, default=False, help="leave out unreadable images")
    add("--num_workers", type=at_least(0), default=0, help="decoding threads; 0: one per core")
    add("--output_root", type=file_path, default="runs", help="folder of run folders and caches")


def add_precision_arguments(parser):
    """How networks run."""
    add = parser.add_argument_group("precision and speed").add_argument
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where fast")
    add("--compile", choices=("auto", "on", "graphs", "norms", "off"), default="auto",
        help="auto: on for CUDA, norms for long bf16 runs on a CPU; graphs: on, with CUDA graphs")


def add_check_argument(parser):
    """--check, with which the job scripts test a command before they queue it."""
    parser.add_argument(
        "--check", nargs="?", const="inputs", choices=("inputs", "flags"),
        help="check the flags and that their inputs exist, and exit; flags: inputs may come later")


def trainer_parser(doc, img_size, lr, epochs, batch_per_device, init_from_help):
    """Parser with the flags that both trainers have; the arguments are what differs."""
    parser = make_parser(doc)
    add_data_arguments(parser, img_size=img_size)
    add_precision_arguments(parser)
    add = parser.add_argument_group("run folder").add_argument
    add("--exp_name", type=folder_name, help="start of the folder's name; None: stage and task")
    add("--run_name", type=folder_name, help="name of the folder; an existing run continues")
    add("--resume_dir", type=file_path, help="run folder to continue with its own settings")
    add("--init_from", type=file_path, help=init_from_help)
    add("--save_minutes", type=at_least(0, float), default=10.0, help="time between checkpoints")
    add_check_argument(parser)
    add = parser.add_argument_group("logging").add_argument
    add("--log_every", type=at_least(1), default=100, help="steps between log lines")
    add("--sample_every", type=at_least(1), default=10, help="epochs between evaluations")
    add("--wandb", action=BooleanFlag, default=False, help="log to Weights & Biases")
    add("--wandb_project", default="cxr-ldm", help="W&B project")
    add("--wandb_entity", help="W&B user or team")
    add("--wandb_tags", default="", help="comma list")
    add("--wandb_id", help="W&B run to continue")
    add = parser.add_argument_group("optimizer").add_argument
    add("--lr", type=at_least(0, float), default=lr, help="AdamW learning rate after warm-up")
    add("--weight_decay", type=at_least(0, float), default=0.01, help="AdamW weight decay")
    add("--grad_clip", type=at_least(0, float), default=1.0, help="L2 norm of gradients; 0: off")
    add("--epochs", type=at_least(1), default=epochs, help="passes over the data")
    add("--max_steps", type=at_least(0), help="most optimizer steps; None: from epochs")
    add("--batch_per_device", type=at_least(1), default=batch_per_device, help="images at once")
    add("--max_bad_steps", type=at_least(1), default=20, help="most non-finite ones in a row")
    add("--overfit_one", action=BooleanFlag, default=False, help="train on a single image")
    add("--overfit_k", type=at_least(0), default=0, help="train on K images; 0: all")
    add("--repeat_len", type=at_least(1), default=100, help="repeats per epoch with --overfit_one")
    return parser


def add_autoencoder_arguments(parser):
    """Which trained autoencoder to use."""
    add = parser.add_argument_group("autoencoder").add_argument
    add("--ae_ckpt_path", type=file_path, help="its ckpts/last.pt; None: the task's newest run")
    add("--ae_config_path", type=file_path, help="its run_meta.json, in place of --ae_ckpt_path")


def add_sampling_arguments(parser, samplers, num_samples):
    """What to draw from a trained model; samplers: all names; num_samples: the default."""
    add = parser.add_argument_group("sampling").add_argument
    add("--ckpt", type=file_path, help="ckpts/best.pt, or last.pt, of a train_ldm.py run")
    add("--ae_ckpt_path", type=file_path, help="the autoencoder's checkpoint, if it was moved")
    add("--classes", help="comma list of class names; None: all")
    add("--num_samples", type=at_least(1), default=num_samples, help="images per class")
    add("--sampler", choices=samplers, help="ancestral: DDPM; dpmpp_2m: DPM-Solver++(2M); "
        "dpmpp_2m_sde: the same with fresh noise; None: as in training")
    add("--num_sampling_steps", type=at_least(1), help="of the sampler; None: as in training")
    add("--guidance_scale", type=at_least(1, float), help="1: no guidance; None: as in training")
    add("--guidance_interval", type=interval, help="LOW,HIGH of guided t; None: as in training")
    add("--use_ema", action=BooleanFlag, help="averaged weights; None: if there are any")
    add("--batch_size", type=at_least(1), default=16, help="images sampled at once")
    add("--out_dir", type=file_path, help="folder for the results; None: in the run folder")


# --- precedence ---------------------------------------------------------------------------------

NOT_STORED = ("help", "check", "resume_dir")  # flags of one start, not of the run
RENAMED_SAMPLERS = {"dpmpp": "dpmpp_2m", "dpmpp_sde": "dpmpp_2m_sde"}  # in runs made before


def read_config(path):
    """{name: value} of a config file: the public names of a Python file run in an empty namespace.
    Ends the program if the file is missing or broken."""
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        fail(f"{path}: {type(e).__name__}: {first_line(e)}")
    for name in names.get("__annotations__", {}):
        if name not in names:  # YAML is an annotation in Python
            fail(f"{path}: `{name}: ...` sets nothing; write it in Python, `{name} = ...`")
    settings = {name: value for name, value in names.items()
                if not name.startswith("_") and not isinstance(value, types.ModuleType)}
    return settings or fail(f"{path} sets nothing: a config is lines of `name = value`")


def convert_settings(parser, settings, source):
    """{name: value} of settings from the file `source`, each converted by the type of its flag.
    Ends the program, naming the file, if one is unknown or of another type."""
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    unknown, converted = [name for name in settings if name not in actions], {}
    if unknown:
        hint = closest(unknown[0], actions)
        if any(name.startswith("ldm_") or f"ldm_{name}" in actions for name in unknown):
            hint = "; it is a config of the other trainer"
        fail(f"{source}: unknown setting {unknown[0]!r}{hint}")
    for name, value in settings.items():
        action = actions[name]
        if value is None and action.default is None:
            converted[name] = None
            continue
        expected = "a string" if action.type in (None, file_path, folder_name) else "no string"
        if isinstance(value, str) != (expected == "a string"):
            fail(f"{source}: {name} is a {type(value).__name__}, expected {expected}")
        try:
            converted[name] = parser._get_value(action, str(value))
            parser._check_value(action, converted[name])
        except (argparse.ArgumentError, ValueError) as e:  # ValueError: too many digits to print
            fail(f"{source}: {name}: {first_line(e)}")
    return converted


def run_to_continue(parser, args, kind):
    """(folder, settings) of the run that --resume_dir or --run_name names, without settings that
    this version no longer has; (None, {}) if there is none yet. kind: of the trainer."""
    folder = named_folder(args)
    signs = ("ckpts/last.pt", "ckpts/best.pt", "metrics.jsonl")
    if not folder or not any(os.path.exists(os.path.join(folder, sign)) for sign in signs):
        if args.resume_dir:
            fail(f"--resume_dir={folder} is not a run folder: give one such as runs/ldm_...")
        return None, {}
    meta = read_meta(folder)
    if meta.get("kind", kind) != kind:
        fail(f"{folder} is a run of train_{meta['kind']}.py, not of train_{kind}.py")
    known = {a.dest for a in parser._actions} - {*NOT_STORED, "config"}
    settings = {name: value for name, value in meta["args"].items() if name in known}
    if settings.get("sampler") in RENAMED_SAMPLERS:
        settings["sampler"] = RENAMED_SAMPLERS[settings["sampler"]]
    return folder, convert_settings(parser, settings, os.path.join(folder, "run_meta.json"))


def parse_settings(parser, argv=None, preset=None, kind=None):
    """Settings: defaults < preset < the run being continued < --config < command line. Ends the
    program if they are bad. A trainer gives preset, {name: new default} from the other settings,
    and the kind of its runs, vae or ldm."""
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted", EXIT_STOPPED))
    path = getattr(parser.parse(argv), "config", None)
    config = convert_settings(parser, read_config(path), path) if path else {}
    folder, stored, settings = None, {}, config
    if kind:
        folder, stored = run_to_continue(parser, parser.parse(argv, config), kind)
        settings = stored | config | ({"resume_dir": folder} if folder else {})
        settings = preset(parser.parse(argv, settings)) | settings
    args = parser.parse(argv, settings)
    for name, before in stored.items():
        if (now := getattr(args, name)) != before:
            notice(f"{folder} continues with {name}={now} (was {before})")
    return args


def print_settings(args, parser, facts):
    """Print the settings that differ from the defaults, then facts {name: text}; returns the former
    as {name: value}."""
    changed = {a.dest: getattr(args, a.dest) for a in parser._actions
               if a.dest not in NOT_STORED and getattr(args, a.dest) != a.default}
    for title, values in (("settings that differ from --help", changed), ("this run", facts)):
        print(f"-- {title}")
        for name, value in values.items():
            print(f" {name:<21} {value}", flush=True)
    return changed
