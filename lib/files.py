"""Messages, and files that are whole or not there: what every program needs.

`fail` ends a program with one line; what it says is what to type next.
"""
import contextlib
import fcntl
import json
import math
import os
import pathlib
import shlex
import socket
import sys

# Exit codes that the job scripts know; any other is one that the program did not choose.
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request, saved; the same command goes on from there
EXIT_FAILED = 78  # EX_CONFIG: the same command would fail again


# --- messages -----------------------------------------------------------------------------------


def fail(message, code=EXIT_FAILED):
    """End the program with one line on standard error."""
    end = SystemExit(f"error: {message}")
    print(end, file=sys.stderr, flush=True)
    end.code = code  # its text stays the message
    raise end


def say(text):
    """print on rank 0. The reader may be gone: training does not end because Ctrl-C ended `tee`."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def notice(message):
    """One line from rank 0 that the reader should not miss."""
    say(f"note: {message}")


def first_line(error):
    """First line of an exception's message, at most 200 characters."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def command_line(program, *words, **flags):
    """A command to paste: `python PROGRAM WORD ... --name=value ...`, quoted, without flags that
    are None."""
    flags = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    return shlex.join(["python", program, *map(str, words), *flags])


def data_flags(args):
    """Flags for command_line that point another stage at the same data and caches."""
    defaults = {"output_root": "runs", "split": "train", "class_filter": -1,
                "skip_bad_images": False}
    other = {n: value for n, value in vars(args).items() if value != defaults.get(n, value)}
    return {"data_root": args.data_root, "task": args.task, **other}


# --- files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path):
    """End the program with one line if `path` cannot be written."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # the latter: torch.save on a full disk
        reason = getattr(e, "strerror", None) or getattr(e.__context__, "strerror", None)
        fail(f"cannot write {path}: {reason or first_line(e)}; free space or choose another folder")


def write_atomic(path, write):
    """Call write(file) on a temporary file beside `path`, flush it to the disk, then rename it.

    A reader sees the old file or the new one, never a part. If writing fails, the old one stays and
    the program ends with one line.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # the next write takes it over after a kill
    with writing(path):
        try:
            with open(temporary, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def make_folder(path):
    """Create a folder and its parents, and return its path; ends the program if that fails."""
    with writing(path):
        os.makedirs(path, exist_ok=True)
    return pathlib.Path(path)


# --- JSON ---------------------------------------------------------------------------------------


def finite(value):
    """A JSON value with null for every NaN or infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    """Write a JSON file atomically; NaN and infinity become null."""
    text = json.dumps(finite(value), indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda f: f.write(text.encode()))


def read_json(path, what=None):
    """The object in a JSON file. If it is missing or damaged, ends the program with what it should
    have been; without `what`, returns {}."""
    try:
        value = json.loads(pathlib.Path(path).read_bytes())
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value
    except (OSError, ValueError, RecursionError) as e:
        if what is None:
            return {}
        fail(f"{path} is not a readable {what}: {getattr(e, 'strerror', None) or first_line(e)}")


# --- locks --------------------------------------------------------------------------------------


def take_lock(path, what, wait=False):
    """Open file at `path` whose lock says that `what` is in use; keep it open for as long as it is.

    The system releases the lock when its process ends, however it ends. If `what` is in use, waits
    for it, or ends the program.
    """
    with writing(path):
        lock = open(path, "ab+", buffering=0)  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read(200).decode("utf-8", "replace").strip()
        if not wait:
            fail(f"{what} is in use by {owner}: wait until it ends, stop it, or give another "
                 "--run_name", EXIT_STOPPED)
        notice(f"{what} is in use by {owner}: waiting")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as e:  # a disk without locks
        notice(f"{what} cannot be locked ({e.strerror}): start no second run in it")
    with contextlib.suppress(OSError):  # the name is for the message only: a full disk may be
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return lock


# --- run folders --------------------------------------------------------------------------------


def named_folder(args):
    """Run folder that --resume_dir or --run_name names; None if neither is given."""
    named = args.run_name and os.path.join(args.output_root, args.run_name)
    return args.resume_dir or named


def read_meta(folder):
    """run_meta.json of a run; ends the program if it is missing or damaged."""
    meta = read_json(os.path.join(folder, "run_meta.json"), "description of a run")
    if not isinstance(meta.get("args"), dict):
        fail(f"{folder}/run_meta.json is not a readable description of a run: it holds no args")
    return meta
