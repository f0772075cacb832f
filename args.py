"""Command lines: types, the flags that stages share, config files, and who wins over whom.

Everything is argparse. Presets, the settings of a run that is continued and config files are turned
into flags and put before those of the command line, so that one parser judges every value and the
last one wins.
"""
import argparse
import difflib
import math
import os
import re
import runpy
import shutil
import sys
import types

from experiment import (check_kind, fail, first_line, holds_run, named_folder, notice,
                        read_run)

# --- types --------------------------------------------------------------------------------------


def boolean(text):
    """argparse type: 'True', 'false', '1', 'no', ... as a bool."""
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


def at_least(low, kind=int, high=math.inf):
    """argparse type: a finite number of `kind` from low to high; 64.0 and 1e3 count as integers."""
    def convert(text):
        try:
            try:
                value = kind(text)
            except ValueError:  # what sweeps write for integers: 64.0
                value = float(text)
                if kind(value) != value:
                    raise
                value = kind(value)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):
            name = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None
        if not finite or not low <= value <= high:
            most = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be a number of at least {low}{most}")
        return value
    return convert


def int_list(text):
    """argparse type: '1,2,4', '1:2:4' or '[1, 2, 4]', quoted or not, as a tuple of positive
    integers."""
    parts = re.sub("[\\[\\]()'\",:]", " ", text).split()
    try:
        return tuple(at_least(1)(part) for part in parts)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of positive integers such as 1,2,4") from None


def interval(text):
    """argparse type: 'LOW,HIGH' (or ':') as two floats with 0 <= LOW <= HIGH <= 1."""
    try:
        low, high = (float(part) for part in re.sub("[\\[\\]()'\",:]", " ", text).split())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers such as 0.2,0.8") from None
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not an interval within 0,1")
    return low, high


def file_path(text):
    """argparse type: a path, with ~ for the home folder; not empty, as of an unset variable."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path: is a variable unset?")
    return os.path.expanduser(text)


def folder_name(text):
    """argparse type: the name of one folder; not that of the caches."""
    if text in ("", ".", "..", "cache") or "/" in text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a run's folder name")
    return text


class BooleanFlag(argparse.Action):
    """--flag, --flag=True, --flag=false and --no-flag."""

    BARE = object()  # the value of a flag without one

    def __init__(self, option_strings, dest, **kwargs):
        negative = ["--no-" + o[2:] for o in option_strings]
        super().__init__([*option_strings, *negative], dest, nargs="?", const=self.BARE,
                         type=boolean, metavar="BOOL", **kwargs)

    def __call__(self, parser, namespace, value, option):
        negative = option.startswith("--no-")
        if negative and value is not self.BARE:
            parser.error(f"{option} takes no value; use --{option[5:]}={not value}")
        setattr(namespace, self.dest, not negative if value is self.BARE else value)


# --- parser -------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each flag, and the module's docstring as it stands."""

    def __init__(self, prog):
        width = min(110, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=34, width=width)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the file they come from and the closest flag."""

    source = ""  # "FILE: " while values of a file are parsed

    def error(self, message):
        fail(self.source + message)

    def _get_value(self, action, text):
        # A W&B agent passes None for what is not set.
        if text == "None" and action.default is None:
            return None
        return super()._get_value(action, text)

    def _check_value(self, action, value):
        if value is not None:
            super()._check_value(action, value)

    def parse(self, argv):
        """Namespace; ends the program on a flag that it does not know."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            launcher = os.environ.get("LAUNCHER_FLAGS", "").split()  # what slurm/ takes besides
            known = [*self._option_string_actions, *launcher]
            self.error(f"unknown argument {unknown[0]}{closest(flag, known)}")
        return args


def closest(name, known):
    """'; did you mean X?' where one of the known names is near."""
    match = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {match[0]}?" if match else ""


def bare_parser(doc):
    """Parser without a flag; doc: the program's docstring."""
    return Parser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)


def make_parser(doc):
    """Parser of one stage with the flags that every stage has; doc: the stage's docstring."""
    parser = bare_parser(doc)
    add = parser.add_argument_group("run").add_argument
    add("--config", type=file_path,
        help="Python file of `name = value` lines; the command line wins over it")
    add("--seed", type=at_least(0, int, 2**63 - 1), default=0, help="of weights, order and noise")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser


def add_data_arguments(parser, split="train", img_size=256):
    """What data.open_images takes; img_size None: that of the model in use."""
    add = parser.add_argument_group("data").add_argument
    add("--data_root", type=file_path,
        help="folder of TASK/SPLIT/CLASS/*.png; None: the phantom set")
    add("--task", default="TB", help="folder below data_root; ALL_CXR joins all tasks")
    add("--split", default=split, help="split to use")
    size = "side in pixels" if img_size else "side in pixels; None: that of the model in use"
    add("--img_size", type=at_least(1), default=img_size, help=size)
    add("--class_filter", type=at_least(-1), default=-1, help="index of the only class; -1: all")
    add("--skip_bad_images", action=BooleanFlag, default=False, help="leave out unreadable images")
    add("--num_workers", type=at_least(0), default=0,
        help="threads of each process that decode images; 0: one per core")
    add("--output_root", type=file_path, default="runs", help="folder of run folders and caches")


def add_precision_arguments(parser):
    """How networks run that are compiled and autocast."""
    add = parser.add_argument_group("precision and speed").add_argument
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
        help="autocast type; auto: bf16 where the hardware multiplies it")
    add("--compile", choices=("auto", "on", "off"), default="auto",
        help="torch.compile of whole networks; auto: on for CUDA")


def add_check_argument(parser):
    """What the job scripts ask before they queue anything."""
    parser.add_argument(
        "--check", nargs="?", const="inputs", choices=("inputs", "flags"),
        help="check the flags and that what they name is there, print the run's folder and its "
             "step, and leave; =flags: another job will make the inputs")


def add_training_arguments(parser, lr, epochs, batch_per_device):
    """What both trainers take, with the defaults that differ."""
    add = parser.add_argument_group("run folder").add_argument
    add("--exp_name", type=folder_name,
        help="first part of the run folder's name; None: from stage and task")
    add("--run_name", type=folder_name,
        help="whole name of the run folder; an existing run of this name goes on")
    add("--resume_dir", type=file_path,
        help="run folder to continue, with its own settings where none are given")
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
    add("--wandb_artifacts", action=BooleanFlag, default=False,
        help="upload the checkpoint to use at the end")
    add = parser.add_argument_group("optimiser").add_argument
    add("--lr", type=at_least(0, float), default=lr, help="AdamW learning rate after warm-up")
    add("--weight_decay", type=at_least(0, float), default=0.01, help="AdamW weight decay")
    add("--grad_clip", type=at_least(0, float), default=1.0, help="L2 norm of gradients; 0: off")
    add("--epochs", type=at_least(1), default=epochs, help="passes over the data")
    add("--max_steps", type=at_least(0), help="most optimiser steps; None: by epochs")
    add("--batch_per_device", type=at_least(1), default=batch_per_device,
        help="images per process and micro-step")
    add("--max_bad_steps", type=at_least(1), default=20,
        help="stop after this many non-finite steps in a row")
    add("--overfit_one", action=BooleanFlag, default=False, help="train on a single image")
    add("--overfit_k", type=at_least(0), default=0, help="train on K images; 0: all")
    add("--repeat_len", type=at_least(1), default=100,
        help="times that overfit_one repeats its image per epoch")


def add_autoencoder_arguments(parser):
    """Which trained autoencoder to use."""
    add = parser.add_argument_group("autoencoder").add_argument
    add("--ae_ckpt_path", type=file_path,
        help="ckpts/last.pt of a train_vae.py run; None: of the newest run of the task")
    add("--ae_config_path", type=file_path,
        help="a run's run_meta.json: takes that run, or checks --ae_ckpt_path against it")


def add_sampling_arguments(parser, samplers, sampler, num_sampling_steps, num_samples):
    """What is drawn from a trained model; samplers: the names there are, the rest are defaults."""
    add = parser.add_argument_group("sampling").add_argument
    add("--ckpt", type=file_path, help="ckpts/best.pt, or last.pt, of a train_ldm.py run")
    add("--ae_ckpt_path", type=file_path,
        help="the autoencoder's checkpoint, if it is not where training had it")
    add("--classes", help="comma list of class names; None: all")
    add("--num_samples", type=at_least(1), default=num_samples, help="images per class")
    add("--sampler", choices=samplers, default=sampler,
        help="ancestral: DDPM; dpmpp, dpmpp_sde: DPM-Solver++ 2M, without and with fresh noise")
    add("--num_sampling_steps", type=at_least(1), default=num_sampling_steps,
        help="network evaluations per image")
    add("--guidance_scale", type=at_least(0, float),
        help="classifier-free guidance, 1: none; None: as in training")
    add("--guidance_interval", type=interval,
        help="LOW,HIGH: guidance for t between them; None: as in training")
    add("--use_ema", action=BooleanFlag, help="averaged weights; None: if there are any")
    add("--batch_size", type=at_least(1), default=16, help="images sampled at once")
    add("--out_dir", type=file_path, help="folder for the results; None: in the run folder")


# --- who wins -----------------------------------------------------------------------------------

NOT_STORED = ("help", "check", "resume_dir")  # flags of this start, not settings of the run


def read_config(path):
    """{name: value} of a config file: the public names of a Python file run in an empty namespace.

    Ends the program where the file is missing or broken.
    """
    if not os.path.isfile(path):
        fail(f"no config file {path}")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        fail(f"{path}: {type(e).__name__}: {first_line(e)}")
    return {name: value for name, value in names.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)}


def as_flags(parser, settings, source):
    """['--name=value', ...] of settings from the file `source`.

    Ends the program, naming the file, on what the command line would refuse, and on what text would
    hide: a string where a number belongs, or a number where a string does.
    """
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    flags = []
    for name, value in settings.items():
        if name not in actions:
            fail(f"{source}: unknown setting {name!r}{closest(name, actions)}")
        takes_text = actions[name].type in (None, file_path, folder_name)
        unset = value is None and actions[name].default is None
        parts = value if isinstance(value, (list, tuple)) and value else [value]
        if any(isinstance(part, str) != takes_text for part in parts) and not unset:
            fail(f"{source}: {name} is a {type(value).__name__}, expected "
                 f"{'text' if takes_text else 'no text'}")
        try:
            flags.append(f"--{name}={value}")
        except ValueError as e:  # an integer too long to print
            fail(f"{source}: {name}: {e}")
    parser.source = f"{source}: "
    parser.parse(flags)
    parser.source = ""
    return flags


def stored_flags(parser, folder, kind):
    """Flags of the run in `folder`, without those that this version does not know any more. Ends
    the program where it is of another trainer, whose flags of that name may mean other things."""
    known = {a.dest for a in parser._actions} - {*NOT_STORED, "config"}
    meta = read_run(folder)
    check_kind(meta.get("kind", kind), kind, folder)
    if "created" not in meta:
        notice(f"{folder}/run_meta.json is gone or damaged: the settings are the checkpoint's")
    settings = {k: v for k, v in meta["args"].items() if k in known}
    return as_flags(parser, settings, os.path.join(folder, "run_meta.json"))


def run_to_continue(args):
    """Folder of the run that --resume_dir or --run_name names, None where there is none yet."""
    folder = named_folder(args)
    if folder and holds_run(folder):
        return folder
    if getattr(args, "resume_dir", None):
        fail(f"--resume_dir={folder} is no run folder (no run_meta.json in it)")
    return None


def end_with_one_line(kind, value, traceback):
    """sys.excepthook: Ctrl-C is no error of the program, and needs no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, value, traceback)


def set_up_console():
    """Have what is printed fit any terminal, and Ctrl-C leave one line."""
    for stream in (sys.stdout, sys.stderr):  # a file name may not fit the terminal's encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = end_with_one_line


def parse_bare(parser, argv=None):
    """Arguments of a program without config file, preset or run to go on with; ends the program on
    bad ones. argv: the command line without the program."""
    set_up_console()
    return parser.parse(sys.argv[1:] if argv is None else argv)


def parse_settings(parser, argv=None, preset=None, kind=None):
    """Settings: defaults < preset < the run being continued < --config < command line.

    argv: the command line without the program. preset: function from the settings as they would be
    without it to {name: new default}; raises ValueError where they contradict each other. kind:
    of the runs that this stage goes on with, 'vae' or 'ldm'.
    """
    set_up_console()
    argv = sys.argv[1:] if argv is None else argv
    config_path = parser.parse(argv).config
    from_config = as_flags(parser, read_config(config_path), config_path) if config_path else []
    given = [*from_config, *argv]
    folder = run_to_continue(parser.parse(given))
    from_run = stored_flags(parser, folder, kind) if folder else []
    from_preset = []
    if preset:
        try:
            from_preset = as_flags(parser, preset(parser.parse(from_run + given)), "preset")
        except ValueError as e:
            fail(e)
    args = parser.parse(from_preset + from_run + given)
    if folder:
        args.resume_dir = folder
        before = vars(parser.parse(from_run))
        for name in (flag[2:].split("=")[0] for flag in from_run):
            if vars(args)[name] != before[name]:
                notice(f"{folder} continues with {name}={vars(args)[name]} (was {before[name]})")
    return args


def changed_settings(args, parser):
    """Names of the settings whose value is not the default, in the parser's order."""
    return [action.dest for action in parser._actions if action.dest not in NOT_STORED
            and getattr(args, action.dest) != action.default]


def print_settings(args, parser, facts):
    """Table of all settings by group, `*` before what is no default; then facts {name: text}."""
    print(parser.description.split("\n")[0])
    changed = changed_settings(args, parser)
    for group in parser._action_groups:
        cells = []
        for action in group._group_actions:
            if action.dest in NOT_STORED:
                continue
            value = getattr(args, action.dest)
            mark = "*" if action.dest in changed else " "
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            cells.append(f"{mark}{action.dest:<21} {text!s:<14}")
        if cells:
            print(f"-- {group.title}")
        for i in range(0, len(cells), 3):
            print(" ".join(cells[i:i + 3]).rstrip())
    print("-- this run")
    for name, value in facts.items():
        print(f" {name:<21} {value}")
    sys.stdout.flush()
