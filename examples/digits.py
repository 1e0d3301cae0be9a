"""A network of two hidden layers learns handwritten digits from partly wrong labels: plain, with dropout, with
batch-norm, and with both.

    python examples/digits.py [--seeds 2] [--epochs 20] [--rate 0.5] [--plot digits.png]

The data are scikit-learn's 1,797 images of 8 x 8 pixels.  There are 1,000 for training, and 40 % of their labels are
replaced by random ones; the rest, labelled correctly, are for testing.  A network that is trained long enough learns
the wrong labels by heart.  Dropout makes that hard.  With batch-norm the network learns faster: the digits in the first
epochs, and then the wrong labels.  Both together learn faster than dropout alone, and as well.

Then the same training is timed with dropout as it is usually written in NumPy, and with pyreg's.
"""

import argparse
import os
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

# NumPy reads these when it is loaded.  One BLAS thread is the fastest for matrices this small.  A core type would force
# the code of another CPU.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ.pop("OPENBLAS_CORETYPE", None)

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import pyreg

TRAIN_IMAGES, WRONG_LABELS = 1_000, 0.4
WIDTH, BATCH, LEARNING_RATE = 256, 50, 1e-3

console = Console(highlight=False)


# ---- The network -----------------------------------------------------------------------------------------------------
# A layer is called forwards, and backward(dy) turns the gradient of its output into that of its input.  If it has
# parameters, backward also sets grads, by their names.


class Linear:
    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator):
        self.weight = rng.standard_normal((inputs, outputs), np.float32) * np.float32(np.sqrt(2 / inputs))
        self.bias = np.zeros(outputs, np.float32)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.x = x
        return x @ self.weight + self.bias

    def backward(self, dy: np.ndarray) -> np.ndarray:
        self.grads = {"weight": self.x.T @ dy, "bias": dy.sum(axis=0)}
        return dy @ self.weight.T


class ReLU:
    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.y = np.maximum(x, 0)
        return self.y

    def backward(self, dy: np.ndarray) -> np.ndarray:
        return dy * (self.y > 0)


class Network:
    def __init__(self, layers: list):
        self.layers = layers

    def __call__(self, x: np.ndarray) -> np.ndarray:
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy: np.ndarray) -> None:
        for layer in reversed(self.layers):
            dy = layer.backward(dy)

    def train(self, mode: bool = True) -> None:
        for layer in self.layers:
            if hasattr(layer, "train"):  # Linear and ReLU do the same in training and evaluation
                layer.train(mode)


class Adam:
    """Kingma and Ba, "Adam: a method for stochastic optimization", 2015, algorithm 1."""

    def __init__(self, network: Network, learning_rate: float, beta1: float = 0.9, beta2: float = 0.999):
        self.network = network
        self.learning_rate, self.beta1, self.beta2 = learning_rate, beta1, beta2
        self.mean, self.square = defaultdict(float), defaultdict(float)  # of each parameter's gradient; 0 at first
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        for layer in self.network.layers:
            for name, g in getattr(layer, "grads", {}).items():  # Linear and BatchNorm have parameters
                m = self.mean[layer, name] = self.beta1 * self.mean[layer, name] + (1 - self.beta1) * g
                v = self.square[layer, name] = self.beta2 * self.square[layer, name] + (1 - self.beta2) * (g * g)
                m, v = m / (1 - self.beta1**self.steps), v / (1 - self.beta2**self.steps)
                parameter = getattr(layer, name)
                parameter -= self.learning_rate * m / (np.sqrt(v) + 1e-8)


def cross_entropy_gradient(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Gradient of the mean of -log softmax(logits)[label]."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(labels)), labels] -= 1
    return p / np.float32(len(labels))


def make_network(rate: float, batch_norm: bool, seed: int, dropout: type = pyreg.Dropout) -> Network:
    """64 pixels, two hidden layers, 10 classes.  The seed alone decides the first weights."""
    rng = np.random.default_rng(seed)
    layers: list = []
    for i, inputs in enumerate((64, WIDTH)):
        layers.append(Linear(inputs, WIDTH, rng))
        if batch_norm:
            layers.append(pyreg.BatchNorm(WIDTH, momentum=0.9))
        layers.append(ReLU())
        if rate:
            layers.append(dropout(rate, rng=np.random.default_rng([seed, i])))
    return Network([*layers, Linear(WIDTH, 10, rng)])


# ---- Training --------------------------------------------------------------------------------------------------------


def load_data(seed: int):
    """Training images and labels, some wrong, and test images and labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    x, x_test, y, y_test = train_test_split(images, labels, train_size=TRAIN_IMAGES, stratify=labels, random_state=seed)
    rng = np.random.default_rng(seed)
    wrong = rng.choice(len(y), round(WRONG_LABELS * len(y)), replace=False)
    y[wrong] = (y[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return x, y, x_test, y_test


def accuracy(network: Network, x: np.ndarray, y: np.ndarray) -> float:
    network.train(False)
    return float((network(x).argmax(axis=1) == y).mean())


def train_step(network: Network, optimiser: Adam, x: np.ndarray, y: np.ndarray) -> None:
    network.backward(cross_entropy_gradient(network(x), y))
    optimiser.step()


def train(network: Network, seed: int, epochs: int, after_epoch=lambda: None) -> list[tuple[float, float]]:
    """Accuracy on the training labels, wrong ones included, and on the test labels, after each epoch."""
    x, y, x_test, y_test = load_data(seed)
    optimiser = Adam(network, LEARNING_RATE)
    rng = np.random.default_rng(seed)  # the order of the batches
    curve = []
    for _ in range(epochs):
        network.train()
        for batch in rng.permutation(len(x)).reshape(-1, BATCH):
            train_step(network, optimiser, x[batch], y[batch])
        curve.append((accuracy(network, x, y), accuracy(network, x_test, y_test)))
        after_epoch()
    return curve


# ---- What dropout costs ----------------------------------------------------------------------------------------------


class NumpyDropout:
    """The usual way: draw floats, compare, multiply, and keep the mask for the backward pass."""

    def __init__(self, rate: float, rng: np.random.Generator):
        self.keep, self.rng = 1 - rate, rng

    def train(self, mode: bool) -> None:
        self.training = mode

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if not self.training:
            return x
        self.mask = self.rng.random(x.shape, dtype=np.float32) < self.keep
        return x * self.mask * np.float32(1 / self.keep)

    def backward(self, dy: np.ndarray) -> np.ndarray:
        return dy * self.mask * np.float32(1 / self.keep)


def time_in_turns(calls: dict, rounds: int, after_round=lambda: None) -> dict[str, np.ndarray]:
    """Seconds of each call in each round.  They take turns: other work on the machine hits all of them alike."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
        after_round()
    return {name: np.array(s[1:]) for name, s in seconds.items()}  # the first round warms up


def time_training(rate: float, rounds: int = 50) -> None:
    """Time of a training step of the network above, before pyreg and after, and the memory of its masks."""
    x, y, _, _ = load_data(0)

    def step(rate, dropout=None):
        network = make_network(rate, False, 0, dropout)
        optimiser = Adam(network, LEARNING_RATE)
        network.train()
        return lambda: train_step(network, optimiser, x, y)

    rate = rate or 0.5
    calls = {
        "no dropout": step(0),
        "before: NumPy": step(rate, NumpyDropout),
        "after: pyreg": step(rate, pyreg.Dropout),
    }
    with Progress(console=console) as progress:
        task = progress.add_task("timing the training loop", total=rounds + 1)
        seconds = time_in_turns(calls, rounds, lambda: progress.advance(task))
    table = Table(title=f"A training step, with dropout of two arrays of {len(x):,} x {WIDTH}")
    for header in ("", "time", "of that dropout", "masks kept for backward"):
        table.add_column(header, justify="right" if header else "left")
    for (name, s), mask_bytes in zip(seconds.items(), (0, 2 * len(x) * WIDTH, 0), strict=True):
        dropout = np.median(s - seconds["no dropout"])
        table.add_row(name, f"{np.median(s) * 1e3:.1f} ms", f"{dropout * 1e3:.2f} ms", f"{mask_bytes:,} bytes")
    console.print(table)
    console.print("The backward pass of pyreg.Dropout stores no mask: it makes it again from the key.\n")


def print_headline(size: int = 4_000_000, rate: float = 0.1) -> None:
    x = np.random.default_rng(0).standard_normal(size, np.float32)
    numpy_dropout = NumpyDropout(rate, np.random.default_rng(0))
    numpy_dropout.train(True)
    calls = {
        "copy": x.copy,
        "pyreg philox": lambda: pyreg.dropout(x, rate, key=1),
        "pyreg threefry (Flax's mask)": lambda: pyreg.dropout(x, rate, key=1, impl="threefry"),
        "NumPy idiom": lambda: numpy_dropout(x),
    }
    if find_spec("flax"):
        import jax
        from flax import nnx

        flax_dropout = jax.jit(lambda key, x: nnx.Dropout(rate, deterministic=False)(x, rngs=key))
        key, x_jax = jax.random.key(1), jax.numpy.asarray(x)
        calls["Flax, jit"] = lambda: flax_dropout(key, x_jax).block_until_ready()
    with console.status(f"timing dropout of {size // 10**6} million floats"):
        seconds = time_in_turns(calls, 20)
    times = ", ".join(f"{name} [bold]{np.median(s) * 1e3:.1f} ms[/]" for name, s in seconds.items())
    console.print(f"Dropout of {size // 10**6} million floats, {pyreg.get_num_threads()} threads: {times}.")


# ---- The comparison --------------------------------------------------------------------------------------------------


def plot(curves: dict[str, np.ndarray], path: Path) -> None:
    """Means over the seeds, and their range as a band.  curves: name -> (seeds, epochs, [training, test])."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10, 4))
    for k, title in enumerate((f"training labels, {WRONG_LABELS:.0%} of them wrong", "test labels")):
        for name, curve in curves.items():
            epochs = np.arange(1, curve.shape[1] + 1)
            axes[k].plot(epochs, curve[..., k].mean(axis=0), label=name)
            axes[k].fill_between(epochs, curve[..., k].min(axis=0), curve[..., k].max(axis=0), alpha=0.2)
        axes[k].set(title=title, xlabel="epoch", ylabel="accuracy")
        axes[k].grid(visible=True, alpha=0.3)
        axes[k].legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text}; wanted a whole number, at least 1")
    return int(text)


def probability(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1
    if not 0 <= rate < 1:
        raise argparse.ArgumentTypeError(f"is {text}; wanted a probability of dropping, at least 0 and below 1")
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=at_least_1, default=2)
    parser.add_argument("--epochs", type=at_least_1, default=20)
    parser.add_argument("--rate", type=probability, default=0.5, help="probability of dropping")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the learning curves; wants Matplotlib")
    args = parser.parse_args()
    if args.plot and not find_spec("matplotlib"):
        parser.error("--plot wants Matplotlib: pip install matplotlib")
    if args.plot and not args.plot.parent.is_dir():
        parser.error(f"--plot is {args.plot}; there is no folder {args.plot.parent}")

    networks = {  # name: rate, batch_norm
        "plain": (0.0, False),
        f"dropout {args.rate}": (args.rate, False),
        "batch-norm": (0.0, True),
        "batch-norm and dropout": (args.rate, True),
    }
    curves = {}  # name: (seeds, epochs, [training, test])
    with Progress(console=console) as progress:
        for name, (rate, batch_norm) in networks.items():
            task = progress.add_task(f"training: {name}", total=args.seeds * args.epochs)
            curves[name] = np.array(
                [
                    train(make_network(rate, batch_norm, seed), seed, args.epochs, lambda: progress.advance(task))  # noqa: B023
                    for seed in range(args.seeds)
                ]
            )

    table = Table(title=f"Test accuracy, mean of {args.seeds} seeds")
    for header in ("", "epoch 1", "best epoch", f"epoch {args.epochs}", "std", "lowest", "highest"):
        table.add_column(header, justify="right" if header else "left")
    for name, curve in curves.items():
        mean, last = curve[..., 1].mean(axis=0), curve[:, -1, 1]
        figures = (mean[0], mean.max(), mean[-1], last.std(), last.min(), last.max())
        table.add_row(name, *(f"{a:.1%}" for a in figures))
    console.print(table)
    console.print(f"{TRAIN_IMAGES:,} training images, {WRONG_LABELS:.0%} of their labels wrong; test labels are right.")
    console.print("All networks start from the same weights and see the same batches.\n")
    if args.plot:
        plot(curves, args.plot)
        console.print(f"Learning curves: {args.plot}\n")

    time_training(args.rate)
    print_headline()


if __name__ == "__main__":
    main()
