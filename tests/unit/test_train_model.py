from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from lib.train.model import ConvNet, ModelConfig, Served


def config(**changes: object) -> ModelConfig:
    fields: dict[str, object] = {
        "height": 28,
        "width": 28,
        "channels": 1,
        "num_classes": 10,
        "stage_width": 8,
        "depth": 1,
        "pixel_mean": (0.13,),
        "pixel_std": (0.31,),
    }
    return ModelConfig(**(fields | changes))  # type: ignore[arg-type]


def random_images(batch: int, model: ModelConfig) -> torch.Tensor:
    shape = (batch, model.height, model.width, model.channels)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    ("height", "width", "channels", "num_classes"),
    [(28, 28, 1, 10), (12, 20, 3, 5), (3, 4, 1, 2), (1, 1, 1, 2), (7, 6, 2, 3), (65, 48, 3, 7)],
)
def test_probabilities_for_images_of_any_shape(
    height: int, width: int, channels: int, num_classes: int, depth: int
) -> None:
    model = config(
        height=height,
        width=width,
        channels=channels,
        num_classes=num_classes,
        depth=depth,
        pixel_mean=(0.4,) * channels,
        pixel_std=(0.2,) * channels,
    )
    served = Served(ConvNet(model)).eval()
    probabilities = served(random_images(5, model))
    assert probabilities.shape == (5, num_classes)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(5))


@pytest.mark.parametrize(("growth", "widths"), [(1, [8, 8, 8]), (2, [8, 16, 16]), (4, [8, 16, 32])])
def test_stages_double_up_to_the_growth(growth: int, widths: list[int]) -> None:
    net = ConvNet(config(growth=growth))
    found = [layer.out_channels for layer in net.features if isinstance(layer, torch.nn.Conv2d)]
    assert found == widths


def test_pixels_are_normalised_inside_the_net() -> None:
    net = ConvNet(config(channels=2, pixel_mean=(0.0, 0.5), pixel_std=(1.0, 0.25)))
    images = torch.zeros((1, 28, 28, 2), dtype=torch.uint8)
    images[..., 1] = 255
    normalised = net.normalise(images)
    assert normalised[:, 0].unique().tolist() == [0.0]
    assert normalised[:, 1].unique().tolist() == pytest.approx([2.0])


def test_a_channel_that_never_changes_does_not_divide_by_zero() -> None:
    model = config(pixel_std=(0.0,))
    assert torch.isfinite(ConvNet(model)(random_images(2, model))).all()


def test_an_answer_is_the_mean_over_the_views_of_an_image_which_training_does_not_see() -> None:
    torch.manual_seed(0)
    one = ConvNet(config()).eval()
    five = ConvNet(config(num_views=5)).eval()
    five.load_state_dict(one.state_dict())
    images = torch.zeros((3, 28, 28, 1), dtype=torch.uint8)
    images[:, 8:20, 8:20] = random_images(3, config())[:, 8:20, 8:20]
    moved = [
        images.roll(move, dims=(1, 2)) for move in ((0, 0), (1, -1), (-1, 1), (-1, -1), (1, 1))
    ]
    with torch.no_grad():
        expected = torch.stack([Served(one)(view) for view in moved]).mean(dim=0)
        torch.testing.assert_close(Served(five)(images), expected)
        assert (expected - Served(one)(images)).abs().max() > 1e-3, "the views differ"
        trained_on = five.normalise(images)
        assert torch.equal(five.classify(trained_on), one.classify(trained_on))


def test_what_comes_in_at_the_edge_of_a_view_repeats_the_edge() -> None:
    images = torch.full((2, 28, 28, 1), 90, dtype=torch.uint8)
    net = ConvNet(config()).eval()
    viewed = ConvNet(config(num_views=5)).eval()
    viewed.load_state_dict(net.state_dict())
    torch.testing.assert_close(Served(viewed)(images), Served(net)(images))


@pytest.mark.parametrize("num_views", [1, 3])
def test_exported_program_takes_any_batch_and_computes_the_same(num_views: int) -> None:
    model = config(
        height=12,
        width=20,
        channels=3,
        num_views=num_views,
        pixel_mean=(0.4,) * 3,
        pixel_std=(0.2,) * 3,
    )
    served = Served(ConvNet(model)).eval()
    program = torch.export.export(
        served,
        (random_images(2, model),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
    ).module()
    for batch in (1, 2, 7):
        images = random_images(batch, model)
        torch.testing.assert_close(program(images), served(images))


def test_a_config_survives_a_checkpoint() -> None:
    content = asdict(config())
    content["pixel_mean"] = list(content["pixel_mean"])
    assert ModelConfig.from_dict(content) == config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 0}, "height=0"),
        ({"num_classes": 1}, "num_classes=1"),
        ({"num_views": 0}, "num_views=0"),
        ({"num_views": 6}, "num_views=6"),
        ({"pixel_mean": (0.1, 0.2)}, "pixel_mean has 2 values"),
    ],
)
def test_a_config_out_of_range_names_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**change)
