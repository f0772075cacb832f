"""gpu_check.py as far as it goes without a GPU: its parts are run, judged, cut off and kept."""
import json

from test_bench import TINY

import bench
import gpu_check
from args import parse_settings

BENCH = f"bench.py --only=train,sample {' '.join(TINY)} --json={{out}}"


def parts(**commands):
    return tuple(gpu_check.Part(name, command) for name, command in commands.items())


def check(monkeypatch, tmp_path, chosen, minutes=5):
    """(report, exit code) of gpu_check.py with other parts."""
    monkeypatch.setattr(gpu_check, "PARTS", chosen)
    code = 0
    try:
        gpu_check.main([f"--json={tmp_path / 'report.json'}", f"--minutes={minutes}"])
    except SystemExit as e:
        code = e.code
    return json.loads((tmp_path / "report.json").read_text()), code


def test_tests_and_figures_end_up_in_one_file_and_one_table(monkeypatch, tmp_path, capsys):
    tests = gpu_check.PARTS[0].command
    report, code = check(monkeypatch, tmp_path, parts(tests=tests, speed=BENCH))
    results = report["parts"]["tests"]["tests"]
    assert code == 0 and len(results) >= 7 and set(results.values()) <= {"passed", "skipped"}
    rows = report["parts"]["speed"]["bench"]["rows"]
    assert [row["part"] for row in rows] == ["train", "sample"]
    out = capsys.readouterr().out
    for text in ("a_step_waits_for_nothing", "ours", f"{rows[0]['images_per_second']:.1f} images/s",
                 "sampling takes"):
        assert text in out, text


def test_a_part_that_fails_is_told_and_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    chosen = parts(bad="-c print('why');raise(SystemExit(3))", good="-c print()")
    report, code = check(monkeypatch, tmp_path, chosen)
    assert code == 1
    assert {name: p["status"] for name, p in report["parts"].items()} == {"bad": "failed",
                                                                          "good": "ok"}
    assert "why" in report["parts"]["bad"]["end of its output"]


def test_what_takes_too_long_is_cut_off_and_what_was_found_is_kept(monkeypatch, tmp_path):
    chosen = parts(first="-c print()", slow="-m http.server 0", never="-c print()")
    report, code = check(monkeypatch, tmp_path, chosen, minutes=0.05)
    assert code == 1 and list(report["parts"]) == ["first", "slow"]
    assert report["parts"]["slow"]["status"] == "cut off"


def test_the_commands_take_their_flags():
    """A flag that bench.py does not know would show on a GPU only."""
    commands = [part.command.format(out="out").split() for part in gpu_check.PARTS]
    own = [words[1:] for words in commands if words[0] == "bench.py"]
    assert len(own) >= 4
    for words in own:
        parse_settings(bench.build_parser(), words)
