"""Models in PyTorch for train_step_torch.py, written as for torch alone, and one training step of each."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A layer of a transformer, with dropout on the attention weights, on the hidden layer and on both branches."""

    def __init__(self, width: int, p: float):
        super().__init__()
        self.heads, self.p = width // 64, p
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropouts = nn.ModuleList(nn.Dropout(p) for _ in range(3))

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0)
        return self.output(y.transpose(1, 2).reshape(n, length, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropouts[0](self.attention(self.norms[0](x)))
        return x + self.dropouts[2](self.down(self.dropouts[1](F.gelu(self.up(self.norms[1](x))))))


class BlockMHA(Block):
    """The same, with torch's attention layer, which also returns its weights."""

    def __init__(self, width: int, p: float):
        super().__init__(width, p)
        self.layer = nn.MultiheadAttention(width, self.heads, dropout=p, batch_first=True)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x, x)[0]


class ResidualBlock(nn.Module):
    """Two convolutions, each with batch-norm (He et al., 2016), and dropout between them (Zagoruyko, 2016)."""

    def __init__(self, channels: int, p: float):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.dropout = nn.Dropout(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dropout(F.relu(self.norms[0](self.convolutions[0](x))))
        return F.relu(x + self.norms[1](self.convolutions[1](y)))


class LSTM(nn.Module):
    def __init__(self, width: int, depth: int, p: float):
        super().__init__()
        self.lstm = nn.LSTM(width, width, depth, dropout=p, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


class BERT(nn.Module):
    """BERT of the package transformers, with random weights."""

    def __init__(self, width: int, depth: int, p: float):
        super().__init__()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(
            BertConfig(
                vocab_size=64,
                hidden_size=width,
                num_hidden_layers=depth,
                num_attention_heads=width // 64,
                intermediate_size=4 * width,
                hidden_dropout_prob=p,
                attention_probs_dropout_prob=p,
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bert(inputs_embeds=x).last_hidden_state


def transformer(width: int, depth: int, p: float) -> nn.Module:
    return nn.Sequential(*(Block(width, p) for _ in range(depth)))


def transformer_mha(width: int, depth: int, p: float) -> nn.Module:
    return nn.Sequential(*(BlockMHA(width, p) for _ in range(depth)))


def encoder(width: int, depth: int, p: float) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, p, batch_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def mlp(width: int, depth: int, p: float) -> nn.Module:
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU(), nn.Dropout(p))))


def cnn(channels: int, depth: int, p: float) -> nn.Module:
    blocks = (ResidualBlock(channels, p) for _ in range(depth))
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Model(NamedTuple):
    build_layers: Callable[[int, int, float], nn.Module]
    width: int
    depth: int
    p: float
    shape: tuple[int, ...]  # of the input
    channels_last: bool = False

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build_layers(self.width, self.depth, self.p)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def input(self) -> torch.Tensor:
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(1))
        return x.to(memory_format=torch.channels_last) if self.channels_last else x


TEXT, IMAGES = (16, 128, 256), (16, 3, 32, 32)
MODELS = {
    "SDPA": Model(transformer, 256, 4, 0.1, TEXT),
    "MultiheadAttention": Model(transformer_mha, 256, 4, 0.1, TEXT),
    "TransformerEncoder": Model(encoder, 256, 4, 0.1, TEXT),
    "BERT": Model(BERT, 256, 4, 0.1, TEXT),
    "MLP": Model(mlp, 1024, 3, 0.5, (512, 1024)),
    "LSTM": Model(LSTM, 256, 3, 0.3, (16, 64, 256)),
    "CNN": Model(cnn, 64, 3, 0.1, IMAGES),
    "CNN, channels last": Model(cnn, 64, 3, 0.1, IMAGES, channels_last=True),
    "small": Model(transformer, 64, 1, 0.1, (8, 32, 64)),
    "small CNN": Model(cnn, 8, 1, 0.1, (4, 3, 8, 8)),
}
QUICK = ("small", "small CNN")
FULL = tuple(name for name in MODELS if name not in QUICK)


def training_step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step
