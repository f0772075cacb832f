"""Shared fixtures: tiny runs that many tests read, and ways to call a stage as a process."""
import faulthandler
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lib import phantom
from lib.files import EXIT_FAILED


os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "disabled"
torch.set_num_threads(1)

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT_S = 150  # after which a process counts as hanging

TINY_VAE = """
img_size = 32
z_channels = 2
base_ch = 8
ch_mults = (1, 2, 2)
num_res_blocks = 1
batch_per_device = 8
lr = 2e-3
disc_start = 90
log_every = 10
sample_every = 1000
"""

TINY_LDM = """
ldm_base_ch = 16
ldm_ch_mults = (1, 2)
ldm_num_res_blocks = 1
ldm_attn_res = (4,)
prediction = "v"
num_sampling_steps = 10
sample_batch_size = 4
batch_per_device = 8
lr = 1e-3
warmup_steps = 5
log_every = 5
sample_every = 5
wandb = False
"""


# --- calling a stage ----------------------------------------------------------------------------


def python(processes):
    """The words before a script's name that run it on `processes` processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else [])]


def start(*argv, processes=1, cwd=ROOT):
    """Popen of `python SCRIPT ARGS...`, under torchrun if there are several processes."""
    script = argv[0] if os.path.isabs(str(argv[0])) else ROOT / argv[0]
    # Under nohup children would ignore SIGHUP.
    hear = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    return subprocess.Popen(
        [*python(processes), str(script), *map(str, argv[1:])],
        cwd=cwd, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, preexec_fn=hear,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def is_alive(pid):
    """Whether a process of this machine runs and is no zombie."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def run(*argv, code=0, timeout=300, **kwargs):
    """(stdout, stderr) of a stage in its own process; asserts that its exit code is `code`."""
    process = start(*argv, **kwargs)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def _as_main(argv, out, err, cwd, env=()):
    # `python SCRIPT ARGS` in a fork of a process that has imported torch.
    for number, path in ((1, out), (2, err)):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    faulthandler.dump_traceback_later(LIMIT_S - 10)  # where does it hang?
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A runaway stage must not take the machine along.
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    os.environ.update(env, CUDA_VISIBLE_DEVICES="")
    os.chdir(cwd)
    sys.argv = [str(ROOT / argv[0]), *map(str, argv[1:])]
    sys.path.insert(0, str(ROOT))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()


@pytest.fixture(scope="session")
def fork_server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "PIL.Image", "torch.distributed", "torch._dynamo"])
    return context


@pytest.fixture(scope="session")
def together(fork_server, tmp_path_factory):
    """together([argv, ...]) -> [exit code, stdout, stderr of each]: stages run at the same time,
    without the 2 s of importing torch. ranks: as the processes of one run, as torchrun starts them.
    """
    def call(commands, ranks=False, cwd=ROOT):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        started, results = [], []
        for i, argv in enumerate(commands):
            env = {"RANK": i, "LOCAL_RANK": i, "WORLD_SIZE": len(commands),
                   "LOCAL_WORLD_SIZE": len(commands), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": port} if ranks else {}
            env = {**os.environ, **{k: str(v) for k, v in env.items()}}
            folder = tmp_path_factory.mktemp("output")
            process = fork_server.Process(target=_as_main, args=(
                argv, str(folder / "out"), str(folder / "err"), str(cwd), env))
            process.start()
            started.append((process, folder))
        deadline = time.monotonic() + LIMIT_S
        for process, _ in started:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [process for process, _ in started if process.is_alive()]
        for process in hanging:
            process.kill()
            process.join()
        for process, folder in started:
            out, err = ((folder / name).read_text() for name in ("out", "err"))
            results.append(SimpleNamespace(code=process.exitcode, out=out, err=err))
        assert not hanging, f"{commands} still run\n" + "\n".join(r.out + r.err for r in results)
        return results
    return call


@pytest.fixture(scope="session")
def quick(together):
    """quick(SCRIPT, ARGS...) -> exit code, stdout, stderr of one stage."""
    return lambda *argv, cwd=ROOT: together([argv], cwd=cwd)[0]


def only_error(result):
    """The one line that a failed stage wrote to standard error."""
    assert "Traceback" not in result.err + result.out, result.err
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert result.code != 0 and len(lines) == 1 and lines[0].startswith("error: "), result.err
    return lines[0]


def error_of(capsys, function, *args, code=EXIT_FAILED, **kwargs):
    """Last line of the error message of a call, which must exit with `code`."""
    with pytest.raises(SystemExit) as e:
        function(*args, **kwargs)
    text = capsys.readouterr().err.strip()
    assert e.value.code == code and text
    return text.splitlines()[-1]


# --- data and runs ------------------------------------------------------------------------------


def write_png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def image_tree(tmp_path):
    """image_tree({'TB/train/normal': 3, ...}) -> data root with that many 40x40 images each."""
    def build(counts, name="data"):
        rng = np.random.default_rng(0)
        for folder, count in counts.items():
            target = tmp_path / name / folder
            target.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                write_png(target / f"{i}.png", rng.integers(0, 256, (40, 40), dtype=np.uint8))
        return tmp_path / name
    return build


def tree_hashes(root):
    """{relative path: sha256, None for a folder}, without locks, which hold process ids."""
    return {str(p.relative_to(root)):
            hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else None
            for p in sorted(pathlib.Path(root).rglob("*")) if p.name != "lock"}


def strict(text):
    """The value in a JSON text, or in a file if it is a path; NaN and Infinity are not JSON."""
    text = text.read_text() if isinstance(text, pathlib.Path) else text
    return json.loads(text, parse_constant=pytest.fail)


def read_jsonl(path):
    """All records of a metrics.jsonl without the images per second."""
    records = map(strict, pathlib.Path(path).read_text().splitlines())
    return [{k: v for k, v in r.items() if k != "train/images_per_second"} for r in records]


class Runs:
    """An autoencoder run `v` and a run `l` of it, their data, and argv of more runs."""

    def __init__(self, root, base):
        """root: folder of runs/; base: folder with the data and config files."""
        self.root, self.out, self.data = root, root / "runs", base / "phantom"
        self.vae_config, self.ldm_config = base / "tiny_vae.py", base / "tiny_ldm.py"
        self.vae_ckpt, self.ldm_ckpt = self.out / "v/ckpts/last.pt", self.out / "l/ckpts/last.pt"
        self.common = [f"--data_root={self.data}", f"--output_root={self.out}"]

    def vae(self, name, *more):
        """argv of a run of train_vae.py."""
        return ["train_vae.py", *self.common, f"--config={self.vae_config}", f"--run_name={name}",
                *more]

    def ldm(self, name, *more):
        """argv of a run of train_ldm.py on `v`."""
        return ["train_ldm.py", *self.common, f"--config={self.ldm_config}",
                f"--ae_ckpt_path={self.vae_ckpt}", "--num_sampling_steps=2",
                f"--run_name={name}", *more]


@pytest.fixture(scope="session")
def stages(tmp_path_factory, worker_id, quick):
    """Every stage once through its command line: data, the runs `v` and `l`, samples of `l`.

    Read-only; tests that change something take `workspace`. The workers of one pytest share them:
    the first makes them while the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "stages"
    root.mkdir(exist_ok=True)
    s = Runs(root, root)
    s.stdout = {}

    def stage(script, *argv):
        result = quick(script, *argv)
        assert result.code == 0, result.err
        s.stdout[script.removesuffix(".py")] = result.out

    with open(root / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = root / "stdout.json"
        if done.exists():
            s.stdout = json.loads(done.read_text())
            return s
        s.vae_config.write_text(TINY_VAE)
        s.ldm_config.write_text(TINY_LDM)
        phantom.write_phantoms(s.data, 8, 3, 32)
        stage(*s.vae("v", "--max_steps=100"))
        stage("find_latent_scale.py", *s.common, f"--ae_ckpt_path={s.vae_ckpt}")
        stage(*s.ldm("l", "--max_steps=20", "--num_sampling_steps=10"))
        stage("sample.py", f"--ckpt={s.ldm_ckpt}", "--num_samples=3", "--num_sampling_steps=10")
        done.write_text(json.dumps(s.stdout))
    return s


@pytest.fixture
def workspace(stages, tmp_path):
    """A copy of the runs, without samples, that a test may change; data and configs are shared."""
    w = Runs(tmp_path, stages.root)
    shutil.copytree(stages.out, w.out, ignore=shutil.ignore_patterns("samples_*"))
    return w


def save_checkpoint(path, kind, state):
    """A checkpoint file as Run.save writes it."""
    torch.save({"kind": kind, "step": 0, **state}, path)
