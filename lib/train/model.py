"""The model family: small convolutional nets for images of any size, from uint8 pixels to logits.

Shapes in names: N images, H height, W width, C colour channels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lib.data.manifest import Manifest

_SMALLEST_SIDE = 3
"""Feature maps are halved while their shorter side stays at least this long."""
_MOVES = ((0, 0), (1, -1), (-1, 1), (-1, -1), (1, 1))
"""Of the views of an image, in pixels down and to the right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """All that is needed to build the net again. Kept in every checkpoint."""

    height: int
    width: int
    channels: int
    num_classes: int
    stage_width: int
    """Channels of the first stage; each further stage has twice as many, up to `growth` times."""
    depth: int
    """Convolutions per stage."""
    growth: int = 4
    """Channels of the widest stage, as a multiple of the first one's."""
    num_views: int = 1
    """Copies of an image, moved by a pixel each, whose probabilities are averaged for an answer.

    The first stage sees every other pixel, so what a net answers depends on where an image lies.
    """
    pixel_mean: tuple[float, ...]
    """Per channel, pixels scaled to 0–1."""
    pixel_std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the ranges; tuples may come as lists from a checkpoint."""
        object.__setattr__(self, "pixel_mean", tuple(self.pixel_mean))
        object.__setattr__(self, "pixel_std", tuple(self.pixel_std))
        for name in ("height", "width", "channels", "stage_width", "depth", "growth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.num_views <= len(_MOVES):
            raise ValueError(f"num_views={self.num_views} must lie between 1 and {len(_MOVES)}")
        if self.num_classes < 2:
            raise ValueError(f"num_classes={self.num_classes} must be at least 2")
        for name in ("pixel_mean", "pixel_std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(f"{name} has {len(getattr(self, name))} values, not one a channel")

    @classmethod
    def from_manifest(
        cls,
        manifest: Manifest,
        *,
        stage_width: int,
        depth: int,
        growth: int = 4,
        num_views: int = 1,
    ) -> ModelConfig:
        """Take shape, classes and pixel statistics from a data set."""
        return cls(
            height=manifest.height,
            width=manifest.width,
            channels=manifest.channels,
            num_classes=manifest.num_classes,
            stage_width=stage_width,
            depth=depth,
            growth=growth,
            num_views=num_views,
            pixel_mean=manifest.pixel_mean,
            pixel_std=manifest.pixel_std,
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ModelConfig:
        """Rebuild a config from a checkpoint's `model_config`."""
        return cls(**content)

    @property
    def num_halvings(self) -> int:
        """How often the feature maps are halved on the way to the head: 3 for 28×28."""
        side, halvings = min(self.height, self.width), 0
        while side // 2 >= _SMALLEST_SIDE:
            side, halvings = side // 2, halvings + 1
        return halvings


class ConvNet(nn.Module):
    """Stages of convolutions, normalised and rectified, then one linear layer on the last map.

    The first stage quarters the map (a stride and a pooling), each further one halves it, the
    last keeps it. Convolutions at full resolution would cost more on a CPU than the rest of the
    net; pooling before the normalisation leaves a quarter of the pixels to normalise.
    """

    pixel_shift: Tensor
    pixel_scale: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        mean = torch.tensor(config.pixel_mean, dtype=torch.float32).view(1, -1, 1, 1)
        # A channel that never changes must not divide by zero.
        std = torch.tensor(config.pixel_std, dtype=torch.float32).clamp(min=1e-3).view(1, -1, 1, 1)
        self.register_buffer("pixel_shift", -mean / std)
        self.register_buffer("pixel_scale", 1.0 / (255.0 * std))
        layers: list[nn.Module] = []
        height, width = config.height, config.width
        width_in, halvings = config.channels, config.num_halvings
        for stage in range(max(2, halvings)):
            width_out = config.stage_width * min(2**stage, config.growth)
            stride = 2 if stage == 0 and halvings >= 1 else 1
            pool = halvings >= stage + 2
            kernel = 5 if stage == 0 else 3
            for position in range(config.depth):
                last = position == config.depth - 1
                layers += _conv(width_in, width_out, kernel, stride=stride, pool=pool and last)
                width_in, stride, kernel = width_out, 1, 3
            if stage == 0 and halvings >= 1:
                height, width = (height + 1) // 2, (width + 1) // 2
            if pool:
                height, width = height // 2, width // 2
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width_in * height * width, config.num_classes)
        # Channels last is what the uint8 input is already, and the fastest layout on CPUs.
        self.to(memory_format=torch.channels_last)

    def normalise(self, images_NHWC: Tensor) -> Tensor:
        """Return float NCHW images (channels last in memory) with mean 0 and deviation 1."""
        return images_NHWC.permute(0, 3, 1, 2).float() * self.pixel_scale + self.pixel_shift

    def classify(self, images_NCHW: Tensor) -> Tensor:
        """Return the logits of normalised images: what follows augmentation."""
        return self.head(self.features(images_NCHW).flatten(1))

    def forward(self, images_NHWC: Tensor) -> Tensor:
        """Return the logits, float32 [N, K], of uint8 images [N, H, W, C]."""
        images_NCHW = self.normalise(images_NHWC)
        num_views = self.config.num_views
        if num_views == 1:
            return self.classify(images_NCHW).float()
        logits_MK = self.classify(self._views(images_NCHW)).float()
        logs_VNK = logits_MK.log_softmax(dim=1).unflatten(0, (num_views, -1))
        return logs_VNK.logsumexp(dim=0)

    def _views(self, images_NCHW: Tensor) -> Tensor:
        """Return all images by the first move, then all by the next; edges are repeated."""
        height, width = images_NCHW.shape[-2:]
        padded_NCHW = functional.pad(images_NCHW, (1, 1, 1, 1), mode="replicate")
        moves = _MOVES[: self.config.num_views]
        return torch.cat(
            [padded_NCHW[..., 1 - y : 1 - y + height, 1 - x : 1 - x + width] for y, x in moves]
        )

    def num_parameters(self) -> int:
        """Return how many weights are trained."""
        return sum(parameter.numel() for parameter in self.parameters())


class Served(nn.Module):
    """What is exported and served: uint8 images in, probabilities out."""

    def __init__(self, net: ConvNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images_NHWC: Tensor) -> Tensor:
        """Return the probabilities, float32 [N, K], of uint8 images [N, H, W, C]."""
        return torch.softmax(self.net(images_NHWC), dim=1)


def _conv(
    width_in: int, width_out: int, kernel: int, *, stride: int, pool: bool
) -> list[nn.Module]:
    layers: list[nn.Module] = [
        nn.Conv2d(width_in, width_out, kernel, stride, padding=kernel // 2, bias=False)
    ]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return [*layers, nn.BatchNorm2d(width_out), nn.ReLU(inplace=True)]
