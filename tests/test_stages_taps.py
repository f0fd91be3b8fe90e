"""What a method reads of a cache: late blocks and taps that it settles on, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from model_tools import save_model
from sherl_pipe.cache import InputError, StreamSpec
from sherl_pipe.stages.adapter import load_reference
from sherl_pipe.stages.backbone import Backbone, load_backbone
from sherl_pipe.stages.families import FAMILIES
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.methods.dtl_encoder import patch_grid
from sherl_pipe.stages.methods.route import RouteSpec
from transformers import ViTConfig

FOUR, FIVE = tuple(range(5)), tuple(range(6))


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    """Four blocks, and two stacks of five."""
    return {
        family: load_backbone(save_model(tmp_path_factory.mktemp(family), family))
        for family in ("bert", "t5")
    }


@pytest.mark.parametrize(
    ("method", "held", "late", "taps"),
    [
        ("linear", {"hidden": FOUR[:4]}, 0, {"hidden": (3,)}),
        ("linear", {"encoder": FIVE, "decoder": FIVE[:5]}, 1, {"encoder": (5,), "decoder": ()}),
        ("linear", {"encoder": (5,), "decoder": (2, 5)}, 0, {"decoder": (5,)}),
        ("linear", {"encoder": (5,), "decoder": (0, 3)}, 2, {"encoder": (5,), "decoder": ()}),
        ("weighted", {"hidden": (0, 3)}, 0, {"hidden": (0, 3)}),
        (
            "weighted",
            {"encoder": (0, 5), "decoder": (0, 2, 4)},
            1,
            {"encoder": (5,), "decoder": (0, 2, 4)},
        ),
        ("weighted", {"encoder": (5,), "decoder": (2, 5)}, 0, {"decoder": (2, 5)}),
        ("unipt", {"hidden": (1, 2, 4)}, 0, {"hidden": (1, 2, 4)}),
        ("unipt", {"encoder": (0, 5), "decoder": FIVE}, 0, {"encoder": (0, 5), "decoder": FIVE}),
        # The upper half, as published, or the last block alone.
        ("dtl", {"hidden": FOUR[:4]}, 2, {"hidden": (0, 1, 2)}),
        ("dtl", {"hidden": (0, 3)}, 1, {"hidden": (0, 3)}),
        ("dtl", {"encoder": FIVE, "decoder": FIVE}, 2, {"encoder": FIVE, "decoder": FIVE[:4]}),
        (
            "dtl",
            {"encoder": (0, 5), "decoder": (1, 4)},
            1,
            {"encoder": (0, 5), "decoder": (1, 4)},
        ),
    ],
)
def test_what_a_cache_makes_of_a_method(
    backbones: dict[str, Backbone],
    method: str,
    held: dict[str, tuple[int, ...]],
    late: int,
    taps: dict[str, tuple[int, ...]],
) -> None:
    """The late blocks that nobody asked for, and the taps that are read with them."""
    backbone = backbones["bert" if "hidden" in held else "t5"]
    depth = {stream: len(backbone.blocks(stream)) for stream in held}
    streams = {stream: StreamSpec(each, depth[stream], 36) for stream, each in held.items()}
    chosen = find_method(method).usual_for(streams)
    assert chosen["late"] == late
    assert chosen["reduction"] == {"dtl": 18, "unipt": 4}.get(method, 1)
    found, last = find_method(method).choose_taps(backbone, late, held)
    assert found == taps
    entry = {"decoder": depth["decoder"] - late} if late and "decoder" in depth else {}
    assert last == (entry if method in ("linear", "weighted") else {})


@pytest.mark.parametrize(
    ("method", "held", "late", "message"),
    [
        ("linear", {"hidden": FOUR}, 1, "late: expected 0 for linear on an encoder, found 1"),
        ("linear", {"encoder": (5,), "decoder": FIVE}, 5, "late: expected 0 to 4 for linear"),
        (
            "linear",
            {"encoder": (5,), "decoder": (2, 4)},
            2,
            r"decoder stream: expected \[3\], found \[2, 4\] in the .* --taps 3`",
        ),
        ("linear", {"encoder": (4,), "decoder": (4,)}, 1, r"encoder stream: expected \[5\]"),
        ("weighted", {"hidden": (3,)}, 0, r"2 or more of \[0, 1, 2, 3, 4\], found \[3\]"),
        ("weighted", {"encoder": (5,), "decoder": (5,)}, 0, "decoder stream: expected 2 or more"),
        ("unipt", {"encoder": (0, 5), "decoder": (4,)}, 0, "decoder stream: expected 2 or more"),
        ("unipt", {"hidden": FOUR}, 1, "late: expected 0 for unipt, found 1"),
        ("dtl", {"hidden": (0, 1, 3)}, 2, r"expected \[2\], found .* --taps 2`"),
        ("dtl", {"hidden": FOUR}, 0, "late: expected 1 to 3 for dtl, found 0"),
        ("dtl", {"encoder": (5,), "decoder": FIVE}, 1, "encoder stream: expected 1 or more"),
        ("dtl", {"encoder": (0, 1), "decoder": FIVE}, 1, r"encoder stream: expected \[5\]"),
    ],
)
def test_what_a_cache_lacks(
    backbones: dict[str, Backbone],
    method: str,
    held: dict[str, tuple[int, ...]],
    late: int,
    message: str,
) -> None:
    backbone = backbones["bert" if "hidden" in held else "t5"]
    with pytest.raises(InputError, match=message):
        find_method(method).choose_taps(backbone, late, held)


@pytest.mark.parametrize("method", ["dtl", "unipt", "weighted", "linear"])
def test_no_published_parameters_for_t5(backbones: dict[str, Backbone], method: str) -> None:
    with pytest.raises(InputError, match="published for T5: sherl, lst"):
        load_reference(
            backbones["t5"],
            {},
            method=method,
            encoder_side_layers=None,
            decoder_side_layers=None,
            reduction=2,
        )


def test_patches_of_an_image() -> None:
    def grid(tokens: int, **config: Any) -> tuple[int, int]:
        backbone: Any = SimpleNamespace(config=ViTConfig(**config), family=FAMILIES["vit"])
        spec = RouteSpec("dtl+", {}, {}, 1, 2, None, "paper", 2, "mean", 1, tokens)
        return patch_grid(backbone, spec)

    assert grid(7, image_size=(28, 42), patch_size=14) == (2, 3)
    assert grid(197) == (14, 14)
    assert grid(257) == (16, 16)  # images of another size, as DINOv2 reads them
    with pytest.raises(InputError, match="expected 14 x 14 patches, or a square of them, found 6"):
        grid(7)
