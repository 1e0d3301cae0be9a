"""What a user meets first: ./run, python -m pyreg, the example of the demo, and an editable installation."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from common import example, python

import pyreg
from pyreg import _load

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, **environ):
    """The exit status of ./run, and the one line that it prints."""
    done = subprocess.run(
        [ROOT / "run", *arguments], env={**os.environ, **environ}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    return done.returncode, line


def test_run_wants_a_python():
    assert run("demo", PYTHON="nosuch") == (
        1,
        "run: there is no 'nosuch'; wanted Python 3.11 or later, which PYTHON chooses: PYTHON=python3.13 ./run demo",
    )


def test_run_wants_a_new_python(tmp_path):
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\necho 3.10\nexit 1\n")
    old.chmod(0o755)
    status, line = run("demo", PYTHON=str(old))
    assert status == 1
    assert line.startswith(f"run: {old} is Python 3.10; wanted 3.11 or later")


def test_run_wants_a_compiler():
    status, line = run("demo", PYTHON=sys.executable, CC="nosuch -O2")
    assert status == 1
    assert line.startswith("run: there is no C compiler 'nosuch -O2'; wanted gcc or clang")


def test_run_wants_a_known_example():
    status, line = run("example", "nosuch")
    assert status == 2
    assert line.startswith("there is no example 'nosuch'; wanted one of ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds: is 0; wanted a whole number, at least 1"),
        (["--epochs", "1.5"], "--epochs: is 1.5; wanted a whole number, at least 1"),
        (["--rate", "1"], "--rate: is 1; wanted a probability of dropping, at least 0 and below 1"),
        (["--rate", "nan"], "--rate: is nan; wanted a probability of dropping, at least 0 and below 1"),
        (["--plot", "nosuch/digits.png"], "--plot is nosuch/digits.png; there is no folder nosuch"),
    ],
)
def test_the_demo_refuses(arguments, message, monkeypatch, capsys):
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # it sets variables for NumPy, which is loaded already
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setattr(sys, "argv", ["digits.py", *arguments])
    with pytest.raises(SystemExit):
        example("digits").main()
    assert message in capsys.readouterr().err


def test_a_report_of_a_bug():
    """It has what can make a difference, and it loads no framework to find out."""
    printed = python("import runpy, sys; runpy.run_module('pyreg'); print('jax' in sys.modules)")
    *report, loaded = printed.splitlines()
    assert loaded == "False"
    assert report[0] == f"pyreg {pyreg.__version__}"
    rows = dict(re.fullmatch(r"  (\S.*?)  +(\S.*)", line).groups() for line in report[1:])
    assert rows["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert rows["CPU"]
    assert f"numpy {metadata.version('numpy')}" in rows["packages"].split(", ")
    assert set(rows) >= {"platform", "compiler", "instruction set", "OpenMP", "threads", "last-level cache", "JAX"}


def test_a_reader_may_leave():
    """As `head` does."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-P", "-m", "pyreg"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_old_core_is_not_silent(tmp_path, monkeypatch):
    """As after `pip install -e .`: Python's files beside their sources, and the core elsewhere."""
    sources = [tmp_path / name for name in ("pyreg/_core.pyx", "csrc/dropout.c", "csrc/kernels/vec.h", "README.md")]
    core = tmp_path / "site-packages" / "pyreg" / "_core.so"
    for path in (*sources, core):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1000, 1000))
    monkeypatch.setattr(_load, "_package", tmp_path / "pyreg")
    monkeypatch.setattr(_load._core, "__file__", str(core))
    assert _load._edited_sources() == []
    for path in sources:
        os.utime(path, (2000, 2000))
    assert sorted(_load._edited_sources()) == sorted(map(str, sources[:3]))
    monkeypatch.setattr(_load._core, "__file__", str(tmp_path / "pyreg" / "_core.so"))  # an ordinary installation
    assert _load._edited_sources() == []


def test_a_core_for_another_python_is_no_source(tmp_path):
    package = tmp_path / "pyreg"
    package.mkdir()
    for name in "__init__.py", "_load.py":
        (package / name).write_bytes((Path(pyreg.__file__).parent / name).read_bytes())
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport pyreg"
    for core, message in (
        ("", "pyreg's source"),
        ("_core.cpython-30-nowhere.so", "compiled for another Python: it has _core"),
    ):
        if core:
            (package / core).touch()
        done = subprocess.run([sys.executable, "-S", "-P", "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert message in done.stderr


def test_an_archive_is_not_imported(tmp_path):
    with zipfile.ZipFile(tmp_path / "pyreg.zip", "w") as archive:
        for name in "__init__.py", "_load.py":
            archive.write(Path(pyreg.__file__).parent / name, f"pyreg/{name}")
    code = f"import sys\nsys.path.insert(0, {str(tmp_path / 'pyreg.zip')!r})\nimport pyreg"
    done = subprocess.run([sys.executable, "-S", "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "is in an archive, from which no compiled module is loaded" in done.stderr


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast -g", "-O2 -fassociative-math"])
def test_flags_that_change_results_are_refused(tmp_path, flag):
    command = ["cmake", "-S", ROOT, "-B", tmp_path, f"-DCMAKE_C_FLAGS={flag}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "changes pyreg's results" in done.stderr
