"""Every file, folder and module that the documentation names is there."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modeling_cots"
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "demo" / "README.md"])
# Folders of ours whose files are named by a path. What a run or a Hub repository holds is not in this repository.
FOLDERS = ("benchmarks", "demo", "docs", "examples", "model_cards", "modeling_cots", "tests", ".ci", ".github")
# Files of others: what a model repository holds, and what a reader writes.
NOT_OURS = {"handler.py", "SCRIPT.py", "cots_clip_benchmark.py", "cots_mteb.py"}


def named_in(text: str) -> set[str]:
    """Paths in running text, commands and links, and dotted names of the package."""
    names = set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*[\w*/]", text))
    names |= set(re.findall(r"`([\w/]+\.py)`", text))
    names |= set(re.findall(r"\b(modeling_cots(?:\.\w+)+)\b", text))
    return names - NOT_OURS


def is_there(name: str) -> bool:
    if re.fullmatch(r"modeling_cots(\.\w+)+", name) and not name.endswith((".py", ".md")):
        return is_module(name.split(".")[1:])
    if "*" in name:
        return any(ROOT.glob(name))
    if (ROOT / name).exists():
        return True
    # A file by its name alone, of which there is one, or by its room.
    homes = [ROOT / folder for folder in ("modeling_cots", "tests", "examples", "benchmarks", "demo")]
    return len([file for home in homes for file in home.rglob(name)]) == 1 or (PACKAGE / name).is_file()


def is_module(parts: list[str]) -> bool:
    """Whether the parts lead to a file or folder of the package, or from one to a name that it defines."""
    folder = PACKAGE
    for number, part in enumerate(parts):
        if (folder / part).is_dir():
            folder = folder / part
            continue
        file = folder / f"{part}.py"
        if file.is_file():
            rest, text = parts[number + 1 :], file.read_text(encoding="utf-8")
            return not rest or re.search(rf"\b{rest[0]}\b", text) is not None
        return re.search(rf"\b{part}\b", (folder / "__init__.py").read_text(encoding="utf-8")) is not None
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_is_there(page):
    names = named_in(page.read_text(encoding="utf-8"))
    assert [name for name in sorted(names) if not is_there(name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_what_is_not_there_is_found():
    text = "See `losses.py`, `nowhere.py`, `modeling_cots/gone.py` and modeling_cots.evaluation.no_metrics."
    assert {name for name in named_in(text) if not is_there(name)} == {
        "nowhere.py",
        "modeling_cots/gone.py",
        "modeling_cots.evaluation.no_metrics",
    }


def test_symbols_of_the_method_page_are_in_their_files():
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    cells = re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", page)
    assert len(cells) > 15
    for file, symbols in cells:
        text = (PACKAGE / file).read_text(encoding="utf-8")
        for symbol in re.findall(r"`([\w.]+)`", symbols):
            missing = [part for part in symbol.split(".") if not re.search(rf"(def|class) {part}\b", text)]
            assert not missing, f"{file} defines no {missing[0]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_installs_the_package_from_where_it_is_not(page):
    """It is not on PyPI: a page installs it from this folder, `-e ".[extra]"`, with an extra that there is."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"pip install [\"']?modeling_cots", text)
    extras = {extra for names in re.findall(r"-e \"\.\[([\w,]+)\]\"", text) for extra in names.split(",")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extras <= set(project["optional-dependencies"])
