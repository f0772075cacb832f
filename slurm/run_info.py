"""Where a training command would write, without running it.

    python slurm/run_info.py NAME train_ldm.py ARGS...

Three lines: the run folder; `--run_name=NAME` if the arguments name no run, else empty; the step of its checkpoint,
-1 for none. Arguments that the program would refuse end with its message.
"""
import contextlib
import importlib
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def parse(program, argv):
    sys.argv[0] = program  # for usage messages
    return importlib.import_module(program.removesuffix(".py")).parse_args(argv)


def main():
    name, program, *argv = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        args = parse(program, argv)
        flag = ""
        if "run_name" in args and not (args.run_name or args.resume_dir):
            flag = f"--run_name={name}"
            args = parse(program, [*argv, flag])
    folder = pathlib.Path(args.output_root)
    if "run_name" in args:
        folder = pathlib.Path(args.resume_dir or folder / args.run_name)
    checkpoint = folder / "ckpts" / "last.pt"
    step = torch.load(checkpoint, mmap=True, weights_only=True)["step"] if checkpoint.exists() else -1
    print(folder, flag, step, sep="\n")


if __name__ == "__main__":
    main()
