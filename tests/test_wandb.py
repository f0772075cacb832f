"""What W&B's own client shows of a run: offline, and online if there is a server to test with."""
import contextlib
import json
import subprocess
import sys
import time

import pytest
from conftest import ROOT, strict

STUB = ROOT.parent / "shared" / "wandb-stub"  # a stand-in for the server


@contextlib.contextmanager
def wandb_server(folder):
    """A stand-in for the W&B server that records under folder/out; yields its clients' settings."""
    if not STUB.exists():
        pytest.skip(f"no stand-in for the W&B server at {STUB}")
    settings = folder / "env"
    process = subprocess.Popen(
        [sys.executable, str(STUB), "--out", str(folder / "out"), "--env-file", str(settings),
         "--seconds=900"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not settings.exists():
            assert process.poll() is None, "the stand-in for W&B ended"
            time.sleep(0.1)
        env = dict(line.split("=", 1) for line in settings.read_text().split())
        yield env | {"WANDB_MODE": "online"}
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def train(workspace, quick):
    """train(FLAG): a run `w` of ten steps; returns its folder."""
    def call(flag):
        result = quick(*workspace.ldm("w", flag, "--max_steps=10", "--num_sampling_steps=10"))
        assert result.code == 0, result.err
        return workspace.out / "w"
    return call


@pytest.mark.slow
def test_the_page_of_a_run_shows_what_its_report_does(tmp_path, monkeypatch, train):
    with wandb_server(tmp_path) as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        summary = strict(train("--wandb") / "summary.json")
    [folder] = (tmp_path / "out").glob("runs/*/*/*/")
    page = json.loads((folder / "run.json").read_text())
    assert page["config"]["lr"]["value"] == 1e-3 and page["config"]["world_size"]["value"] == 1
    assert page["summary"]["val/loss"] == pytest.approx(summary["val/loss"])
    lines = map(json.loads, (folder / "history.jsonl").open())
    [grid] = [line["samples/tb"] for line in lines if "samples/tb" in line]
    assert (grid["_type"], grid["caption"]) == ("image-file", "tb, epoch 5")
    assert (folder / "files" / grid["path"]).exists()


@pytest.mark.parametrize("env", [
    {"WANDB_MODE": "offline"},
    pytest.param({"WANDB_MODE": "online", "WANDB_API_KEY": 40 * "0",
                  "WANDB_BASE_URL": "http://127.0.0.1:9"}, marks=pytest.mark.slow)])
def test_offline_keeps_all_of_it_in_the_run_folder(monkeypatch, train, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    folder = train("--wandb")
    [records] = folder.glob("wandb/offline-run-*/*.wandb")
    assert records.parent.name.split("-")[-1] == strict(folder / "run_meta.json")["wandb_id"]
    assert all(name in records.read_bytes() for name in (b"train/loss", b"samples/tb"))


def test_a_run_without_wandb_has_no_page(monkeypatch, train):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not (train("--no-wandb") / "wandb").exists()
