from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lib.errors import SearchError
from lib.train.augment import Augmentation
from lib.train.loop import Examples, TrainConfig, Trainer
from lib.train.model import ConvNet, ModelConfig

MODEL = ModelConfig(
    height=12,
    width=10,
    channels=1,
    num_classes=2,
    stage_width=8,
    depth=1,
    pixel_mean=(0.2,),
    pixel_std=(0.3,),
)


def bars(num_images: int, seed: int) -> Examples:
    """Bright bars on noise: class 0 lies, class 1 stands."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (num_images, 12, 10, 1), generator=generator)
    labels = torch.randint(0, 2, (num_images,), generator=generator)
    places = torch.randint(3, 7, (num_images,), generator=generator)
    for image, label, place in zip(images, labels.tolist(), places.tolist(), strict=True):
        if label:
            image[:, place] += 180
        else:
            image[place] += 180
    return Examples(images_NHWC=images.byte(), labels_N=labels)


def trainer(**changes: Any) -> Trainer:
    config = TrainConfig(**{"rungs": (1, 3), "batch_size": 32, **changes})
    return Trainer(MODEL, config, train=bars(640, 1), val=bars(200, 2))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def bits(net: ConvNet) -> bytes:
    return b"".join(value.numpy().tobytes() for value in net.state_dict().values())


def test_it_learns_and_reports_every_epoch() -> None:
    training = trainer()
    metrics = [training.run_epoch() for _ in range(3)]
    assert [epoch["epoch"] for epoch in metrics] == [1, 2, 3]
    assert metrics[-1]["val_accuracy"] > 0.98
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    assert all(epoch["images_per_s"] > 0 for epoch in metrics)


def test_a_stream_of_the_same_batches_trains_the_same_net() -> None:
    given = bars(330, 1)

    class Stream:
        """In the order of the first epoch of a set that is held in memory."""

        num_images = given.num_images

        def batches(self, size: int, epoch: int = 0) -> Iterator[Examples]:
            order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(epoch))
            for index in order.split(size):
                yield Examples(images_NHWC=given.images_NHWC[index], labels_N=given.labels_N[index])

    config = TrainConfig(
        rungs=(1,), batch_size=32, augmentation=Augmentation(strength=0.0), label_smoothing=0.0
    )
    streamed = Trainer(MODEL, config, train=Stream(), val=bars(200, 2))
    held = Trainer(MODEL, config, train=given, val=bars(200, 2))
    metrics = [trainer.run_epoch() for trainer in (streamed, held)]
    assert bits(streamed.net) == bits(held.net)
    assert metrics[0]["train_loss"] == metrics[1]["train_loss"]
    assert streamed.evaluate(bars(700, 3)) == held.evaluate(bars(700, 3))


def test_the_same_seed_gives_the_same_bits() -> None:
    first, second, other = trainer(seed=7), trainer(seed=7), trainer(seed=8)
    torch.manual_seed(99)  # What others do with torch's global generator must not matter.
    for training in (first, second, other):
        for _ in range(2):
            training.run_epoch()
    assert bits(first.net) == bits(second.net)
    assert bits(first.net) != bits(other.net)


def test_building_a_trainer_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trainer(seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_training_that_was_interrupted_ends_with_the_same_bits() -> None:
    whole = trainer()
    for _ in range(3):
        whole.run_epoch()
    interrupted = trainer()
    interrupted.run_epoch()
    stream = io.BytesIO()
    torch.save(interrupted.state_dict(), stream)
    stream.seek(0)
    resumed = trainer()
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    for _ in range(2):
        resumed.run_epoch()
    assert resumed.epoch == 3
    assert bits(resumed.net) == bits(whole.net)


def test_a_checkpoint_rebuilds_the_net_without_pickled_code() -> None:
    training = trainer()
    accuracy = training.run_epoch()["val_accuracy"]
    stream = io.BytesIO()
    torch.save(training.checkpoint(), stream)
    stream.seek(0)
    content = torch.load(stream, weights_only=True)
    net = ConvNet(ModelConfig.from_dict(content["model_config"]))
    net.load_state_dict(content["model"])
    assert bits(net) == bits(training.net)
    assert content["epoch"] == 1
    assert TrainConfig.from_dict(content["train_config"]) == training.train_config
    val = bars(200, 2)
    labels = net.eval()(val.images_NHWC).argmax(dim=1)
    assert float((labels == val.labels_N).float().mean()) == pytest.approx(accuracy)


def test_the_learning_rate_comes_to_rest_at_every_rung() -> None:
    config = TrainConfig(rungs=(2, 6), learning_rate=0.1, restart=0.5, warmup=0.25)
    assert config.learning_rate_at(0.5) == pytest.approx(0.1)
    assert config.learning_rate_at(1.999) < 0.001
    assert config.learning_rate_at(2 + 1) == pytest.approx(0.05)
    assert config.learning_rate_at(5.999) < 0.001
    assert config.learning_rate_at(6) == 0.0
    rates = [config.learning_rate_at(step / 100) for step in range(600)]
    assert all(0 < rate < 0.1001 for rate in rates)


def test_a_trial_that_diverges_says_so() -> None:
    training = trainer(learning_rate=1e30)
    with pytest.raises(SearchError, match="learning rate 1e\\+30"):
        training.run_epoch()


def test_without_validation_images_it_trains_the_same_and_measures_training_alone() -> None:
    with_val = trainer()
    without = Trainer(MODEL, with_val.train_config, train=bars(640, 1))
    with_val.run_epoch()
    metrics = without.run_epoch()
    assert bits(without.net) == bits(with_val.net)
    assert metrics["train_loss"] > 0
    assert not any(name.startswith("val_") for name in metrics)


def test_fewer_images_than_a_batch_are_trained_on() -> None:
    few = bars(5, 1)
    training = Trainer(MODEL, TrainConfig(rungs=(1,)), train=few, val=few)
    assert training.run_epoch()["train_loss"] > 0


def test_few_images_are_gone_over_again_until_an_epoch_has_enough_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few, test = bars(40, 1), bars(400, 2)
    config = TrainConfig(rungs=(1, 2), batch_size=32, min_epoch_steps=30)
    training = Trainer(MODEL, config, train=few)
    rates: list[float] = []
    step = training._optimizer.step

    def noted(rate: float) -> None:
        rates.append(rate)
        step(rate)

    monkeypatch.setattr(training._optimizer, "step", noted)
    training.run_epoch()
    training.run_epoch()
    assert rates == pytest.approx([config.learning_rate_at(number / 30) for number in range(60)])
    assert training.evaluate(test).accuracy > 0.95


def test_a_least_number_of_steps_changes_nothing_for_an_epoch_that_has_them() -> None:
    plain, floored = trainer(), trainer(min_epoch_steps=20)
    plain.run_epoch()
    floored.run_epoch()
    assert bits(plain.net) == bits(floored.net)


def test_a_stream_is_shuffled_anew_in_every_pass_and_checked_in_the_first() -> None:
    held = bars(70, 1)
    seen: dict[str, list[int]] = {"train": [], "val": []}

    class Streamed:
        num_images = held.num_images

        def __init__(self, name: str) -> None:
            self.name = name

        def batches(self, size: int, epoch: int = 0) -> Iterator[Examples]:
            seen[self.name].append(epoch)
            return held.batches(size)

    config = TrainConfig(rungs=(2,), batch_size=32, min_epoch_steps=5)
    training = Trainer(MODEL, config, train=Streamed("train"), val=Streamed("val"))
    training.run_epoch()
    training.run_epoch()
    # Two steps a pass; validation goes by epochs.
    assert seen == {"train": [0, 1, 2, 3, 4, 5], "val": [0, 1]}


def test_augmentation_can_be_turned_off() -> None:
    still = trainer(augmentation=Augmentation(strength=0.0))
    moved = trainer(augmentation=Augmentation(strength=1.0))
    assert still.run_epoch()["train_loss"] != moved.run_epoch()["train_loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rungs": ()}, "rungs"),
        ({"rungs": (3, 1)}, "rungs"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
    ],
)
def test_a_config_out_of_range_names_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"rungs": (1,), **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_learns_on_a_gpu() -> None:
    training = Trainer(
        MODEL,
        TrainConfig(rungs=(3,), batch_size=32),
        train=bars(640, 1),
        val=bars(200, 2),
        device="cuda",
    )
    metrics = [training.run_epoch() for _ in range(3)]
    assert metrics[-1]["val_accuracy"] > 0.98


def test_a_state_of_another_config_is_trained_on_by_this_one() -> None:
    """As in population-based training, which changes a configuration and keeps the weights."""
    donor = trainer(weight_decay=0.0, momentum=0.5)
    donor.run_epoch()
    state = copy.deepcopy(donor.state_dict())
    changed = trainer(weight_decay=0.3, momentum=0.8)
    changed.load_state_dict(copy.deepcopy(state))
    same = trainer(weight_decay=0.0, momentum=0.5)
    same.load_state_dict(state)
    for training in (donor, changed, same):
        training.run_epoch()
    assert bits(same.net) == bits(donor.net)
    weights = [
        sum(float(p.detach().square().sum()) for p in t.net.parameters() if p.ndim > 1)
        for t in (donor, changed)
    ]
    assert weights[1] < 0.9 * weights[0], "what decays more is smaller"
