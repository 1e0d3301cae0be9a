"""Draw the pictures of the manual, docs/pictures/*.svg, from the figures of `./run bench report`.

    python -m bench pictures [--folder docs/pictures]

steps.svg has the time of a training step of a transformer in each framework, from the machine that was measured last
with all of them.  layers.svg shows what the layers drop.
"""

import json
from pathlib import Path

import numpy as np

import pyreg
from bench import machine, output

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "performance"
BARS = {  # label and colour of each variant
    "stock": ("the framework's dropout", "#c44e52"),
    "pyreg": ("pyreg, the same mask", "#4c72b0"),
    "philox": ("pyreg, its own mask", "#8fb0e0"),
}


def steps(results):
    """Time of a step over that without dropout, by framework and variant: transformers of one size."""

    def of(command, chosen, **names):
        [record] = [r for r in results[command]["records"] if all(r[key] == value for key, value in chosen.items())]
        return {bar: record["ratios"][f"{name} / off"]["median"] for bar, name in names.items()}

    size = {"model": "transformer-256"}
    same = {"stock": "stock", "pyreg": "pyreg", "philox": "philox"}
    others = {"linen": "Flax linen", "equinox": "Equinox", "haiku": "Haiku", "keras": "Keras"}
    return {
        "Flax nnx": of("train_step", size, stock="Flax", pyreg="pyreg", philox="pyreg, philox"),
        **{label: of("train_step_others", size | {"framework": name}, **same) for name, label in others.items()},
        "PyTorch": of("train_step_torch", {"model": "MultiheadAttention"}, stock="torch", philox="accelerate"),
    }


def draw_steps(path):
    commands = "train_step", "train_step_others", "train_step_torch"
    files = [[folder / f"{name}.json" for name in commands] for folder in FIGURES.iterdir()]
    complete = [[json.loads(file.read_text()) for file in three] for three in files if all(f.exists() for f in three)]
    results = dict(zip(commands, max(complete, key=lambda three: three[0]["machine"]["date"]), strict=True))
    rows = steps(results)
    title = f"{machine.title(results['train_step']['machine'])}: a transformer of 4 layers, width 256, dropout 0.1"
    fig, [[ax]] = output.figure(1, 1, title, size=(8, 4))
    height = 0.8 / len(BARS)
    for k, (bar, (label, colour)) in enumerate(BARS.items()):
        at = [(i + k * height, row[bar]) for i, row in enumerate(rows.values()) if bar in row]
        ax.barh(*zip(*at, strict=True), height, label=label, color=colour)
    ax.axvline(1, color="black", linewidth=1)
    ax.set_yticks(np.arange(len(rows)) + 0.4 - height / 2, rows)
    ax.invert_yaxis()
    ax.set(xlabel="time of a training step over that without dropout: shorter is better")
    output.save(fig, path)


def draw_layers(path):
    shape = 3, 5, 8
    layers = {
        "Dropout: elements": pyreg.Dropout(0.4, rng=0),
        "Dropout1d: channels of (N, channels, length)\nWordDropout: words of (N, words, features)": pyreg.Dropout1d(
            0.4, rng=2
        ),
        "DropPath: samples": pyreg.DropPath(0.4, rng=1),
    }
    title = f"an array of shape {shape}, rate 0.4: what is dropped is light"
    fig, axes = output.figure(1, len(layers), title, size=(3.4, 3.6))
    for ax, (name, layer) in zip(axes[0], layers.items(), strict=True):
        kept = np.pad(layer(np.ones(shape)) != 0, ((0, 0), (0, 1), (0, 0))).reshape(-1, shape[-1])[:-1]
        between = np.arange(len(kept)) % (shape[1] + 1) == shape[1]
        colours = np.ma.masked_array(kept, np.broadcast_to(between[:, None], kept.shape))
        ax.pcolormesh(colours, cmap="Blues", vmin=-0.2, vmax=1.3, edgecolors="white", linewidth=1)
        ax.set_title(name, fontsize=9)
        middles = [shape[1] / 2 + (shape[1] + 1) * i for i in range(shape[0])]
        ax.set_yticks(middles, [f"sample {i}" for i in range(shape[0])])
        ax.set_xticks([])
        ax.invert_yaxis()
        ax.set_frame_on(False)
    output.save(fig, path, legend=False)


PICTURES = {"steps": draw_steps, "layers": draw_layers}


def add_arguments(parser):
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "pictures", help="where they go")


def run(args):
    for name, draw in PICTURES.items():
        draw(args.folder / f"{name}.svg")
