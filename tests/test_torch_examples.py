"""The program of examples/ that uses PyTorch, on small sizes."""

import argparse
import json

import pytest
from common import example
from torchcommon import torch as torch

import pyreg.torch


def test_a_transformer_learns_as_well_with_pyreg():
    pytest.importorskip("sklearn")
    guide = example("torch_transformer")
    args = argparse.Namespace(steps=60, batch=64, width=64, depth=1, p=0.1)
    x, digits = guide.load()
    model, losses = guide.train(x, digits, args, "torch")
    with pyreg.torch.accelerate():
        ours, our_losses = guide.train(x, digits, args, "pyreg")
        saved = guide.saved_bytes(ours, x[:64])
    assert losses[0] != our_losses[0]  # another mask
    assert abs(sum(losses[-10:]) - sum(our_losses[-10:])) / 10 < 0.35
    assert sum(our_losses[-10:]) / 10 < 1.9 < our_losses[0]
    assert saved < 0.9 * guide.saved_bytes(model, x[:64])


def test_the_benchmark_of_a_training_step(tmp_path, capsys):
    from bench import __main__ as program
    from bench import train_step_torch

    threads = torch.get_num_threads()
    small = ["--models", "small", "small CNN", "--threads", "1", "--rounds", "2", "--markdown"]
    program.main(["train_step", "--framework", "torch", *small, "--json", str(tmp_path / "step.json")])
    torch.set_num_threads(threads)
    records = json.loads((tmp_path / "step.json").read_text())["records"]
    assert [r["model"] for r in records] == ["small", "small CNN"]
    for record in records:
        saved = {name: variant["saved bytes"] for name, variant in record["variants"].items()}
        assert saved["off"] <= saved["accelerate"] < saved["torch"]
        assert set(record["ratios"]) == {f"{a} / {b}" for a, b in train_step_torch.PAIRS}
    assert "| small |" in capsys.readouterr().out
