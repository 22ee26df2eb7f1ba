"""Windows that fit themselves to grids, presets, and which layers and steps stay dense. No model needed."""

import pytest

from vicinal import InvalidProblem
from vicinal.integrations.presets import load_preset, preset_names
from vicinal.integrations.sparsity import Setting, Sparsity, Window, first_and_last

PREDICT2 = (24, 44, 80)


def test_integers_without_a_base_mean_themselves():
    setting = Window((3, 5), stride=(1, 4), dilation=(2, 1), is_causal=(True, False)).on((9, 11))
    assert setting == Setting((9, 11), (3, 5), (1, 4), (2, 1), (True, False))
    with pytest.raises(InvalidProblem, match=r"axis 1 of 9x4: the window does not fit: .* = 5"):
        Window((3, 5)).on((9, 4))


@pytest.mark.parametrize("grid", [(30, 48, 80), (33, 45, 80), (1, 7, 2)])
def test_shares_fit_every_grid(grid):
    setting = Window((0.6, 0.5, 0.3), stride=(0.5, 0.2, 0.1), dilation=(1, 2, 3)).on(grid)
    assert setting is not None
    for length, size, stride, dilation in zip(grid, *setting[1:4], strict=True):
        assert 1 <= stride <= size <= size * dilation <= length
    if grid[0] == 30:
        assert setting.kernel_size == (18, 24, 24)


def test_a_window_over_everything_is_dense():
    assert Window(-1).on((5, 6)) is None
    assert Window(1.0, stride=0.5).on((5, 6)) is None
    assert Window((5, 6)).on((5, 6)) is None
    assert Window(-1, is_causal=(True, False)).on((5, 6)) is not None


def test_numbers_made_for_one_grid_scale_with_each_axis_as_nvidias_do():
    window = load_preset("cosmos-predict2-2b").windows[0]
    assert window is not None
    assert window.on(PREDICT2) == Setting(PREDICT2, (24, 4, 16), (1, 1, 1), (1, 11, 5), (False,) * 3)
    # 480x832 in patches of 16: windows 4 * 30/44 and 16 * 52/80, dilations 11 * 30/44 (7.49... in floats) and 5 * 52/80
    small = window.on((20, 30, 52))
    assert small is not None and small[1:4] == ((20, 3, 10), (1, 1, 1), (1, 7, 3))


def test_presets_are_complete_and_name_their_source():
    assert set(preset_names()) == {
        "cosmos-7b",
        "cosmos-predict2-2b",
        "cosmos-predict2-14b",
        "flux-4k",
        "hunyuan-video",
    }
    for name in preset_names():
        preset = load_preset(name)
        assert preset.name == name
        assert "NVIDIA, cosmos-predict2" in preset.source or "arXiv 2504.16922" in preset.source
        assert len(preset.windows) == preset.model["layers"]
        assert preset.dense_steps < preset.steps


@pytest.mark.parametrize(("name", "shares"), [
    # layers that leave out so much of attention: NVIDIA's own summary beside its lists
    ("cosmos-predict2-2b", {0.98: 2, 0.95: 3, 0.92: 7, 0.77: 15, 0.55: 1}),
    ("cosmos-predict2-14b", {0.98: 11, 0.95: 2, 0.92: 10, 0.77: 6, 0.55: 6, 0.0: 1}),
    ("flux-4k", {0.90: 57}),
    ("hunyuan-video", {0.91: 60}),
    ("cosmos-7b", {0.89: 28}),
])  # fmt: skip
def test_presets_have_the_published_sparsity(name, shares):
    preset = load_preset(name)
    grid = tuple(24 if length == -1 else length for length in preset.base)
    found: dict[float, int] = {}
    for window in preset.windows:
        setting = None if window is None else window.on(grid)
        kept = 1.0
        if setting is not None:
            for size, length in zip(setting.kernel_size, grid, strict=True):
                kept *= size / length
        nearest = min(shares, key=lambda share: abs(share - (1 - kept)))
        assert abs(nearest - (1 - kept)) < 0.006
        found[nearest] = found.get(nearest, 0) + 1
    assert found == shares


def test_dense_layers_and_steps():
    rule = Sparsity((Window(3),), dense_layers=(1, 2), dense_steps=(2, 1), steps=6)
    assert [rule.window(layer, 5, step=3) is None for layer in range(5)] == [True, False, False, True, True]
    assert [rule.window(1, 5, step) is None for step in range(6)] == [True, True, False, False, False, True]
    each = Sparsity((Window(3), None, Window(5)))
    assert [each.window(layer, 3, 0) for layer in range(3)] == list(each.windows)


def test_first_and_last():
    assert first_and_last(3, "dense_steps") == (3, 0)
    assert first_and_last([3, 1], "dense_steps") == (3, 1)
    for wrong in (-1, 1.5, True, "3", (1,), (1, -2), (1, 2, 3)):
        with pytest.raises(InvalidProblem, match="dense_steps must be a number of first ones, or"):
            first_and_last(wrong, "dense_steps")


@pytest.mark.parametrize(("build", "message"), [
    (lambda: Window(0), "kernel_size must be at least 1, or -1 for a whole axis, got 0"),
    (lambda: Window((3, 0.0)), r"kernel_size as a share of an axis must lie in \(0, 1\], got 0.0"),
    (lambda: Window(3, stride=-1), "stride must be at least 1, got -1"),
    (lambda: Window(True), r"kernel_size must be tokens \(integers\) or shares of an axis \(floats\), got True"),
    (lambda: Window((3, 3)).on((4, 5, 6)), r"kernel_size needs one value for each of the 3 axes of the grid, got"),
    (lambda: Window(3, stride=4).on((9, 9)), r"axis 0 of 9x9: stride must lie in \[1, .*3\]"),
    (lambda: Window(3, base=(0, 9)), r"base must be tokens per axis of a grid, -1 where any will do, got \(0, 9\)"),
    (lambda: Window(3, base=(-2, 9)), r"base must be tokens per axis of a grid, .* got \(-2, 9\)"),
    (lambda: Window(3, base=9), "base must be tokens per axis of a grid, .* got 9"),
    (lambda: Sparsity((Window(3),), dense_steps=(3, 2), steps=4), r"dense_steps=\(3, 2\) are more than all 4 steps"),
    (lambda: load_preset("wan"), "preset must be one of cosmos-7b, .* got 'wan'"),
])  # fmt: skip
def test_bad_windows_are_named(build, message):
    with pytest.raises(InvalidProblem, match=message):
        build()


def test_a_window_says_what_it_is():
    assert str(Window((-1, 0.5), stride=2)) == "window -1x0.5, stride 2"
    assert str(Window(3, base=(-1, 8))) == "window 3, made for anyx8"
