"""README.md and the manual: every Python block runs, the C program too, every link leads somewhere; and docstrings."""

import doctest
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import pyreg

ROOT = Path(__file__).resolve().parents[1]
MENTIONS = {  # a package, and how code mentions it
    "flax": r"\b(jax|flax|nnx|linen)\b",
    "torch": r"\btorch\b",
    "equinox": r"\b(equinox|eqx)\b",
    "haiku": r"\b(haiku|hk)\b",
    "keras": r"\b(keras|KERAS_BACKEND)\b",
}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
STARTS = ("numpy", "jax", "nnx", "linen", "equinox", "haiku", "keras", "torch")  # pages, and but for NumPy modules

# ---- Snippets --------------------------------------------------------------------------------------------------------


def blocks(page, language):
    """The blocks of a page in a language, each with the number of lines before it."""
    text = page.read_text()
    for block in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text[: block.start(1)].count("\n"), block[1]


def run_blocks(page):
    """The names that the blocks of a page, which are one program, have made, and how many of them were left out: those
    that mention a framework that is not there."""
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
    return names, left_out


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "python"))], ids=lambda page: page.name)
def test_python_blocks_run(page, threads):
    _, left_out = run_blocks(page)
    if left_out:
        pytest.skip(f"{left_out} blocks want a framework that is not installed")


@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_a_complete_program(name):
    """What a page begins with imports all that it uses, and learns."""
    page = ROOT / "docs" / f"{name}.md"
    first = re.search(r"^## (.*)$", page.read_text(), re.MULTILINE)
    assert first[1] == "A complete program"
    program = next(code for _, code in blocks(page, "python"))
    assert "import pyreg" in program
    assert re.search("losses|step|fit", program)


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


# ---- The specification of the masks ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def specified():
    """What the program of the page defines: plain Python."""
    names, _ = run_blocks(ROOT / "docs" / "mask-specification.md")
    assert not any(hasattr(thing, "__file__") for thing in names.values() if thing is not names["struct"])
    return names


RATES = (0, 1, 0.5, 0.1, 0.3, 1e-3, 0.999, 1e-9, 2.0**-70, 5 * 2.0**-66, 1 - 2.0**-53)  # two of them round to even
OFFSETS = (0, 31, 2**32 - 20, 2**40 + 5, 2**64 - 50)


@pytest.mark.parametrize("impl", ["philox", "threefry", "threefry_x64"])
def test_the_specified_mask_is_the_kernels(specified, impl):
    for rate, key, offset in itertools.product(RATES, (0, 7, 0x123456789ABCDEF0, 2**64 - 1), OFFSETS):
        kept = pyreg.dropout_mask(50, rate, key=key, impl=impl, offset=offset)
        assert specified["mask"](50, rate, key, impl, offset) == kept.tolist(), (rate, key, offset)


def test_the_specified_mask_is_jaxs(specified):
    rows = json.loads((ROOT / "tests" / "data" / "jax_masks.json").read_text())["rows"]
    for row in rows:
        size = np.prod(row["shape"], dtype=int)
        if row["kind"] == "mask" and 0 < size < 100:
            impl = "threefry_x64" if row["x64"] else "threefry"
            kept = specified["mask"](size, row["rate"], row["key"], impl)
            assert np.packbits(kept, bitorder="little").tobytes().hex() == row["mask"], row


# ---- Links -----------------------------------------------------------------------------------------------------------


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", prose)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_is_whole_on_the_page_of_a_package_index():
    """Nothing of the checkout is there."""
    assert all("://" in link for link in links(ROOT / "README.md"))
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_examples_that_are_named_are_there():
    for page in PAGES:
        for name in re.findall(r"\./run example (\w+)", page.read_text()):
            assert (ROOT / "examples" / f"{name}.py").exists() or name == "NAME", name


# ---- Docstrings ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork:")  # of JAX
@pytest.mark.parametrize("name", ["pyreg", *(f"pyreg.{start}" for start in STARTS[1:])])
def test_docstrings(name, monkeypatch, threads):
    """A module shows public names only; each has a docstring with an example, and the examples run."""
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "jax"))
    package = {"pyreg": "numpy", "pyreg.nnx": "flax", "pyreg.linen": "flax"}.get(name, name.rpartition(".")[2])
    pytest.importorskip(package)
    module = importlib.import_module(name)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for public in set(dir(module)) - {"__version__"}:
        thing = getattr(module, public)
        assert not public.startswith("_")
        assert re.search(r"^ *Examples\n *--------$", thing.__doc__, re.MULTILINE), public
        for test in finder.find(thing, f"{name}.{public}", module=False, globs={}):
            assert runner.run(test).failed == 0, test.name
