"""A transformer in PyTorch that reads handwritten digits, before and after pyreg.torch.accelerate().

The 8 x 8 images of scikit-learn are sentences of 16 words: squares of 2 x 2 pixels.  The model is torch's own
nn.TransformerEncoder.  It is trained twice from the same seed, by the same function; around the second training is one
line more.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

import pyreg.torch


class Reader(nn.Module):
    def __init__(self, width: int, depth: int, p: float):
        super().__init__()
        self.words = nn.Linear(4, width)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, p, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.output = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.encoder(self.words(x) + self.positions).mean(1))


def load() -> tuple[torch.Tensor, torch.Tensor]:
    images, digits = load_digits(return_X_y=True)
    squares = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4) / 8 - 1
    order = np.random.default_rng(0).permutation(len(digits))
    return torch.from_numpy(squares[order].astype(np.float32)), torch.from_numpy(digits[order])


def train(x: torch.Tensor, digits: torch.Tensor, args: argparse.Namespace, name: str) -> tuple[nn.Module, list[float]]:
    """The trained model, and the loss of each step."""
    torch.manual_seed(0)
    model = Reader(args.width, args.depth, args.p)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in track(range(args.steps), name):
        batch = slice(step * args.batch % (len(x) - args.batch), None)
        loss = F.cross_entropy(model(x[batch][: args.batch]), digits[batch][: args.batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Memory that autograd keeps between the forward and the backward pass."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


def run(name: str, args: argparse.Namespace, data: tuple[torch.Tensor, torch.Tensor]) -> list[str]:
    """Trains, and returns a row of the table."""
    x, digits = data
    tested = len(x) // 5
    start = time.perf_counter()
    model, losses = train(x[tested:], digits[tested:], args, name)
    seconds = time.perf_counter() - start
    memory = saved_bytes(model, x[: args.batch])
    with torch.inference_mode():
        right = (model.eval()(x[:tested]).argmax(1) == digits[:tested]).float().mean()
    loss = np.mean(losses[-max(1, len(losses) // 10) :])
    return [name, f"{seconds:.1f} s", f"{memory / 2**20:.0f} MiB", f"{loss:.3f}", f"{100 * right:.1f} %"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="of training (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images in a step (%(default)s)")
    parser.add_argument("--width", type=int, default=128, help="of the transformer (%(default)s)")
    parser.add_argument("--depth", type=int, default=3, help="layers (%(default)s)")
    parser.add_argument("--p", type=float, default=0.1, help="of dropout (%(default)s)")
    args = parser.parse_args()

    data = load()
    rows = [run("torch", args, data)]
    with pyreg.torch.accelerate():
        rows.append(run("pyreg.torch.accelerate()", args, data))

    table = Table("dropout by", "training", "saved for backward", "loss at the end", "test accuracy")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
