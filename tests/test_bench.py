"""bench/: every command runs on tiny cases, and its file has what the documents are written from."""

import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import pyreg
from bench import __main__ as program
from bench import bandwidth, cases, compare, machine, output, plan, report, scaling, timing
from bench.history import ops as history
from pyreg import _core

ROOT = Path(__file__).resolve().parents[1]
FAST = ["--rounds", "2", "--seconds", "0.5"]
SIZES = ["--sizes", "1e3", "1e4"]
RUNS = {
    "compare": ["dropout", "batchnorm", "--quick", "--dtypes", "float32", "--threads", "1", "--peers", "NumPy", *FAST],
    "accuracy": ["--quick", "--elements", "1024", "--channels", "1"],
    "roofline": ["--quick", "--levels", "L1", "L2", *FAST],
    "scaling": [
        "--quick",
        "--calls",
        "philox",
        "forward",
        "--sizes",
        "1e3",
        "1e4",
        "--threads",
        "1",
        "2",
        "--neighbour",
        "--stores",
        *FAST,
    ],
    "plan": ["--quick", "--bytes", "1e6", "1e9", *FAST],
}
JAX_RUNS = {
    "compare-jax": ["compare", "jax", "--quick", "--shapes", "dropout 16", "--threads", "1", *FAST],
    "train_step": ["train_step", "--models", "mlp-64", "--layers", "off", "Flax", "pyreg", "--quick", *FAST],
}
RECORDS = {  # what a record has, at least
    "compare": {"op", "dtype", "shape", "threads", "elements", "rounds", "seconds", "ratios"},
    "accuracy": {"layout", "mean", "errors"},
    "roofline bandwidth": {"level", "bytes", "threads", "rates"},
    "roofline kernels": {"kernel", "dtype", "level", "threads", "seconds", "limit", "core", "ratios"},
    "scaling strong": {"call", "bytes", "seconds", "ratios", "efficiency", "copy efficiency"},
    "scaling weak": {"call", "bytes", "seconds", "ratios", "efficiency", "copy efficiency"},
    "scaling pay from": {"call", "threads", "wins", "from"},
    "scaling neighbour": {"call", "bytes", "base seconds", "rows"},
    "scaling stores": {"call", "bytes", "seconds", "ratios"},
    "plan predicted": {"kernel", "bytes", "cores", "nodes", "pages", "seconds", "speedup", "bound"},
    "plan checked": {"kernel", "bytes", "threads", "seconds", "predicted"},
    "train_step": {"model", "seconds", "ratios", "variants"},
}


@pytest.fixture(scope="module", autouse=True)
def settings_afterwards():
    with threadpool_limits():  # PyTorch's number of threads is OpenMP's
        yield
    pyreg.set_num_threads(None)
    _core.set_gears()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """All that the commands wrote."""
    folder = tmp_path_factory.mktemp("results") / machine.folder()
    folder.mkdir()
    installed = cases.installed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "installed", lambda peer: peer != "Flax" and installed(peer))  # it compiles for seconds
        for name, arguments in RUNS.items():
            run(name, arguments, folder / name)
    return folder


def run(name, arguments, stem):
    program.main([name, *arguments, "--markdown", "--json", f"{stem}.json", "--plot", f"{stem}.svg"])


def check_file(path, name):
    content = json.loads(path.read_text())
    assert content["command"] == name
    assert content["quick"] is True
    assert {"cpu", "cpus", "caches", "instruction set", "OpenMP", "compiler", "packages", "huge pages"} <= set(
        content["machine"]
    )
    records = content["records"]
    kinds = {name: records} if isinstance(records, list) else {f"{name} {k}": v for k, v in records.items()}
    for kind, rows in kinds.items():
        if kind == "plan measured":
            continue
        assert rows, kind
        for row in rows:
            assert RECORDS[kind] <= set(row), kind
            for times in row["seconds"].values() if isinstance(row.get("seconds"), dict) else ():
                if isinstance(times, dict):
                    assert 0 < times["min"] <= times["median"] < 100
    for ratio in output.ratios(records):
        assert set(ratio) == {"min", "median", "spread"}
    return content


@pytest.mark.parametrize("name", RUNS)
def test_command(files, name):
    content = check_file(files / f"{name}.json", name)
    if name == "scaling":
        assert content["built"]["parallel_from_ns"] == _core.config()["parallel_from_ns"]
        assert set(content["records"]) == {"strong", "pay from", "weak", "neighbour", "stores"}
    plots = sorted(p.name for p in files.glob(f"{name}*.svg"))
    assert plots == (["compare-batchnorm.svg", "compare-dropout.svg"] if name == "compare" else [f"{name}.svg"])
    assert all("<svg" in (files / p).read_text() for p in plots)


def test_jax_commands(tmp_path, capsys):
    pytest.importorskip("flax")
    for name, (command, *arguments) in JAX_RUNS.items():
        run(command, arguments, tmp_path / name)
        content = check_file(tmp_path / f"{name}.json", command)
    assert content["records"][0]["variants"]["off"]["difference from Flax"] > 0
    assert content["records"][0]["variants"]["pyreg"]["difference from Flax"] < 1e-6
    shown = capsys.readouterr().out
    assert "| dropout 16 |" in shown
    assert "| pyreg |" in shown


def asked_for(text):
    """The parts that a document has marks for."""
    return re.findall("<!-- bench: (.*) -->", text)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("linen", "haiku", "keras")]  # XLA compiles for long


@pytest.mark.parametrize("framework", ["equinox", *SLOW])
def test_training_steps_of_other_frameworks(tmp_path, capsys, framework):
    pytest.importorskip("flax")
    if framework != "linen" and importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    options = ["--framework", framework, "--quick", "--rounds", "1", "--seconds", "0.1"]
    run("train_step", options, tmp_path / "others")
    [record] = check_file(tmp_path / "others.json", "train_step")["records"]
    differences = {name: variant["difference from stock"] for name, variant in record["variants"].items()}
    assert differences["stock"] == 0
    assert differences["pyreg"] < 1e-6 < 1e-4 < min(differences["philox"], differences["off"])
    assert f"| {framework} | transformer-64 | 1.00 |" in capsys.readouterr().out


def test_frameworks_of_a_training_step():
    with pytest.raises(SystemExit):
        program.main(["train_step", "--framework", "caffe"])


needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")


@needs_jax
def test_report_fills_the_documents(files, tmp_path, capsys):
    """From the files of the other commands; what is missing stays as it was."""
    document = tmp_path / "performance.md"
    shutil.copy(ROOT / "docs" / "performance.md", document)
    before = document.read_text()
    program.main(["report", "--no-run", "--docs", str(files.parent), "--documents", str(document)])
    shown = " ".join(capsys.readouterr().out.split())
    left = {name for name in asked_for(before) if f"left as it was {name}:" in shown}
    steps = {"train_step", "train_step neighbour", "train_step others", "plot train_step"}
    assert left == steps | {"compare jax", "plot compare-jax"}
    after = document.read_text()
    assert after != before
    assert pyreg.show_config("dicts")["cpu"] in after
    names = [line for line in before.splitlines() if line.startswith("<!--")]
    assert names == [line for line in after.splitlines() if line.startswith("<!--")]
    program.main(["report", "--no-run", "--docs", str(files.parent), "--documents", str(document)])
    assert document.read_text() == after


def test_documents_ask_for_the_parts_that_there_are():
    parts = {name for document in report.documents() for name in asked_for(document.read_text())}
    plots = {name for name in parts if name.startswith("plot ")}
    assert parts - plots == set(report.PARTS)
    drawn = {f"plot {plot.stem}" for plot in (ROOT / "docs" / "performance").glob("*/*.svg")}
    assert plots == drawn


def test_pictures(tmp_path):
    folder, pages = ROOT / "docs" / "pictures", "".join(map(Path.read_text, (ROOT / "docs").glob("*.md")))
    program.main(["pictures", "--folder", str(tmp_path)])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in folder.iterdir())
    assert all(f"(pictures/{p.name})" in pages for p in folder.iterdir())
    assert sum(p.stat().st_size for p in folder.iterdir()) < 300_000


@needs_jax
def test_report_keeps_the_machines_side_by_side(tmp_path):
    result = json.loads(next((ROOT / "docs" / "performance").glob("*/compare.json")).read_text())
    for cpu in ("First CPU", "Second CPU"):
        folder = tmp_path / "results" / cpu
        folder.mkdir(parents=True)
        result["machine"]["cpu"] = cpu
        (folder / "compare.json").write_text(json.dumps(result))
        (folder / "compare-dropout.svg").touch()
    (tmp_path / "results" / "Second CPU" / "compare-jax.svg").touch()
    page = tmp_path / "page.md"
    marks = [
        f"<!-- bench: {name} -->\n<!-- /bench -->\n" for name in ("losses", "plot compare-dropout", "plot compare-jax")
    ]
    page.write_text("".join(marks))
    program.main(["report", "--no-run", "--docs", str(tmp_path / "results"), "--documents", str(page)])
    losses, dropout, jax = page.read_text().split("<!-- /bench -->\n")[:3]
    assert losses.index("On First CPU") < losses.index("| op |") < losses.index("On Second CPU")
    assert "(results/First CPU/compare-dropout.svg)" in dropout
    assert "(results/Second CPU/compare-dropout.svg)" in dropout
    assert "First CPU" not in jax
    assert "(results/Second CPU/compare-jax.svg)" in jax


@pytest.mark.parametrize("how", [["-m", "bench"], ["bench"]])
def test_runs_from_the_checkout(how):
    """There ./pyreg, which is not compiled, is in front."""
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    listed = subprocess.run([sys.executable, *how], cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    assert all(name in listed.stdout for name in program.COMMANDS)
    tiny = ["scaling", "--calls", "philox", "--sizes", "1000", "--threads", "1", *FAST]
    command = [sys.executable, *how, *tiny]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "strong scaling" in done.stdout


def test_help_of_every_command(capsys):
    for name in program.COMMANDS:
        if name == "train_step":
            pytest.importorskip("flax")
        with pytest.raises(SystemExit) as done:
            program.main([name, "--help"])
        assert done.value.code == 0
        assert f"python -m bench {name}" in capsys.readouterr().out


def test_a_missing_peer_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(cases, "installed", lambda peer: peer == "NumPy")
    tiny = ["--shapes", "16", "--dtypes", "float32", "--rates", "0.1", "--threads", "1"]
    program.main(["compare", "dropout", *tiny, *FAST])
    shown = capsys.readouterr().out
    assert all(f"skipped {peer}" in shown for peer in ("PyTorch", "Flax", "oneDNN"))
    assert "NumPy /" in shown
    assert "PyTorch /" not in shown


def test_compare_says_what_is_wrong():
    with pytest.raises(SystemExit, match="no op dropuot"):
        program.main(["compare", "dropuot"])
    with pytest.raises(SystemExit, match="wanted one op"):
        program.main(["compare", "dropout", "jax", "--shapes", "16"])
    with pytest.raises(SystemExit, match="has 2 numbers"):
        program.main(["plan", "--cores", "4", "8", "--nodes", "1"])


# ---- Timing ----------------------------------------------------------------------------------------------------------


def arguments(rounds, seconds=60.0):
    return type("Arguments", (), {"rounds": rounds, "seconds": seconds})


def test_contenders_take_turns(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0)
    monkeypatch.setattr(timing, "WARM_BELOW_SECONDS", 0)
    order = []
    samples = timing.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, arguments(5))
    assert order[8:] == ["a", "b"] * 4  # after first calls of each
    assert [len(s) for s in samples.values()] == [5, 5]


def test_a_case_ends_when_its_time_is_over():
    samples = timing.interleave({"a": lambda: None}, arguments(50, seconds=0))
    assert len(samples["a"]) == timing.LEAST_ROUNDS


def test_cases_are_measured_in_passes():
    made = []
    cases = ["x", "y"]
    samples = timing.in_passes(cases, lambda case: (made.append(case), ({"a": lambda: None}, ()))[1], arguments(6))
    assert made == ["x", "y", "x", "y"]
    assert [len(s["a"]) for s in samples] == [6, 6]


def test_unsteady_ratios_get_more_rounds_and_a_mark(monkeypatch):
    assert not timing.unsteady(timing.summary([2.0] * 9))
    drifting = timing.summary([1.0] * 6 + [1.5] * 6)
    assert timing.unsteady(drifting)
    assert drifting["spread"] == pytest.approx(0.5)
    assert output.ratio_text(drifting).startswith("~")
    monkeypatch.setattr(timing, "summary", lambda samples: drifting)
    calls = {"a": lambda: None, "b": lambda: None}
    assert len(timing.interleave(calls, arguments(4), [("a", "b")])["a"]) == 12
    assert len(timing.interleave(calls, arguments(4))["a"]) == 4


def test_noise_is_reported(capsys):
    output.warn_of_noise([{"ratios": {"a / b": timing.summary([1.0, 1.0, 1.0])}}])
    assert capsys.readouterr().out == ""
    output.warn_of_noise({"strong": [{"ratios": {"a / b": timing.summary([1.0, 1.0, 2.0])}}]})
    assert "1 of 1 ratios" in capsys.readouterr().out


def test_losses_are_what_a_peer_does_quicker():
    slow, fast = timing.summary([0.5]), timing.summary([2.0])
    record = {"op": "dropout", "dtype": "float32", "rate": 0.1, "shape": 16, "threads": 1}
    record["ratios"] = {"PyTorch / philox": slow, "NumPy / philox": fast, "philox out= / copyto": slow}
    assert [name for _, name, _ in compare.losses([record])] == ["PyTorch / philox"]


# ---- What the commands compute ---------------------------------------------------------------------------------------


def test_loops_of_the_bandwidth():
    loops = bandwidth.Loops(1 << 16)
    pattern = np.arange(1 << 15) % 251
    loops.source[:], loops.target[:] = pattern, 0
    assert loops.copy() == 2 * loops.passes * (1 << 15)
    np.testing.assert_array_equal(loops.target, pattern)
    assert loops.read() == loops.write() == loops.passes << 16
    assert (loops.whole == 1).all()


def test_memory_is_a_working_set_beyond_the_last_cache(monkeypatch):
    """Four times the cache, but a 32nd of the memory is enough if that is at least twice."""
    for last, times in (1 << 20, 4), (1 << 50, 2):
        monkeypatch.setattr(machine, "caches", lambda last=last: {"L1": 1 << 15, "L3": last})
        assert bandwidth.levels() == {"L1": 1 << 14, "L3": last // 2, "memory": times * last}


def test_where_threads_pay():
    def row(nbytes, speedup):
        seconds = {"1": {"median": nbytes * 1e-9}}
        return {"call": "philox", "bytes": nbytes, "seconds": seconds, "ratios": {"1 / 2": {"median": speedup}}}

    (found,) = scaling.pay_from([row(100, 0.5), row(10_000, 2.0)], [1, 2])
    assert found["from"] == pytest.approx({"bytes": 1000, "serial seconds": 1e-6})
    (found,) = scaling.pay_from([row(100, 2.0), row(10_000, 0.5)], [1, 2])
    assert found["from"] is None
    assert found["wins"] == [True, False]


def test_the_plan_is_a_roofline():
    kernel = {"call": 1e-6, "core": 1e-9, "arrays": 2, "reads": 0, "copies": 1}
    levels = {"L2": {"bytes": 10**6, "copy": 1e11, "read": 1e11}, "memory": {"bytes": None, "copy": 1e10, "read": 1e10}}
    measured = {"region": 5e-6, "levels": levels, "kernels": {"k": kernel}}

    def seconds(nbytes, cores, rate=math.inf):
        return plan.predict(measured, "k", nbytes, cores, rate)["seconds"]

    assert seconds(4 * 10**8, 1) == pytest.approx(0.1 + 1e-6)  # arithmetic: 1 ns an element
    assert seconds(4 * 10**8, 4) == pytest.approx(0.025 + 11e-6)
    assert seconds(4 * 10**8, 64, rate=1e11) == pytest.approx(0.008 + 31e-6)  # 8e8 bytes by 1e11
    assert seconds(4000, 64) == seconds(4000, 1)  # too little for threads


def test_gears_change_no_bit(threads):
    threads(2)
    x = np.random.default_rng(0).standard_normal((3000, 64), np.float32)
    results = []
    for parallel_from, cache_bytes in ((-1, 0), (0, 1), (1e18, sys.maxsize)):
        _core.set_gears(parallel_from, cache_bytes)
        results.append([pyreg.dropout(x, 0.1, key=1), *pyreg.batch_norm(x)])
    _core.set_gears()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


# ---- asv -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [history.Dropout, history.Mask, history.BatchNorm])
def test_classes_of_asv(cls):
    assert (ROOT / json.loads((ROOT / "asv.conf.json").read_text())["benchmark_dir"] / "ops.py").exists()
    assert len(cls.params) == len(cls.param_names)
    timed = [name for name in dir(cls) if name.startswith("time_")]
    assert timed
    for params in itertools.product(*cls.params):
        if params[0] == 16_000_000:
            continue
        instance = cls()
        instance.setup(*params)
        for name in timed:
            getattr(instance, name)(*params)
