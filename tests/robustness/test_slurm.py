"""The scripts in slurm/ and sweep.yaml: as text, as --dry-run, and on a running Slurm."""
import functools
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
import yaml
from conftest import ROOT, TINY_LDM, TINY_VAE, strict
from test_stages import assert_same_run
from test_wandb import wandb_server

import train_ldm

# Configurations of the clusters to test on, ":" between: one that declares GPUs, one that does not.
CLUSTERS = os.environ.get("SLURM_TEST_CONFS", os.environ.get("SLURM_CONF", "")).split(":")

# A program that does what --plan says for this start of the job: commas separate starts, slashes
# the ranks of one start. As train_fake.py it is a trainer, as fake.py it is not.
FAKE = """
import os, signal, sys, time
if any(word.startswith("--check") for word in sys.argv):
    print("runs/fake", -1, sep="\\n")
    sys.exit()
plan = next(word[7:] for word in sys.argv if word.startswith("--plan="))
start = plan.split(",")[int(os.environ.get("SLURM_RESTART_COUNT", 0))].split("/")
act = start[int(os.environ.get("RANK", 0)) % len(start)]
if act == "wait":
    time.sleep(600)
if act == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "raise":
    raise ValueError("a bug")
print("rank", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"))
sys.exit(int(act))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return make_checkout(tmp_path_factory.mktemp("slurm") / "checkout")


def make_checkout(root):
    """A copy of the code with tiny configs, and call(COMMAND...) to run something in it."""
    for folder in ("slurm", "lib"):
        if (ROOT / folder).exists():
            shutil.copytree(ROOT / folder, root / folder)
    for path in (*ROOT.glob("*.py"), ROOT / "sweep.yaml"):
        shutil.copy(path, root)
    (root / "vae.py").write_text(TINY_VAE + "device = 'cpu'\nmax_steps = 2\n")
    (root / "ldm.py").write_text(TINY_LDM + "device = 'cpu'\nmax_steps = 2\n")
    bin_folder = shlex.quote(os.path.dirname(sys.executable))
    (root / "activate").write_text(f"export PATH={bin_folder}:$PATH\n")
    for name in ("train_fake.py", "fake.py"):
        (root / name).write_text(FAKE)
    hidden = ("SBATCH_", "WANDB_", "DATA_ROOT", "PARTITION", "TASK", "OUTPUT_ROOT")
    env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    env |= {"ENV_ACTIVATE": str(root / "activate"), "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "WANDB_MODE": "disabled"}

    def call(*command, code=0, **extra):
        done = subprocess.run([str(c) for c in command], cwd=root, env=env | extra, text=True,
                              capture_output=True, timeout=300, check=False)
        assert done.returncode == code, (
            f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout + done.stderr if code else done.stdout
    return SimpleNamespace(root=root, runs=root / "runs", env=env, call=call)


@pytest.fixture
def stub(checkout, tmp_path):
    """stub(NAME, SCRIPT) -> a PATH on which the command NAME is this shell script."""
    def make(name, script):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
        return f"{tmp_path}:{checkout.env['PATH']}"
    return make


@pytest.fixture
def gres(stub):
    """gres(TEXT) -> a PATH with a sinfo that answers TEXT: partitions and their GRES."""
    return lambda text: stub("sinfo", f"echo '{text}'")


# --- as text and as --dry-run -------------------------------------------------------------------


def test_shellcheck():
    tool = pathlib.Path(sys.executable).with_name("shellcheck")
    scripts = [*ROOT.glob("slurm/*.sh"), *ROOT.glob("slurm/*.slurm")]
    done = subprocess.run([tool, "-x", *scripts], cwd=ROOT, text=True, capture_output=True,
                          check=False)
    assert scripts and done.returncode == 0, done.stdout


# A launcher without its check of the program's flags, which takes a second.
LAUNCH = ("bash", "-euc", """exec 2>&1
source slurm/common.sh
parse_launch --dry-run "$@"
submit name slurm/train.slurm train_vae.py
""", "launch")


def test_dry_run_hands_on_every_other_flag(checkout, gres, image_tree):
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


def test_pipeline_dry_run(checkout, gres):
    out = checkout.call("slurm/pipeline.sh", "TB", "4", "full_train", "--nodes=2", "--gpus=a100:4",
                        "--output_root=out", "--dry-run", "--ldm", "--lr=1e-4",
                        PATH=gres("all* gpu:a100:4"))
    words = [shlex.split(line) for line in out.splitlines()]
    assert [line[line.index("slurm/train.slurm") + 1] for line in words] == [
        "train_vae.py", "find_latent_scale.py", "train_ldm.py"]
    vae, scale, ldm = [dict(word[2:].partition("=")[::2] for word in line) for line in words]
    assert [job.get("dependency") for job in (vae, scale, ldm)] == [
        None, "afterok:JOBID", "afterok:JOBID"]
    assert [(job["nodes"], job["gpus-per-node"], job.get("time")) for job in (vae, scale, ldm)] == [
        ("2", "a100:4", None), ("1", "a100:1", "2:00:00"), ("2", "a100:4", None)]
    checkpoint = f"out/{vae['run_name']}/ckpts/last.pt"
    assert scale["ae_ckpt_path"] == ldm["ae_ckpt_path"] == checkpoint
    assert {job["output_root"] for job in (vae, scale, ldm)} == {"out"}
    assert vae["z_channels"] == "4" and "lr" not in vae and ldm["lr"] == "1e-4"


@pytest.mark.parametrize(("flags", "answer", "asked", "cpus", "noted"), [
    ("--gpus=2", "p* (null)\np* shard:8,gpu:2", "2", "8", False),  # nodes that differ
    ("--gpus a100:4", "p* gpu:a100:4(S:0-1)", "a100:4", "16", False),
    ("--gpus=0", "p* gpu:4", None, "4", False),
    ("--partition=p", "p gpu:4", "1", "4", False),
    ("--gpus=a100:2", "p* craynetwork:4", None, "8", True),
    ("", "big gpu:4\np* (null)", None, "4", False),  # the default partition counts
    ("SBATCH_FLAGS=--mem=8G --gres=gpu:a100:1", "p* gpu:4", None, "4", False),  # asked for already
    ("SBATCH_FLAGS=--gres=license:1 --gpu-bind=closest", "p* gpu:4", "1", "4", False)])
def test_gpus_are_requested_once_if_there_are_some(checkout, gres, flags, answer, asked, cpus,
                                                   noted):
    argv, _, elsewhere = flags.partition("SBATCH_FLAGS=")
    out = checkout.call(*LAUNCH, *argv.split(), PATH=gres(answer), SBATCH_FLAGS=elsewhere)
    *notes, command = out.splitlines()
    sbatch = dict(word[2:].partition("=")[::2] for word in shlex.split(command))
    assert (sbatch.get("gpus-per-node"), sbatch["cpus-per-task"]) == (asked, cpus)
    assert (len(notes), "declares no GPUs" in out) == (noted, noted)


@pytest.mark.parametrize(("command", "says"), [
    ("train_vae.sh TB 1 --gpus=two", "such as 2 or a100:2"),
    ("train_vae.sh TB 1 --time --nodes=2", "--time needs a value"),
    ("train_vae.sh TB 1 --after=", "--after needs a value"),
    ("train_vae.sh TB 1 --job-name=a/b", "has a slash"),
    ("train_vae.sh TB 1 --partitoin=x", "--partitoin=x"),
    ("pipeline.sh TB 1 overfit_one --ldm --learning_rat=1", "--learning_rat"),
    ("launch_sweep_swarm.sh me/p/abc biggpu 0 2 1 --learning_rat=1", "--learning_rat"),
    ("launch_sweep_swarm.sh me/p/abc biggpu 0 3 0", "not 0 3 0"),
    ("train_vae.sh TB 1 --help", "--z_channels")])
def test_wrong_commands_submit_nothing(checkout, command, says):
    launcher, *args = command.split()
    out = checkout.call(f"slurm/{launcher}", *args, "--dry-run", code=1)
    assert says in out and "sbatch" not in out and (out.count("\n") == 1 or "--help" in args)


@pytest.mark.parametrize("partition", ["small", "big"])  # another one, and without a GPU
def test_an_agent_in_the_wrong_place_says_what_to_type(checkout, gres, partition):
    hidden = {k: "" for k in os.environ if k.startswith("SLURM_")}
    out = checkout.call("slurm/ldm_sweep_agent.slurm", "me/p/abc", "big", "2", "3", code=1,
                        PATH=gres("big gpu:4"), **hidden | {"SLURM_JOB_PARTITION": partition})
    assert "launch_sweep_swarm.sh me/p/abc big 2 1 3" in out and out.count("\n") == 1


@pytest.mark.parametrize(("plan", "code", "says"), [
    ("0", 0, ""), ("75", 1, ""), ("raise/78", 78, ""),
    ("wait/raise", 1, "rank 1 on node7 ended with exit code 1"),
    ("wait/killed", 1, "rank 1 on node7 ended with exit code -9 (killed; out of memory?)")])
def test_launch_reports_how_its_processes_ended(checkout, plan, code, says):
    # A job that finds two GPUs on a cluster that declares none.
    find_two = ("import runpy, sys, torch; torch.cuda.device_count = lambda: 2; del sys.argv[0];"
                "runpy.run_path(sys.argv[0], run_name='__main__')")
    out = checkout.call(
        sys.executable, "-c", find_two, "slurm/launch.py", "--master_port=29871", "train_fake.py",
        f"--plan={plan}", code=code, SLURM_GPUS_ON_NODE="", SLURM_NNODES="1",
        SLURMD_NODENAME="node7")
    assert [line for line in out.splitlines() if "rror: " in line and "ValueError" not in line] \
        == [f"error: {says}"] * bool(says)
    assert out.count("Traceback") == plan.count("raise") and "torch" not in out
    assert code or sorted(out.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]


# requeue without Slurm or a program. Each argument is one end of the job: whether it had been told
# to stop, and the step that its run had reached.
REQUEUE = """source slurm/common.sh
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


@pytest.mark.parametrize(("ends", "left", "again", "says"), [
    ([":5", ":5", ":5", ":6", ":6", ":6", ":6"], "9:00:00", 6,
     "step 6 of runs/x after 3 requeues, giving up: it failed"),
    ([":5", "stopped:5"] * 3 + [":5"], "9:00:00", 6, "giving up: it failed"),
    (["stopped:-1"] * 4, "1:58", 3, "giving up: its --time was over")])
def test_a_job_gives_up_after_three_failures_without_a_step(checkout, ends, left, again, says):
    code = 0 if again == len(ends) else 1
    out = checkout.call("bash", "-euc", REQUEUE, "job", *ends, code=code, SLURM_JOB_ID="7",
                        time_left=left)
    assert out.count("again\n") == again and out.splitlines()[code - 2].endswith(says), out


# A job on one node, to be run without Slurm.
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "two words", "SLURM_JOB_PARTITION": "p",
       "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_ON_NODE": "4", "SLURM_NNODES": "1",
       "SLURM_JOB_NODELIST": "node1"}


def test_an_agent_ends_with_a_run_that_failed_for_good(checkout, stub):
    run = checkout.root / "sweeps/sweep-7-abc"
    run.mkdir(parents=True)
    (run / "run_meta.json").touch()
    for name, script in {"python": "echo sweeps/sweep-7-abc; echo 5", "scontrol": "echo node1",
                         "srun": "exit 78", "wandb": "echo wandb"}.items():
        path = stub(name, script)
    (checkout.root / "activate_stubs").write_text(f"PATH={path}\n")
    job = JOB | {"SLURM_SUBMIT_DIR": str(checkout.root), "OUTPUT_ROOT": "sweeps",
                 "ENV_ACTIVATE": "activate_stubs"}
    out = checkout.call("slurm/ldm_sweep_agent.slurm", "me/p/abc", "p", "0", "2", code=78, **job)
    assert "would fail again" in out and "wandb" not in out
    (run / "summary.json").touch()
    out = checkout.call("slurm/ldm_sweep_agent.slurm", "me/p/abc", "p", "0", "2", **job)
    assert out == "wandb\n"


# What torchrun_step would start.
RUN_PROGRAM = """source slurm/common.sh
activate
torchrun_step() { printf '%s\\n' "$@"; }
run_program "$@"
"""


@pytest.mark.parametrize("named", [False, True])
def test_a_job_names_the_run_if_nothing_else_does(checkout, named, tmp_path):
    config = tmp_path / "config.py"  # of a value that --check answers with a note
    config.write_text("guidance_scale = 3.0\n" + ("run_name = 'mine'\n" if named else ""))
    argv = ["train_ldm.py", "--mode=overfit_one", f"--config={config}"]
    out = checkout.call("bash", "-euc", RUN_PROGRAM, "job", *argv, **JOB)
    assert out.splitlines() == [*argv, *([] if named else ["--run_name=two words-7"])]


def test_a_job_of_the_same_number_elsewhere_is_another(checkout, stages):
    shutil.copytree(stages.out / "l", checkout.root / "runs/two words-7")
    call = functools.partial(checkout.call, "bash", "-euc", RUN_PROGRAM, "job", "train_ldm.py")
    assert "of another job of this number" in call(code=1, **JOB)
    assert "--run_name=two words-7" in call(SLURM_RESTART_COUNT="1", **JOB)


def test_sweep_values_reach_the_run(monkeypatch):
    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OVERFIT_K", "8")
    choices = {name: parameter.get("values") or [parameter["min"], parameter["max"]]
               for name, parameter in sweep["parameters"].items()}
    for i in range(max(map(len, choices.values()))):
        values = {name: choice[i % len(choice)] for name, choice in choices.items()}
        flags = [f"--{name}={value}" for name, value in values.items()]
        args = train_ldm.parse_args([sweep["command"][3], *flags])
        assert args.overfit_k == 8 and args.wandb
        for name, value in values.items():
            parsed = tuple(map(int, value.split(","))) if isinstance(value, str) else value
            assert getattr(args, name) == parsed


# --- on a running Slurm -------------------------------------------------------------------------


ALIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")


def job_info(job):
    """scontrol's fields of a job: {'JobState': ..., 'Partition': ..., 'Restarts': ...}."""
    text = subprocess.run(["scontrol", "show", "job", "-o", job], text=True, capture_output=True,
                          timeout=60, check=True).stdout
    return dict(re.findall(r"(\w+)=(\S*)", text))


def until(condition, what, seconds=400):
    """Poll until condition() is true, and return its value; what: awaited, or a function."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not in {seconds} s: {what() if callable(what) else what}"
        time.sleep(0.25)
    return value


def log_of(job):
    """The log of a job, given its scontrol fields."""
    path = pathlib.Path(job["StdOut"])
    return path.read_text() if path.exists() else ""


def ended(job, state="COMPLETED"):
    """Wait for a job to end for good, in this state; return its scontrol fields."""
    until(lambda: job_info(job)["JobState"] not in ALIVE, lambda: log_of(job_info(job))[-4000:])
    info = job_info(job)
    assert info["JobState"] == state, f"{info}\n{log_of(info)[-4000:]}"
    return info


def job_ids(output):
    return re.findall(r"(?:^job|Submitted batch job) (\d+)", output, re.MULTILINE)


def last_step(folder):
    """Step of the last log line; -1: none yet."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def gres_of_nodes():
    """What sinfo says about GPUs. Skips without Slurm, or fails if REQUIRE_SLURM=1."""
    if os.environ["SLURM_CONF"] and shutil.which("sinfo"):
        done = subprocess.run(["sinfo", "-h", "-o", "%G"], text=True, capture_output=True,
                              timeout=30, check=False)
        if done.returncode == 0:
            return done.stdout
    lacking = pytest.fail if os.environ.get("REQUIRE_SLURM") == "1" else pytest.skip
    lacking("no Slurm here: sbatch, SLURM_CONF and an answering sinfo")


@pytest.fixture(scope="module", params=CLUSTERS)
def cluster(request, tmp_path_factory):
    """On each cluster: a checkout with the runs of pipeline.sh; .gpus: does it declare GPUs?"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", request.param)
        gpus = "gpu" in gres_of_nodes()
        checkout = make_checkout(tmp_path_factory.mktemp("slurm") / "checkout")
        checkout.gpus = gpus
        (checkout.root / "slurm_logs").mkdir()

        def fake(program, plan, *flags):
            return job_ids(checkout.call(
                "sbatch", *flags, "slurm/train.slurm", program, f"--plan={plan}"))[0]
        try:
            # These take long, beside the others.
            checkout.stage = fake("fake.py", "killed,0")
            checkout.final = [fake("train_fake.py", "78"), fake("fake.py", "78"),
                              fake("train_fake.py", "78/wait", "--nodes=2")]
            jobs = job_ids(checkout.call(
                "slurm/pipeline.sh", "TB", "2", "overfit_8", "--partition=bigbatch",
                "--vae", "--config=vae.py", "--ldm", "--config=ldm.py"))
            checkout.pipeline = [ended(job) for job in jobs]
            checkout.ae = next(checkout.runs.glob("ae_tb_z2_*"))
            yield checkout
        finally:
            for line in checkout.call("squeue", "-h", "-o", "%A %Z").splitlines():
                job, folder = line.split(maxsplit=1)
                if folder == str(checkout.root):
                    subprocess.run(["scancel", job], check=False)


def test_pipeline_chains_three_jobs(cluster):
    vae, scale, ldm = cluster.pipeline
    gpus = "gres:gpu:1" if cluster.gpus else None
    for job in cluster.pipeline:
        assert (job["Partition"], job.get("TresPerNode")) == ("bigbatch", gpus)
    # ISO dates: in the order of time.
    assert vae["EndTime"] <= scale["StartTime"] and scale["EndTime"] <= ldm["StartTime"]
    run = next(cluster.runs.glob("ldm_tb_overfit_8_*"))
    measured = strict(cluster.ae / "latent_scale.json")["latent_scale_factor"]
    assert strict(run / "run_meta.json")["latent_scale_factor"] == measured


def test_every_launcher_reaches_its_partition_and_nodes(cluster):
    ae = f"--ae_ckpt_path={cluster.ae}/ckpts/last.pt"
    vae = cluster.call("slurm/train_vae.sh", "TB", "1", "--partition=stampede", "--config=vae.py")
    ldm = cluster.call("slurm/train_ldm.sh", "overfit_4", "--partition=biggpu", "--nodes=2",
                       "--gpus=2", "--config=ldm.py", ae)
    plain = cluster.call("sbatch", "--partition=biggpu", "slurm/train.slurm", "train_ldm.py",
                         "--config=ldm.py", ae, "--wandb_tags=two words")
    args = []
    for out, name, partition, nodes, gpus in ((vae, "ae_tb_z1", "stampede", 1, 1),
                                              (ldm, "ldm_overfit_4", "biggpu", 2, 2),
                                              (plain, "train", "biggpu", 1, None)):
        info = ended(*job_ids(out))
        run = cluster.runs / f"{name}-{info['JobId']}"
        asked = f"gres:gpu:{gpus}" if cluster.gpus and gpus else None
        assert [info.get(key) for key in ("Partition", "NumNodes", "Restarts", "TresPerNode")] == [
            partition, str(nodes), "0", asked]
        assert info["StdOut"] == f"{cluster.root}/slurm_logs/{run.name}.out"
        assert ("this job has no GPU" in log_of(info)) == (cluster.gpus and not asked)
        meta = strict(run / "run_meta.json")
        assert meta["world_size"] == nodes * (gpus if asked else 1)
        assert strict(run / "summary.json")["step"] == 2
        args.append(meta["args"])
    assert (args[0]["z_channels"], args[1]["overfit_k"]) == (1, 4)
    assert args[2]["wandb_tags"] == "two words"


def kill_run(run):
    """SIGKILL to the training process of a run, not to torchrun, the agent or the job script."""
    os.kill(int(re.search(r"process (\d+)", (run / "lock").read_text())[1]), signal.SIGKILL)


def test_stopped_and_killed_jobs_end_like_an_undisturbed_one(cluster):
    def submit(*flags):
        return job_ids(cluster.call(
            "slurm/train_ldm.sh", "full_train", "--config=ldm.py", *flags, "--wandb",
            f"--ae_ckpt_path={cluster.ae}/ckpts/last.pt", "--max_steps=300",
            "--sample_every=10000", "--save_minutes=0.02", "--log_every=1",
            WANDB_MODE="offline"))[0]
    jobs = submit("--job-name=quiet"), submit("--job-name=stopped"), submit("--run_name=killed")
    quiet, stopped, killed = (
        cluster.runs / name for name in (f"quiet-{jobs[0]}", f"stopped-{jobs[1]}", "killed"))
    until(lambda: last_step(stopped) >= 20, "first steps of the run to stop")
    subprocess.run(["scancel", "--batch", "--signal=USR1", jobs[1]], check=True)
    until(lambda: last_step(killed) >= 20, "first steps of the run to kill")
    kill_run(killed)
    assert [ended(job)["Restarts"] for job in jobs] == ["0", "1", "1"]
    for run in (stopped, killed):
        assert_same_run(run, quiet, "ldm")
    wandb_id = strict(stopped / "run_meta.json")["wandb_id"]
    assert len(list((stopped / "wandb").glob(f"offline-run-*-{wandb_id}"))) == 2
    log = log_of(job_info(jobs[1]))
    before = int(re.search(r"stopped \(SIGUSR1\) at step (\d+)", log)[1])
    assert re.search(rf"continues at step +{before}\n", log)  # nothing was done twice


def test_a_cancelled_job_takes_the_one_after_it_along(cluster):
    job, = job_ids(cluster.call(
        "slurm/train_ldm.sh", "overfit_8", "--config=ldm.py", "--max_steps=100000",
        f"--ae_ckpt_path={cluster.ae}/ckpts/last.pt", "--run_name=cancelled"))
    after, = job_ids(cluster.call("slurm/train_ldm.sh", "overfit_8", "--ae_ckpt_path=later.pt",
                                  f"--after={cluster.pipeline[0]['JobId']}:{job}"))
    until(lambda: last_step(cluster.runs / "cancelled") >= 5, "first steps")
    subprocess.run(["scancel", job], check=True)
    info = ended(job, "CANCELLED")
    assert info["Restarts"] == "0"
    assert "Traceback" not in log_of(info)
    ended(after, "CANCELLED")
    assert not list(cluster.runs.glob(f"*-{after}"))


def test_a_killed_stage_is_requeued_like_a_trainer(cluster):
    info = ended(cluster.stage)
    assert info["Restarts"] == "1" and "requeued at the beginning: it failed" in log_of(info)


def test_an_error_that_would_recur_ends_the_job(cluster):
    for job in cluster.final:
        info = ended(job, "FAILED")
        assert (info["Restarts"], info["ExitCode"]) == ("0", "78:0")
        errors = [line for line in log_of(info).splitlines() if line.startswith("error: ")]
        assert errors == ["error: not requeued, since the same command would fail again"]


def test_a_job_without_its_inputs_is_refused(checkout, stub):
    out = checkout.call("slurm/train_ldm.sh", "overfit_8", "--ae_ckpt_path=missing.pt", code=1,
                        PATH=stub("sbatch", "echo queued"))
    assert "missing.pt" in out and out.count("\n") == 1


# --- sweeps, through wandb's own clients --------------------------------------------------------


@pytest.fixture(scope="module")
def server(cluster, tmp_path_factory):
    """A W&B server. .env: for its clients; .sweep and .recorded: see below."""
    folder = tmp_path_factory.mktemp("wandb")

    def sweep(run_cap, max_steps):
        """The ID of a sweep: sweep.yaml with small values."""
        config = yaml.safe_load((ROOT / "sweep.yaml").read_text())
        config["run_cap"] = run_cap
        small = {"ldm_base_ch": [8, 16], "ldm_ch_mults": ["1,2", "1,1"], "max_steps": [max_steps],
                 "ldm_attn_res": ["4", "4,8"], "ldm_num_res_blocks": [1], "sample_batch_size": [2],
                 "num_sampling_steps": [2], "batch_per_device": [4], "log_every": [5],
                 "device": ["cpu"], "ae_ckpt_path": [str(cluster.ae / "ckpts" / "last.pt")]}
        config["parameters"] |= {name: {"values": values} for name, values in small.items()}
        (cluster.root / "small_sweep.yaml").write_text(yaml.safe_dump(config))
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sweep", "--entity=me", "--project=demo",
             "small_sweep.yaml"], cwd=cluster.root, env=cluster.env | env, text=True,
            capture_output=True, timeout=120, check=True)
        return re.search(r"wandb agent (\S+)", done.stderr)[1]

    def recorded(sweep_id):
        """(the sweep, {run id: the run}) on the server."""
        name = sweep_id.split("/")[-1]
        paths = folder.glob("out/runs/me/demo/*/run.json")
        runs = {run["name"]: run for run in (json.loads(path.read_text()) for path in paths)}
        return (json.loads((folder / "out" / "sweeps" / f"{name}.json").read_text()),
                {run_id: run for run_id, run in runs.items() if run["sweep"] == name})
    with wandb_server(folder) as env:
        yield SimpleNamespace(env=env, sweep=sweep, recorded=recorded)


def test_a_swarm_runs_a_whole_sweep(cluster, server):
    sweep_id = server.sweep(run_cap=5, max_steps=10)
    out = cluster.call("slurm/launch_sweep_swarm.sh", sweep_id, "bigbatch", "6", "3", "2",
                       **server.env)
    job, = job_ids(out)
    assert out.endswith(f"job {job}, log slurm_logs/sweep-{job}_[1-3].out\n")
    folders, gpus = {}, "gres:gpu:1" if cluster.gpus else None
    for number in (1, 2, 3):
        task = ended(f"{job}_{number}")
        assert (task["Partition"], task.get("TresPerNode")) == ("bigbatch", gpus)
        assert task["StdOut"] == f"{cluster.root}/slurm_logs/sweep-{job}_{number}.out"
        taken = list(cluster.runs.glob(f"sweep-{task['JobId']}-*"))
        assert len(taken) <= 2
        folders |= {folder.name.split("-")[-1]: folder for folder in taken}
    sweep, runs = server.recorded(sweep_id)
    assert len(sweep["runs"]) == len(runs) == 5 and sweep["state"] == "FINISHED"
    assert set(folders) == {command["run_id"] for command in sweep["runs"]}
    for command in sweep["runs"]:
        folder, logged = folders[command["run_id"]], runs[command["run_id"]]
        args = strict(folder / "run_meta.json")["args"]
        assert args["overfit_k"] == 6 and args["lr"] == command["args"]["lr"]["value"]
        metric = "sample_diversity/pairwise_mse_mean"
        assert logged["state"] == "finished"
        assert logged["summary"][metric] == pytest.approx(strict(folder / "summary.json")[metric])


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_an_agent_finishes_the_run_it_was_interrupted_in(cluster, server, how):
    sweep_id = server.sweep(run_cap=1, max_steps=400)
    array, = job_ids(cluster.call("slurm/launch_sweep_swarm.sh", sweep_id, "biggpu", "0", "1", "1",
                                  **server.env))
    job = f"{array}_1"
    run = until(lambda: next(cluster.runs.glob(f"sweep-{job_info(job)['JobId']}-*"), None),
                lambda: f"a run\n{log_of(job_info(job))}")
    until(lambda: last_step(run) >= 20, "first steps")
    if how == "stopped":
        subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    else:
        kill_run(run)
    assert ended(job)["Restarts"] == "1"
    sweep, runs = server.recorded(sweep_id)
    run_id = run.name.split("-")[-1]
    assert list(runs) == [run_id] == [command["run_id"] for command in sweep["runs"]]
    assert (runs[run_id]["starts"], runs[run_id]["state"]) == (2, "finished")
    assert strict(run / "summary.json")["step"] == 400
