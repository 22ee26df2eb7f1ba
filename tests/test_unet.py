"""U-shaped networks: any rank and size, nothing from later along causal axes, boxes that come apart and together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vicinal.errors import InvalidProblem
from vicinal.models.unet import UNet, UShape, from_boxes, to_boxes

FLAT = UShape(2, 3, (2, 1), (2, 2), 16, (2, 1), 8, 2.0, (3, 5), dilations=(1, 2))
SHAPES = {
    "line": UShape(1, 1, (4,), (2,), 8, (1, 1), 8, 2.0, (5,)),
    "plane": FLAT,
    "volume": UShape(1, 3, (2, 2, 1), (1, 2, 2), 16, (1, 1, 1), 8, 1.0, (3, 3, 2)),
    "video": UShape(
        3, 3, (1, 2, 2), (1, 2, 2), 16, (2, 1), 8, 2.0, (2, 3, 3), (1, 2), (True, False, False), residual=True
    ),
}
SIZES = {"line": (19,), "plane": (13, 10), "volume": (7, 9, 11), "video": (5, 9, 13)}


def networks(name: str) -> list[UNet]:
    """Both kinds, with random weights everywhere."""
    kinds: tuple[Any, ...] = ("windows", "convolutions")
    found = [UNet(replace(SHAPES[name], mixer=kind)) for kind in kinds]
    for net in found:
        for parameter in net.head.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return found


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=3), st.integers(1, 3))
def test_boxes_come_apart_and_together(axes: list[tuple[int, int]], channels: int):
    box = tuple(size for size, _ in axes)
    lengths = [size * count for size, count in axes]
    x = torch.randn(2, *lengths, channels)
    apart = to_boxes(x, box)
    assert torch.equal(from_boxes(apart, box), x)
    # The first box holds the first tokens of every axis, the last axis fastest.
    first = x[(0, *(slice(size) for size in box))].flatten()
    assert torch.equal(apart[(0, *[0] * len(box))], first)


@pytest.mark.parametrize("name", SHAPES)
def test_any_size_gives_a_map_of_the_same(name: str):
    for net in networks(name):
        x = torch.randn(2, SHAPES[name].in_chans, *SIZES[name])
        y = net(x)
        assert y.shape == (2, SHAPES[name].out_chans, *SIZES[name])
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", ["line", "plane", "volume"])
def test_every_level_reaches_the_output(name: str):
    """Cut any level out, and the answer changes."""
    for net in networks(name):
        x = torch.randn(1, SHAPES[name].in_chans, *SIZES[name])
        wanted = net(x)
        for blocks in (*net.down, *net.up):
            saved = [p.clone() for p in blocks.parameters()]
            with torch.no_grad():
                for p in blocks.parameters():
                    p.add_(0.3)
            assert not torch.allclose(net(x), wanted)
            with torch.no_grad():
                for p, was in zip(blocks.parameters(), saved, strict=True):
                    p.copy_(was)
        torch.testing.assert_close(net(x), wanted)


def test_what_a_level_had_on_the_way_down_joins_it_on_the_way_up():
    """With nothing from coarser levels, a pixel is still felt where it is."""
    for net in networks("plane"):
        for layer in net.refine:
            torch.nn.init.zeros_(layer.weight)
        x = torch.randn(1, 2, *SIZES["plane"])
        changed = x.clone()
        changed[0, 0, 4, 4] += 1
        assert (net(changed) - net(x))[0, :, 4, 4].abs().max() > 1e-4


def test_nothing_comes_from_later_frames_and_much_from_earlier():
    for net in networks("video"):
        x = torch.randn(1, 3, *SIZES["video"])
        wanted = net(x)
        changed = x.clone()
        changed[:, :, 3:] += torch.randn_like(changed[:, :, 3:])
        assert torch.equal(net(changed)[:, :, :3], wanted[:, :, :3])
        changed = x.clone()
        changed[:, :, 2] += 1
        difference = (net(changed) - wanted).abs().amax((0, 1, 3, 4))
        assert not difference[:2].any() and difference[3] > 1e-4
        # A clip that goes on gives the frames so far what they had.
        torch.testing.assert_close(net(x[:, :, :4]), wanted[:, :, :4])


def test_a_residual_network_begins_as_the_identity():
    x = torch.randn(1, 3, *SIZES["video"])
    for kind in ("windows", "convolutions"):
        assert torch.equal(UNet(replace(SHAPES["video"], mixer=kind))(x), x)


def test_dilations_take_turns_but_not_in_time():
    net = UNet(replace(SHAPES["video"], depths=(3, 1)))
    assert [block.attn.dilation for block in net.down[0]] == [(1, 1, 1), (1, 2, 2), (1, 1, 1)]
    assert net.down[0][0].attn.is_causal == (True, False, False)


@pytest.mark.parametrize(("changes", "message"), [
    ({"halved": (2,)}, r"patch, halved, kernel_size and is_causal must have one value per axis, got \(2, 1\), \(2,\)"),
    ({"is_causal": (True, False)}, r"patch and halved must be 1 where is_causal, got \(2, 1\), \(2, 2\)"),
    ({"mixer": "attention"}, "mixer must be 'windows' or 'convolutions', got 'attention'"),
    ({"head_dim": 7}, "head_dim must divide embed_dim 16, got 7"),  # heads would be of 8
    ({"head_dim": 0}, "head_dim must divide embed_dim 16, got 0"),
    ({"dilations": ()}, r"dilations must be a tuple of integers, one at least, got \(\)"),  # there would be no blocks
    ({"kernel_size": 3}, "kernel_size must be a tuple of integers, one at least, got 3"),
    ({"halved": (0, 2)}, r"patch and halved must be at least 1, got \(2, 1\) and \(0, 2\)"),
    ({"residual": True}, "out_chans must equal in_chans for a residual, got 3 and 2"),
])  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(InvalidProblem, match=message):
        replace(FLAT, **changes)


def test_other_inputs_are_refused():
    with pytest.raises(InvalidProblem, match=r"x must be \[B, 2, \*S\] with 2 spatial axes, got shape \(1, 3, 8, 9\)"):
        UNet(FLAT)(torch.zeros(1, 3, 8, 9))
