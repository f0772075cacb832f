"""Shared fixtures: tiny runs that many tests read, and ways to call a stage as a process."""
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
import subprocess
import sys
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


def _as_main(argv, out, err, cwd):
    # `python SCRIPT ARGS` in a fork of a process that has imported torch.
    for number, path in ((1, out), (2, err)):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A runaway stage must not take the machine along.
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
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


@pytest.fixture
def quick(fork_server, tmp_path_factory):
    """quick(SCRIPT, ARGS...) -> exit code, stdout, stderr, without the 2 s of importing torch."""
    folder = tmp_path_factory.mktemp("output")

    def call(*argv, cwd=ROOT):
        process = fork_server.Process(
            target=_as_main, args=(argv, str(folder / "out"), str(folder / "err"), str(cwd)))
        process.start()
        process.join(180)
        if process.is_alive():
            process.kill()
            pytest.fail(f"{argv} still runs")
        out, err = ((folder / name).read_text() for name in ("out", "err"))
        return SimpleNamespace(code=process.exitcode, out=out, err=err)
    return call


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


def read_jsonl(path):
    """All records of a metrics.jsonl, which must be strict JSON, without the images per second."""
    lines = pathlib.Path(path).read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return [{k: v for k, v in r.items() if k != "train/images_per_second"} for r in records]


@pytest.fixture(scope="session")
def stages(tmp_path_factory, worker_id):
    """Every stage once through its command line: data, the runs `v` and `l`, samples of `l`.

    Read-only; tests that change something take `workspace`. The workers of one pytest share them:
    the first makes them while the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "stages"
    root.mkdir(exist_ok=True)
    s = SimpleNamespace(root=root, data=root / "phantom", out=root / "runs", stdout={})
    s.vae_config, s.ldm_config = root / "tiny_vae.py", root / "tiny_ldm.py"
    s.vae_ckpt, s.ldm_ckpt = s.out / "v/ckpts/last.pt", s.out / "l/ckpts/last.pt"
    s.common = [f"--data_root={s.data}", f"--output_root={s.out}"]

    def stage(name, *argv):
        s.stdout[name] = run(f"{name}.py", *argv)[0]

    with open(root / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = root / "stdout.json"
        if done.exists():
            s.stdout = json.loads(done.read_text())
            return s
        s.vae_config.write_text(TINY_VAE)
        s.ldm_config.write_text(TINY_LDM)
        phantom.write_phantoms(s.data, 8, 3, 32)
        stage("train_vae", *s.common, f"--config={s.vae_config}", "--run_name=v", "--max_steps=100")
        stage("find_latent_scale", *s.common, f"--ae_ckpt_path={s.vae_ckpt}")
        stage("train_ldm", *s.common, f"--config={s.ldm_config}", "--run_name=l", "--max_steps=20")
        stage("sample", f"--ckpt={s.ldm_ckpt}", "--num_samples=3", "--num_sampling_steps=10")
        done.write_text(json.dumps(s.stdout))
    return s


@pytest.fixture
def workspace(stages, tmp_path):
    """A copy of the runs, without samples, that a test may change; data and configs are shared."""
    w = SimpleNamespace(**vars(stages))
    w.root, w.out = tmp_path, tmp_path / "runs"
    shutil.copytree(stages.out, w.out, ignore=shutil.ignore_patterns("samples_*"))
    w.vae_ckpt, w.ldm_ckpt = w.out / "v/ckpts/last.pt", w.out / "l/ckpts/last.pt"
    w.common = [f"--data_root={w.data}", f"--output_root={w.out}"]
    return w


def save_checkpoint(path, kind, state):
    """A checkpoint file as Run.save writes it."""
    torch.save({"kind": kind, "step": 0, **state}, path)
