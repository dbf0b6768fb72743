"""What the documentation says holds: README's size, the files, names, tests and commands of each page, blocks of Python."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
GUIDE = [ROOT / "README.md", ROOT / "docs/index.md", *sorted((ROOT / "docs/guide").glob("*.md"))]
SOURCES = ("fp6_compile", "tests", "benchmarks", "examples", "docs")
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def _id(path):
    return str(path.relative_to(ROOT))


def _spans(page):
    """What stands between backquotes."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))


def test_readme_is_short_and_has_both_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 8192
    assert "\nmake demo " in text
    assert "\nmake test " in text


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_files_that_a_page_names_exist(page):
    files = {span for span in _spans(page) if re.fullmatch(rf"({'|'.join(SOURCES)}|\.ci|\.github)/[^\s*]+", span)}
    bare = {span for span in _spans(page) if re.fullmatch(r"[\w-]+\.(py|h|cpp|md|toml|txt|yml)", span)}
    here = {path.name for source in SOURCES for path in (ROOT / source).rglob("*.*")} | {p.name for p in ROOT.iterdir()}
    assert not [name for name in files if not (ROOT / name).exists()]
    assert not bare - here


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_relative_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", FENCE.sub("", page.read_text()))
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_names_of_the_package_that_a_page_uses_exist(page):
    names = set(re.findall(r"\bfp6_compile(?:\.[A-Za-z_]\w*)+", page.read_text()))
    assert not [name for name in sorted(names) if not _exists(name)]


def _exists(name):
    if (ROOT / name).exists():  # a file, such as fp6_compile.md
        return True
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_tests_that_a_page_names_exist(page):
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    known = {*re.findall(r"\bdef (test_\w+)", code), *(path.stem for path in (ROOT / "tests").rglob("test_*.py"))}
    assert not set(re.findall(r"\btest_\w+", page.read_text())) - known


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_commands_that_a_page_names_exist(page):
    text = page.read_text()
    modules = set(re.findall(r"python -m ((?:benchmarks|examples|fp6_compile)[\w.]*\w)", text))
    assert not [name for name in modules if find_spec(name) is None]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert not {*re.findall(r"^make ([\w-]+)", text, re.MULTILINE), *re.findall(r"`make ([\w-]+)`", text)} - {*targets}


class MyModel(nn.Module):
    """The quickstart's."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(256, 512, bias=False)
        self.down = nn.Linear(512, 256, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("page", GUIDE, ids=_id)
def test_python_blocks_run(page, captured, tmp_path, monkeypatch):
    """Every block that is not marked `<!-- not run: why -->`, in order, on a new small model."""
    import fp6_compile

    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "nn": nn, "fp6_compile": fp6_compile, "MyModel": MyModel}
    names["x"] = torch.randn(4, 256, dtype=torch.bfloat16)
    for block in FENCE.finditer(page.read_text()):
        mark = block["mark"] or ""
        if block["language"] != "python" or mark.startswith("not run: "):
            continue
        if mark.startswith("needs "):
            pytest.importorskip(mark.removeprefix("needs "))
        names["model"] = MyModel().bfloat16().eval()
        line = page.read_text()[: block.start("code")].count("\n")
        exec(compile("\n" * line + block["code"], str(page), "exec"), names)


def test_the_quickstarts_model_is_quantized(captured):
    """What its page shows as the report is the report of its code."""
    page = (ROOT / "docs/guide/quickstart.md").read_text()
    blocks = list(FENCE.finditer(page))
    shown = blocks[next(i for i, block in enumerate(blocks) if "last_report()" in block["code"]) + 1]["code"]
    import fp6_compile

    with torch.no_grad():
        torch.compile(MyModel().bfloat16().eval(), backend="fp6")(torch.randn(1, 256, dtype=torch.bfloat16))
    assert str(fp6_compile.last_report()) == shown.strip()
