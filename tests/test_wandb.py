"""What a W&B page shows, by its own client: offline, and online against a stand-in for its server
where there is one (../shared/wandb-stub)."""
import json
import os
import pathlib
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, run

STUB = ROOT.parent / "shared" / "wandb-stub"
SHORT = ("--wandb", "--max_steps=10", "--run_name=w", "--wandb_artifacts")
EVALUATE = ("--num_samples=4", "--num_sampling_steps=4", "--classifier_steps=5")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """.page(): what the server recorded of the only run there, with its logged lines."""
    if not STUB.exists():
        pytest.skip(f"no {STUB}")
    process = subprocess.Popen(
        [sys.executable, str(STUB), "--out", str(tmp_path / "server"),
         "--env-file", str(tmp_path / "env"), "--seconds=300"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while not (tmp_path / "env").exists() and time.monotonic() < end:
            time.sleep(0.1)
        for line in (tmp_path / "env").read_text().split():
            monkeypatch.setenv(*line.split("=", 1))
        monkeypatch.setenv("WANDB_MODE", "online")

        def page():
            [folder] = (tmp_path / "server").glob("runs/*/*/*/")
            record = json.loads((folder / "run.json").read_text())
            lines = [json.loads(line) for line in (folder / "history.jsonl").open()]
            return SimpleNamespace(folder=folder, lines=lines, **record)
        yield SimpleNamespace(page=page)
    finally:
        process.terminate()
        process.wait(30)


def train(w, *argv):
    return run("train_ldm.py", *w.common, f"--config={w.ldm_config}",
               f"--ae_ckpt_path={w.vae_ckpt}", *SHORT, *argv)


def test_the_page_of_a_run_shows_what_its_report_does(workspace, server):
    # The stand-in takes no artifacts, as a server that is full would not.
    train(workspace, "--no-wandb_artifacts")
    folder = workspace.out / "w"
    summary = json.loads((folder / "summary.json").read_text())
    page = server.page()
    assert page.config["lr"]["value"] == 1e-3 and page.config["world_size"]["value"] == 1
    assert page.summary["val/loss"] == pytest.approx(summary["val/loss"])
    for verdict in summary["verdicts"]:
        assert page.summary[f"verdict/{verdict['metric']}"] == verdict["level"]
    grids = [line["samples/tb"] for line in page.lines if "samples/tb" in line]
    assert [grid["_type"] for grid in grids] == ["image-file"]
    assert [grid["caption"] for grid in grids] == ["tb, epoch 5"]
    assert (page.folder / "files" / grids[0]["path"]).exists()

    run("evaluate.py", f"--ckpt={folder}/ckpts/last.pt", *workspace.common, *EVALUATE)
    report = json.loads((folder / "evaluation.json").read_text())
    page = server.page()  # the same one: another would make two
    for verdict in report["verdicts"]:
        assert page.summary[f"evaluation/verdict/{verdict['metric']}"] == verdict["level"]
    assert page.summary["val/loss"] == pytest.approx(summary["val/loss"])  # it kept that
    [shown] = [line for line in page.lines if "evaluation/pairs" in line]
    assert shown["step"] == 10


def test_no_wandb_leaves_the_page_as_it_is(workspace, server):
    train(workspace, "--no-wandb_artifacts")
    before = server.page()
    run("evaluate.py", f"--ckpt={workspace.out}/w/ckpts/last.pt", *workspace.common, *EVALUATE,
        "--no-wandb")
    assert server.page() == before


def offline_records(folder):
    """What wandb wrote into a run folder offline, as its own records: a file of LevelDB's log
    format, in which a part has a checksum of 4 bytes, its length, and its kind."""
    from wandb.proto import wandb_internal_pb2
    full, last, block = 1, 4, 32768
    for path in sorted(pathlib.Path(folder).glob("wandb/offline-run-*/*.wandb")):
        content, place, data = path.read_bytes(), 7, b""
        while place + 7 <= len(content):
            if block - place % block < 7:  # the rest of a block that no part fits in
                place += block - place % block
            _, length, kind = struct.unpack("<IHB", content[place:place + 7])
            data += content[place + 7:place + 7 + length]
            place += 7 + length
            if kind in (full, last):
                yield wandb_internal_pb2.Record.FromString(data)
                data = b""


def test_offline_keeps_all_of_it_in_the_run_folder(workspace, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(workspace)
    folder = workspace.out / "w"
    run("evaluate.py", f"--ckpt={folder}/ckpts/last.pt", *workspace.common, *EVALUATE)
    records = list(offline_records(folder))
    ids = {r.run.run_id for r in records if r.HasField("run")}
    assert ids == {json.loads((folder / "run_meta.json").read_text())["wandb_id"]}
    artifacts = [r.artifact for r in records if r.HasField("artifact")]
    [artifact] = [a for a in artifacts if a.type == "model"]
    assert artifact.name == "w"
    [entry] = artifact.manifest.contents
    assert entry.path == "best.pt" and entry.size == (folder / "ckpts/best.pt").stat().st_size
    logged = {item.key or item.nested_key[0] for r in records if r.HasField("history")
              for item in r.history.item}
    assert {"train/loss", "samples/tb", "evaluation/pairs"} <= logged


def test_a_run_without_wandb_has_no_page(workspace, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(workspace, "--no-wandb")
    folder = workspace.out / "w"
    run("evaluate.py", f"--ckpt={folder}/ckpts/last.pt", *workspace.common, *EVALUATE)
    assert not os.path.exists(folder / "wandb")
