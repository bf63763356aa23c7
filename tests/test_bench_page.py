"""The file of results, and the page that is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ip_adapter.bench import __main__ as command
from ip_adapter.bench import page, results, words
from ip_adapter.bench.counting import Work
from ip_adapter.bench.errors import BenchError
from ip_adapter.bench.results import Figure, Measurement, Results, Row

ENVIRONMENT = {"device": "cpu", "machine": "An engine, 2 threads", "size": "real", "torch": "2.1"}


def row(number: int) -> Row:
    figures = (
        Figure("time", 1 + number / 1000, 0.9, 1.2, goal=1.01),
        Figure("bytes", 12345.6 + number, unit="MB", goal=0.0),
        Figure("slope", 0.25 * number, -1.0, 1.0, "kB per prompt", 0.0, True),
    )
    work = (Work(10, 1, 2, 0, 3, 1000), Work(12 + number, 2, 2, 0, 3, 1500))
    return Row(f"case {number} | a", figures, work, f"note {number}", {"seconds": [[1.0, 2.0]]})


def filled(path: Path) -> Results:
    kept = Results(path, ENVIRONMENT)
    for number, group in enumerate(words.TITLES, start=1):
        kept.add(Measurement(group, "one", 12, (row(number), Row(f"lonely {number}"))))
    return kept


@pytest.mark.parametrize(
    ("figure", "verdict"),
    [
        (Figure("a", 1.0), ""),
        (Figure("a", 1.0, 0.9, 1.1), ""),
        (Figure("a", 1.0, goal=1.0), "met"),
        (Figure("a", 1.001, goal=1.0), "missed"),
        (Figure("a", 1.0, 0.99, 1.01, goal=1.01), "met"),
        (Figure("a", 1.0, 0.99, 1.02, goal=1.01), "open"),
        (Figure("a", 1.1, 1.02, 1.2, goal=1.01), "missed"),
        (Figure("a", 1.0, -1.0, 2.0, goal=0.0, is_noise_met=True), "met"),
        (Figure("a", 1.0, 0.5, 2.0, goal=0.0, is_noise_met=True), "missed"),
    ],
)
def test_verdicts(figure: Figure, verdict: str) -> None:
    assert figure.verdict == verdict


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    kept = filled(tmp_path / "r.json")
    read = Results(tmp_path / "r.json", ENVIRONMENT)
    assert read.measurements == kept.measurements
    assert read.has("steps", "one") and not read.has("steps", "two")
    assert Results(tmp_path / "r.json").environment == ENVIRONMENT


def test_a_measurement_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    kept = filled(tmp_path / "r.json")
    count = len(kept.measurements)
    kept.add(Measurement("steps", "one", 3, (row(7),)))
    assert len(kept.measurements) == count
    assert [one.case for one in kept.rows("steps")] == ["case 7 | a"]


def test_other_machines_and_versions_are_refused(tmp_path: Path) -> None:
    filled(tmp_path / "r.json")
    with pytest.raises(BenchError, match=r"torch: '2\.1' there, '2\.2' now"):
        Results(tmp_path / "r.json", ENVIRONMENT | {"torch": "2.2"})


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 0}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(BenchError, match="results"):
        Results(tmp_path / "r.json")
    with pytest.raises(BenchError, match="Measure first"):
        Results(tmp_path / "none.json")


def test_the_page_has_every_figure(tmp_path: Path) -> None:
    text = page.markdown([filled(tmp_path / "r.json")])
    for number, group in enumerate(words.TITLES, start=1):
        assert f"## {words.TITLES[group]}\n" in text
        assert words.METHODS[group] in text
        assert f"bench {group} --again --device cpu --size real --rounds 12" in text
        time = f"{1 + number / 1000:.3f} (0.900 to 1.200)"
        assert (
            f"| case {number} \\| a (note {number}) | time | at most 1.010 | {time} | open |"
        ) in text
        assert f"| bytes | at most 0 MB | {12345.6 + number:.4g} MB | **missed** |" in text
        assert "kB per prompt | met |" in text
        assert f"| lonely {number} |" in text
        # operators, attentions, products, reads, allocations, arithmetic
        added = f"| 10 +{2 + number} | 1 +1 | 2 +0 | 0 +0 | 3 +0 | 1000 +500 |"
        assert f"| case {number} \\| a {added}" in text
    assert "An engine, 2 threads; torch 2.1." in text
    assert "[[1.0" not in text, "seconds stay in the JSON"


def test_two_machines_stand_under_one_title(tmp_path: Path) -> None:
    one = filled(tmp_path / "a.json")
    other = Results(tmp_path / "b.json", ENVIRONMENT | {"machine": "Another", "device": "cuda"})
    other.add(Measurement("steps", "one", 4, (row(9),)))
    text = page.markdown([one, other])
    assert text.count("## A step with image prompts") == 1
    assert "### Another" in text and "case 9" in text
    assert "bench steps --again --device cuda --size real --rounds 4" in text


def test_remarks_stand_under_their_group(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(page, "REMARKS", {"loading": "What is left is the digest."})
    text = page.markdown([filled(tmp_path / "r.json")])
    assert text.index(words.TITLES["loading"]) < text.index("the digest.")
    assert text.index("the digest.") < text.index(f"## {words.TITLES['memory']}")


def test_the_environment_names_a_kind_of_machine_only() -> None:
    found = results.environment("cpu", "small")
    assert set(found) <= {
        *("device", "machine", "size", "system", "python", "torch", "diffusers", "safetensors"),
        "comfyui",
    }
    assert found["device"] == "cpu" and found["machine"].endswith("threads")
    import platform

    assert not platform.node() or platform.node() not in json.dumps(found)


def test_the_command_writes_the_page_alone(tmp_path: Path, capsys: Any) -> None:
    filled(tmp_path / "r.json")
    out = tmp_path / "page.md"
    given = ["--page", str(out), "--results", str(tmp_path / "r.json")]
    assert command.main(given) == 0
    assert out.read_text() == page.markdown([Results(tmp_path / "r.json")])
    assert capsys.readouterr().out.strip() == str(out)
    assert command.main(["--page", str(out), "--results", str(tmp_path / "none.json")]) == 1
    assert "Measure first" in capsys.readouterr().err


def test_the_command_knows_its_groups(capsys: Any) -> None:
    assert list(command.GROUPS) == list(words.TITLES) == list(words.METHODS)
    with pytest.raises(SystemExit):
        command.main(["nonsense"])
    assert "none of steps, diffusers" in capsys.readouterr().err


def test_importing_the_benchmark_imports_no_host() -> None:
    import subprocess
    import sys

    code = (
        "import sys, ip_adapter.bench.__main__\n"
        "for name in ('comfy', 'diffusers', 'psutil', 'accelerate'):\n"
        "    assert name not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
