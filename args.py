"""Until the merge: callers still import `args`, and names that are gone from lib/args.py."""
from lib.args import *  # noqa: F403
from lib.args import BooleanFlag, add_check_argument, at_least, file_path, folder_name
from lib.args import Parser as bare_parser  # noqa: F401
from lib.args import parse_settings as parse_bare  # noqa: F401


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
