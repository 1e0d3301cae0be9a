"""README.md and docs/: every Python block runs, the C program too, and every link leads somewhere."""

import re
import shutil
import subprocess
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MENTIONS = {  # a package, and how code mentions it
    "flax": r"\b(jax|flax|nnx|linen)\b",
    "torch": r"\btorch\b",
    "equinox": r"\b(equinox|eqx)\b",
    "haiku": r"\b(haiku|hk)\b",
    "keras": r"\b(keras|KERAS_BACKEND)\b",
}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    """The blocks of a page in a language, each with the number of lines before it."""
    text = page.read_text()
    for block in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text[: block.start(1)].count("\n"), block[1]


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "python"))], ids=lambda page: page.name)
def test_python_blocks_run(page, threads):
    """The blocks of a page are one program.  It goes without those that mention a framework that is not there."""
    names, left_out = {"__name__": page.stem}, 0
    missing = [mentions for package, mentions in MENTIONS.items() if not find_spec(package)]
    for line, code in blocks(page, "python"):
        without_comments = re.sub("#.*", "", code)
        if any(re.search(names_of_it, without_comments) for names_of_it in missing):
            left_out += 1
            continue
        with warnings.catch_warnings():
            if "import" in code:
                warnings.simplefilter("ignore")  # of other packages, while they are imported
            exec(compile("\n" * line + code, page, "exec"), names)
    if left_out:
        pytest.skip(f"{left_out} blocks want a framework that is not installed")


@pytest.mark.slow  # it compiles the library
def test_the_c_program_runs(tmp_path):
    if not shutil.which("cmake"):
        pytest.skip("needs cmake")
    page = ROOT / "docs" / "c.md"
    for name, language in (("CMakeLists.txt", "cmake"), ("main.c", "c")):
        [(_, code)] = blocks(page, language)
        (tmp_path / name).write_text(code)
    (tmp_path / "pyreg").symlink_to(ROOT)
    for command in (["cmake", "-B", "build"], ["cmake", "--build", "build", "--parallel", "2"]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    printed = subprocess.run([tmp_path / "build" / "app"], capture_output=True, text=True, check=True).stdout
    promised = re.search(r"It prints `(.*?)`", page.read_text())[1]
    assert printed.startswith(promised)


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_examples_that_are_named_are_there():
    for page in PAGES:
        for name in re.findall(r"\./run example (\w+)", page.read_text()):
            assert (ROOT / "examples" / f"{name}.py").exists() or name == "NAME", name
