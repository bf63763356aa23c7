"""Every command on the pages is run by a test, or stands here beside the test that runs it.

`COVER` names a test for each command. The tests of this file, and of tests/host, get their
commands from it and run them as they stand on the page, in a temporary folder where what they name
is small. A command that is not in the table fails a test, and so does a line of the table that is
on no page.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import tomllib

from ip_adapter import __main__ as command_line
from tests.conftest import NARROW, ROOT
from tests.hub_server import Hub
from tests.synthetic import adapters
from tests.test_downloads import server as hub  # noqa: F401 (a fixture)

HERE, HOST = "tests/test_docs_commands.py", "tests/host/test_docs_commands.py"
CLONE = f"{HERE}::test_what_is_cloned_is_this_project"
LINK = f"{HERE}::test_the_miniature_is_linked_into_a_comfyui"
PIP = f"{HERE}::test_pip_asks_for_what_exists"
MAKE = f"{HERE}::test_make_knows_its_targets"
HELP = f"{HERE}::test_help_is_there"
ACCELERATE = f"{HERE}::test_accelerate_has_its_commands"
FILES = f"{HERE}::test_files_are_described_and_converted"
LIST = f"{HERE}::test_models_are_listed"
FETCH = f"{HERE}::test_models_are_downloaded"
LOCALES = "tests/host/test_locales.py::test_every_text_is_there_and_none_is_left_over"
SEAL = "tests/host/test_locales.py::test_translations_are_of_the_present_english"
SHOTS = "tests/test_docs.py::test_every_page_shows_its_node_and_no_picture_is_left_over"
PICTURES = f"{HOST}::test_a_picture_of_the_recipes_is_made"
TRAIN = f"{HOST}::test_the_trainer_runs_as_on_the_page"
JUDGE = f"{HOST}::test_the_evaluator_runs_as_on_the_page"
START = f"{HOST}::test_comfyui_starts_as_on_the_page"
SEVERAL = "tests/host/test_train_loop.py::test_two_processes_equal_one_at_the_same_global_batch"
AGAIN = "tests/test_miniature_recipe.py::test_what_is_there_is_not_trained_again_unless_asked_for"
BENCH = "tests/host/test_bench.py::test_the_command_measures_and_goes_on"
EVIDENCE = "tests/host/test_miniature_evidence.py::test_weight_zero_is_the_base"
OLD = "tests/host/test_migration_doc.py::test_the_quick_figures_are_those_of_the_page"

COVER = {
    # Setting up. The repository's address is compared, since there is no network.
    "git clone https://github.com/ip-adapter/ipadapter-image-prompt ip-adapter": CLONE,
    "cd ip-adapter": CLONE,
    "cd ComfyUI/custom_nodes": LINK,
    "ln -s ip-adapter/miniature miniature": LINK,
    r"mklink /J miniature ip-adapter\miniature": LINK,  # Windows: the same two names
    "python -m pip install -r ip-adapter/requirements.txt": PIP,
    "python -m pip install onnxruntime": PIP,
    "python -m pip install accelerate": PIP,
    "python -m pip install accelerate tensorboard pyyaml tqdm": PIP,
    "python -m pip install websocket-client": PIP,
    # Recipes are expanded only: to follow one takes minutes, or runs these very tests.
    "make help": MAKE,
    "make test": MAKE,
    "make unit": MAKE,
    "make parity": MAKE,
    "make host": MAKE,
    "make hosts": MAKE,
    "make browser": MAKE,
    "make demo": MAKE,  # what it makes: tests/host/test_miniature_server.py
    "make bench": MAKE,  # tests/host/test_bench.py
    "make evidence": MAKE,  # tests/host/test_miniature_evidence.py
    "make miniature": MAKE,  # tests/test_miniature_recipe.py
    # Where a page only names a command, its help is asked for.
    "python -m ip_adapter": HELP,
    "python -m ip_adapter.bench": HELP,
    "python -m ip_adapter.bench ...": BENCH,  # hours, at real size
    "python -m ip_adapter.evaluate": HELP,
    "python -m ip_adapter.evaluate --help": HELP,
    "python -m ip_adapter.train": HELP,
    "python -m ip_adapter.train --help": HELP,
    "python -m miniature": HELP,
    "python -m ip_adapter models": LIST,
    "python -m ip_adapter models ...": LIST,
    "python -m ip_adapter download ...": FETCH,
    "python -m scripts.doc_pictures": PICTURES,
    "python -m ip_adapter describe FILE...": FILES,
    "python -m ip_adapter convert SOURCE [TARGET]": FILES,
    "python -m ip_adapter describe runs/first/ip-adapter-00020000.safetensors": FILES,
    # On the miniature, a step or a picture each.
    "python -m ip_adapter.train --checkpoint ...": TRAIN,
    "python -m ip_adapter.train --resume ...": TRAIN,
    "tensorboard --logdir runs/first/log": TRAIN,
    'python -c "from pathlib import Path; from miniature import adapters; ...': TRAIN,
    "python -m miniature train": TRAIN,
    "python -m miniature train --cpu ...": TRAIN,
    "python -m ip_adapter.evaluate --data coco ...": JUDGE,
    "python -m miniature evaluate": JUDGE,
    "python -m miniature evaluate --cpu ...": JUDGE,
    ".venv/bin/python .host/ComfyUI/main.py --cpu --base-directory .host/base": START,
    # What takes long, or several GPUs, is tested in small elsewhere.
    "accelerate config": ACCELERATE,  # it asks questions
    "accelerate launch": ACCELERATE,
    "accelerate launch --multi_gpu ...": SEVERAL,
    "accelerate launch --use_deepspeed ...": SEVERAL,
    "python -m miniature base --again": AGAIN,
    "python -m miniature.evidence --count 96": EVIDENCE,
    "python -m scripts.migration": OLD,
    "python -m scripts.locales update": LOCALES,  # they write into the repository: what they
    "python -m scripts.locales seal": SEAL,  # leave behind is what these tests look at
    "python -m scripts.screenshots nodes": SHOTS,
}
"""Command -> the test that runs it; one that ends in dots stands for all that begin so."""

PYTHON = {
    "docs/api.md": f"{HOST}::test_programs_for_the_api_run",
    "docs/miniature.md": (
        "tests/test_miniature_page.py::test_its_code_paints_samples_for_the_evaluator"
    ),
}
"""Page -> the test that runs its blocks of Python."""

PROGRAMS = {"accelerate", "cd", "curl", "git", "ln", "make", "mklink", "pip", "python", "python3"}
PROGRAMS |= {"tensorboard", "uv", "wget", ".venv/bin/python"}
"""What the first word of a command may be."""

NO_COMMANDS = {
    "CONTRIBUTING.md": {"__init__.py", "locales/<lang>/nodeDefs.json"},  # folders
    "docs/evaluation.md": {"coco/val2017/000000000139.jpg", "hours", '{"image":'},
    "docs/how_it_works.md": {"Z_new", "w", "L"},  # formulas
    "docs/miniature.md": {"[texture]"},
}
"""Page -> the first words of blocks that are something else."""

FENCE = re.compile(r"^ *```(\S*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}.*\n)(?:(?: {4}.*)?\n)*")


def pages() -> list[Path]:
    """All that people read."""
    guides = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return guides + sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "web/docs").rglob("*.md"))


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and text of every block of code."""
    for language, block in FENCE.findall(text):
        yield language, textwrap.dedent(block)
    for match in INDENTED.findall(FENCE.sub("", text)):
        yield "", textwrap.dedent(match).strip("\n") + "\n"


def lines(block: str) -> list[str]:
    """The commands of a block, each on one line."""
    joined = re.sub(r"\\\n\s*", "", block)
    return [" ".join(line.split()) for line in joined.splitlines() if line.strip()]


@cache
def commands() -> dict[str, list[str]]:
    """Every command -> the pages that have it."""
    found: dict[str, list[str]] = {}
    for page in pages():
        text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
        here = [line for lang, block in blocks(text) if not lang for line in lines(block)]
        here = [line for line in here if line.split()[0] in PROGRAMS]
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text)):
            words = code.split()
            if len(words) > 1 and words[0] in PROGRAMS and words[1] != "is":
                here.append(" ".join(words))
        for line in here:
            found.setdefault(line, []).append(name)
    return found


def entry(command: str) -> str | None:
    """The line of the table that a command belongs to."""
    if command in COVER:
        return command
    stems = [key for key in COVER if key.endswith("...") and command.startswith(key[:-3])]
    return max(stems, key=len, default=None)


def run_by(test: str) -> list[str]:
    """The commands that a test is to run, in the order of the pages."""
    return [command for command in commands() if COVER.get(entry(command) or "") == test]


def test_every_command_is_run_by_a_test() -> None:
    unlisted = {command: where for command, where in commands().items() if not entry(command)}
    assert not unlisted, "say in COVER which test runs these"


def test_the_table_has_nothing_else() -> None:
    assert set(COVER) == {entry(command) for command in commands()}


def test_every_block_is_of_a_known_kind() -> None:
    seen: dict[str, set[str]] = {}
    for page in pages():
        text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
        for language, block in blocks(text):
            assert language in ("", "python", "yaml"), (name, language)
            if language == "python":
                assert name in PYTHON, "say in PYTHON which test runs it"
            firsts = {line.split()[0] for line in lines(block)}
            if not language and not firsts <= PROGRAMS:
                seen.setdefault(name, set()).add(block.split()[0])
    assert seen == NO_COMMANDS


@pytest.mark.parametrize("test", sorted({*COVER.values(), *PYTHON.values()}))
def test_what_the_table_names_is_a_test(test: str) -> None:
    file, name = test.split("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def run(command: str | list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, by this Python."""
    words = shlex.split(command) if isinstance(command, str) else command
    if words[0] in ("python", ".venv/bin/python"):
        words[0] = sys.executable
    elif (beside := Path(sys.executable).with_name(words[0])).exists():
        words[0] = str(beside)
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)


def test_what_is_cloned_is_this_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (clone, enter) = run_by(CLONE)
    assert shlex.split(clone)[:2] == ["git", "clone"]
    address, folder = shlex.split(clone)[2:]
    assert address == project["urls"]["Repository"]
    assert enter == f"cd {folder}"


def test_the_miniature_is_linked_into_a_comfyui(tmp_path: Path) -> None:
    enter, *linking = run_by(LINK)
    folder = tmp_path / enter.removeprefix("cd ")
    folder.mkdir(parents=True)
    (folder / "ip-adapter").symlink_to(ROOT, target_is_directory=True)
    on_windows, elsewhere = sorted(linking, key=lambda command: command.startswith("ln"))
    assert run(elsewhere, folder).returncode == 0
    assert (folder / "miniature" / "models" / "checkpoints").is_dir()
    _, _, name, target = on_windows.split()
    assert (folder / name).readlink() == Path(*target.split("\\"))


@pytest.mark.parametrize("command", run_by(PIP))
def test_pip_asks_for_what_exists(command: str, tmp_path: Path) -> None:
    """All of it is installed here, so that pip needs no network to say so."""
    (tmp_path / "ip-adapter").symlink_to(ROOT, target_is_directory=True)
    ran = run(f"{command} --no-index --dry-run --disable-pip-version-check", tmp_path)
    assert ran.returncode == 0, ran.stderr
    wanted = command.split("install ")[1]
    assert ran.stdout.count("Requirement already satisfied") >= len(wanted.split("-r")[0].split())


@pytest.mark.parametrize("command", run_by(MAKE))
def test_make_knows_its_targets(command: str) -> None:
    target = command.removeprefix("make ")
    ran = run(["make", "-n", target], ROOT)
    assert ran.returncode == 0 and ran.stdout, ran.stderr
    assert f"make {target} " in run(["make", "help"], ROOT).stdout


@pytest.mark.parametrize("command", run_by(HELP))
def test_help_is_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m` runs a module's `__main__`, and that its `main`."""
    module = importlib.import_module(f"{command.split()[2]}.__main__")
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: {command.removesuffix(' --help')} ")


def test_accelerate_has_its_commands() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert "accelerate" in scripts.names
    for command in run_by(ACCELERATE):
        assert importlib.util.find_spec(f"accelerate.commands.{command.split()[1]}")


def test_files_are_described_and_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = adapters.base_sd15(NARROW)
    for command in run_by(FILES):
        words = command.removeprefix("python -m ip_adapter ").split()
        adapters.write_bin(tensors, Path("one.bin"))
        adapters.write_safetensors(tensors, Path("two.safetensors"))
        match words:
            case ["describe", "FILE..."]:
                given, said = [["one.bin", "two.safetensors"]], "for SD 1.5, 4 tokens"
            case ["describe", path]:
                Path(path).parent.mkdir(parents=True)
                adapters.write_safetensors(tensors, Path(path))
                given, said = [[path]], f"{Path(path).name}: "
            case ["convert", "SOURCE", "[TARGET]"]:
                given, said = [["one.bin"], ["one.bin", "other.safetensors"]], ", 36 tensors\n"
        for files in given:
            assert command_line.main([words[0], *files]) == 0
            assert capsys.readouterr().out.count(said) == (
                len(files) if words[0] != "convert" else 1
            )
    assert Path("one.safetensors").is_file() and Path("other.safetensors").is_file()


@pytest.mark.parametrize("command", run_by(LIST))
def test_models_are_listed(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*shlex.split(command)[3:], "--to", str(tmp_path)]
    assert command_line.main(words) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "state" in listed[0] or "--installed" in words  # an empty folder has none


@pytest.mark.parametrize("command", run_by(FETCH))
def test_models_are_downloaded(
    command: str,
    hub: Hub,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From a small hub on this machine."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[3:]
    assert command_line.main([*words, *([] if "--to" in words else ["--to", "FOLDER"])]) == 0
    adapters_there = [path.suffix for path in (tmp_path / "FOLDER" / "ipadapter").iterdir()]
    assert len(adapters_there) == sum("/" in word for word in words)
    encoders = tmp_path / "FOLDER" / "clip_vision"
    assert encoders.is_dir() != ("--without-encoder" in words)
    assert hub.ranges
