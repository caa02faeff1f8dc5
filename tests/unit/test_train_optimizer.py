from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from torch import nn

from lib.train.optimizer import NesterovSGD

DECAY = 1e-2


def made_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def groups(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    parameters = list(net.parameters())
    return [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_steps_are_those_of_torch_also_after_a_reload(momentum: float) -> None:
    ours, theirs = made_net(), made_net()
    decayed, others = groups(theirs)
    reference = torch.optim.SGD(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
        momentum=momentum,
        nesterov=momentum > 0,
        fused=True,
    )

    def made() -> NesterovSGD:
        decayed, others = groups(ours)
        return NesterovSGD([(decayed, DECAY), (others, 0.0)], momentum=momentum)

    optimizer = made()
    for step in range(8):
        if step == 4:
            kept = io.BytesIO()
            torch.save(optimizer.state_dict(), kept)
            optimizer = made()
            optimizer.load_state_dict(torch.load(io.BytesIO(kept.getvalue()), weights_only=True))
        given, rate = torch.randn(7, 6), 0.05 / (step + 1)
        for group in reference.param_groups:
            group["lr"] = rate
        for net in (ours, theirs):
            net(given).square().mean().backward()
        optimizer.step(rate)
        reference.step()
        reference.zero_grad()
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.isfinite(mine).all()
            assert torch.equal(mine, its)
            assert mine.grad is None


def test_training_does_not_import_the_compiler() -> None:
    # It takes more than a second, of every process that a sweep starts.
    code = """
import sys, torch
from lib.train.loop import Examples, TrainConfig, Trainer
from lib.train.model import ModelConfig
config = ModelConfig(height=8, width=8, channels=1, num_classes=2, stage_width=2, depth=1,
                     pixel_mean=(0.5,), pixel_std=(0.2,))
data = Examples(images_NHWC=torch.randint(0, 255, (64, 8, 8, 1), dtype=torch.uint8),
                labels_N=torch.arange(64) % 2)
Trainer(config, TrainConfig(rungs=(1,), batch_size=16), train=data, val=data).run_epoch()
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
