"""Non-local means as attention: equal to a double loop, in slabs as in one piece, and no worse than scikit-image."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vicinal.denoise import STRENGTH, Features, _slabs, denoise, estimate_sigma
from vicinal.errors import InvalidProblem, Unsupported

EPS = float(np.finfo(np.float32).eps)


def picture(shape: tuple[int, ...], seed: int, noise: float = 0.1) -> np.ndarray:
    """Stripes and a ramp with noise: something to find again, and something to remove."""
    rng = np.random.default_rng(seed)
    place = np.indices(shape).astype(float)
    clean = 0.3 + 0.3 * (place.sum(axis=0) // 3 % 2) + 0.2 * place[-1] / shape[-1]
    return (clean + noise * rng.standard_normal(shape)).astype(np.float32)


def gaussian(patch: tuple[int, ...]) -> np.ndarray:
    sides = [np.arange(side) - side // 2 for side in patch]
    exponents = [-(x**2) / (2 * max((side - 1) / 4, 0.25) ** 2) for x, side in zip(sides, patch, strict=True)]
    weights = np.exp(sum(np.meshgrid(*exponents, indexing="ij")))
    return weights / weights.sum()


def double_loop(
    image: np.ndarray, patch: tuple[int, ...], reach: tuple[int, ...], h: float, sigma: float
) -> np.ndarray:
    """The formula in the docstring of `denoise`, for every pair of pixels; `image` is `[*S, C]` in float64."""
    shape, channels = image.shape[:-1], image.shape[-1]
    margins = [(side // 2, side // 2) for side in patch]
    padded = np.pad(image, [*margins, (0, 0)], mode="reflect")
    weights = gaussian(patch)[..., None] / channels

    def patch_at(place: tuple[int, ...]) -> np.ndarray:
        return padded[tuple(slice(i, i + side) for i, side in zip(place, patch, strict=True))]

    def window(place: tuple[int, ...]) -> Any:
        ranges = []
        for i, far, length in zip(place, reach, shape, strict=True):
            size = min(2 * far + 1, length)
            start = min(max(i - size // 2, 0), length - size)
            ranges.append(range(start, start + size))
        return itertools.product(*ranges)

    out = np.empty_like(image)
    for i in np.ndindex(shape):
        total, summed = 0.0, np.zeros(channels)
        for j in window(i):
            distance = (weights * (patch_at(i) - patch_at(j)) ** 2).sum()
            weight = math.exp(-2 * sigma**2 / h**2) if i == j else math.exp(-distance / h**2)
            total, summed = total + weight, summed + weight * image[j]
        out[i] = summed / total
    return out


def allowance(image: np.ndarray, h: float, sigma: float) -> float:
    """What rounding may do: scores are sums of squares over h^2, and the centre's weight is found by subtraction."""
    spread = float(np.ptp(image)) + EPS
    largest_score = (spread / h) ** 2
    return 16 * EPS * (1 + largest_score) * math.exp(2 * sigma**2 / h**2) * (spread + float(np.abs(image).max()))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(2, {1: 40, 2: 9, 3: 5}[rank])) for _ in range(rank))
    patch = tuple(draw(st.sampled_from([side for side in (1, 3, 5) if side // 2 < length])) for length in shape)
    reach = tuple(draw(st.integers(0, 3)) for _ in shape)
    channels = draw(st.sampled_from([None, 1, 2, 3]))
    h = draw(st.sampled_from([0.08, 0.15, 0.4]))
    sigma = draw(st.sampled_from([0.0, 0.1]))
    return {"shape": shape, "patch": patch, "reach": reach, "channels": channels, "h": h, "sigma": sigma}


@given(cases(), st.integers(0, 1000))
@settings(max_examples=40)
def test_equals_the_double_loop(case: dict[str, Any], seed: int):
    channels = case["channels"]
    image = picture((*case["shape"], *([channels] if channels else [])), seed)
    arguments = {"h": case["h"], "sigma": case["sigma"]}
    with_channels = (image if channels else image[..., None]).astype(np.float64)
    wanted = double_loop(with_channels, case["patch"], case["reach"], **arguments).reshape(image.shape)
    found = denoise(
        image,
        patch_size=case["patch"],
        patch_distance=case["reach"],
        components=None,
        channel_axis=-1 if channels else None,
        **arguments,
    )
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() <= allowance(image, **arguments)


@pytest.mark.parametrize("channel_axis", [None, -1])
def test_all_components_without_noise_are_the_whole_patch(channel_axis: int | None):
    image = picture((14, 17) if channel_axis is None else (14, 17, 3), seed=3)
    arguments: dict[str, Any] = {"sigma": 0.0, "h": 0.2, "patch_size": 3, "patch_distance": 3}
    whole = denoise(image, components=None, channel_axis=channel_axis, **arguments)
    rotated = denoise(image, components=27, channel_axis=channel_axis, **arguments)
    assert np.abs(whole - rotated).max() <= allowance(image, 0.2, 0.0)
    fewer = denoise(image, components=2, channel_axis=channel_axis, **arguments)
    assert np.abs(whole - fewer).max() > 100 * allowance(image, 0.2, 0.0)


def test_weights_are_those_of_scikit_image_away_from_borders():
    restoration = pytest.importorskip("skimage.restoration", reason="scikit-image is not installed")
    image = picture((31, 37), seed=4, noise=0.02)
    # So large an h that no distance reaches 5, where theirs stops counting.
    h, reach = 0.35, 4
    ours = denoise(image, sigma=0.0, h=h, patch_size=5, patch_distance=reach, components=None)
    theirs = restoration.denoise_nl_means(image, patch_size=5, patch_distance=reach, h=h, sigma=0.0, fast_mode=False)
    inside = np.s_[reach:-reach, reach:-reach]
    # Their exponential is an approximation that is off by up to four per cent.
    changed = np.abs(theirs - image)[inside].max()
    assert np.abs(ours - theirs)[inside].max() < 0.04 * changed
    assert np.abs(ours - theirs).max() > 0.04 * changed, "at the border windows differ, so should results"


@given(st.floats(-3, 3, width=32), st.sampled_from([(1, 5, 9), (6, 7), (8, 9, 3), (11,)]), st.booleans())
def test_a_constant_picture_stays(level: float, shape: tuple[int, ...], is_estimated: bool):
    image = np.full(shape, level, dtype=np.float32)
    found = denoise(image, sigma=None if is_estimated else 0.1)
    assert np.abs(found - image).max() <= 4 * EPS * abs(level)


@given(st.integers(9, 40), st.integers(0, 4), st.sampled_from([None, 4]), st.booleans())
@settings(max_examples=25)
def test_slabs_are_the_whole(height: int, reach: int, components: int | None, is_volume: bool):
    assume(height > 2 * (2 * reach + 1))
    image = picture((height, 5, 4) if is_volume else (height, 11), seed=height)
    calls: list[tuple[int, int]] = []
    arguments: dict[str, Any] = {
        "sigma": 0.1,
        "patch_size": 3,
        "patch_distance": reach,
        "components": components,
    }
    whole = denoise(image, progress=lambda *call: calls.append(call), **arguments)
    assert calls == [(height, height)]
    count = components or 3**image.ndim
    row = 4 * (count + 2 * 8 * math.ceil((count + 1) / 8) + 5) * math.prod(image.shape[1:])
    calls.clear()
    slabs = denoise(
        image, memory_bytes=2 * (2 * reach + 1) * row, progress=lambda *call: calls.append(call), **arguments
    )
    assert len(calls) > 1
    assert calls[-1] == (height, height)
    h = 0.1 * (STRENGTH if components else 0.9)
    assert np.abs(whole - slabs).max() <= allowance(image, h, 0.1)


@given(st.integers(1, 300), st.integers(0, 9), st.integers(1, 90))
def test_slabs_cover_all_rows_within_the_budget(height: int, reach: int, budget: int):
    size = min(2 * reach + 1, height)
    assume(budget >= min(2 * size, height))
    slabs = list(_slabs((height, 7), (size, 3), 10, budget * 7 * 10))
    assert [row for first, last, _, _ in slabs for row in range(first, last)] == list(range(height))
    assert all(0 <= start <= first < last <= stop <= height for first, last, start, stop in slabs)
    assert all(stop - start <= budget for _, _, start, stop in slabs)


@pytest.mark.parametrize("components", [None, 6])
def test_noise_alone_is_as_far_apart_whatever_the_features(components: int | None):
    sigma = 0.2
    pixels = torch.from_numpy(picture((60, 70, 3), seed=1, noise=sigma)).movedim(-1, 0).contiguous()
    filters = Features.of(pixels, (5, 5), components, sigma).filters
    noise = sigma * torch.randn(1, 3, 400, 410)
    response = torch.nn.functional.conv2d(noise, filters)
    # Two independent patches differ by twice the power of one. Overlapping patches leave some
    # (400 / 5) (410 / 5) independent samples, of which three standard deviations are 5 %.
    assert float(2 * response.square().sum(dim=1).mean()) == pytest.approx(2 * sigma**2, rel=0.05)


def test_no_worse_than_scikit_image_at_its_best():
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    from skimage.restoration import denoise_nl_means

    sigma = 0.1
    clean = (data.astronaut()[60:150, 170:270] / 255).astype(np.float32)
    noisy = (clean + sigma * np.random.default_rng(0).standard_normal(clean.shape)).astype(np.float32)

    def psnr(image: np.ndarray) -> float:
        return -10 * math.log10(float(np.square(image.astype(float) - clean).mean()))

    theirs = max(
        psnr(denoise_nl_means(noisy, 5, 6, h=k * sigma, sigma=known, fast_mode=False, channel_axis=-1))
        for known, strengths in ((sigma, (0.6, 0.7, 0.8, 0.9)), (0.0, (0.9, 1.0, 1.1, 1.2)))
        for k in strengths
    )
    ours = psnr(denoise(noisy, sigma=sigma, patch_distance=6, channel_axis=-1))
    untold = psnr(denoise(noisy, patch_distance=6, channel_axis=-1))
    assert ours >= theirs
    assert untold >= theirs
    assert theirs > psnr(noisy) + 6, "a baseline that does nothing proves nothing"


@given(st.floats(0.01, 10), st.floats(-5, 5), st.sampled_from([(300, 310), (9, 100, 110), (60000,)]))
@settings(max_examples=12)
def test_sigma_is_found(sigma: float, level: float, shape: tuple[int, ...]):
    noise = np.random.default_rng(5).standard_normal(shape)
    assert estimate_sigma((level + sigma * noise).astype(np.float32)) == pytest.approx(sigma, rel=0.05)


def test_sigma_of_colours_is_their_mean():
    noise = np.random.default_rng(6).standard_normal((2, 200, 210)) * np.array([1.0, 3.0])[:, None, None]
    assert estimate_sigma(noise, channel_axis=0) == pytest.approx(2.0, rel=0.05)


def test_kinds_of_arrays_agree():
    deep = (np.clip(picture((13, 17, 3), seed=8), 0, 1) * 65535).astype(np.uint16)
    arguments: dict[str, Any] = {"sigma": 0.05, "patch_distance": 3}
    as_ints = denoise(deep, channel_axis=-1, **arguments)
    as_floats = denoise((deep / 65535).astype(np.float32), channel_axis=-1, **arguments)
    np.testing.assert_array_equal(as_ints, as_floats)
    tensor = torch.from_numpy(as_floats.copy())
    first = denoise(tensor.movedim(-1, 0), channel_axis=0, **arguments)
    assert first.shape == (3, 13, 17)
    last = denoise(as_floats[::-1, ::-1], channel_axis=-1, **arguments)
    np.testing.assert_array_equal(
        first.movedim(0, -1).numpy(), denoise(as_floats, channel_axis=-1, **arguments), strict=True
    )
    # An odd window is symmetric, so a turned picture is the picture turned.
    np.testing.assert_allclose(last[::-1, ::-1], denoise(as_floats, channel_axis=-1, **arguments), atol=1e-4)


def test_the_input_is_left_alone():
    image = picture((9, 11), seed=2)
    before = image.copy()
    denoise(image, sigma=0.1)
    denoise(image, sigma=None)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((3, 4, 5, 6))}, "1 to 3 axes beside channels.*name the axis of colours"),
        ({"image": np.float32(3)}, "1 to 3 axes"),
        ({"image": np.zeros((0, 4))}, "at least one pixel"),
        ({"image": np.zeros((3, 4), complex)}, "real numbers, got an array of complex128"),
        ({"image": torch.zeros(3, 4, dtype=torch.complex64)}, "real numbers, got a tensor of torch.complex64"),
        ({"image": np.full((8, 9), np.nan)}, "finite, got NaN"),
        ({"channel_axis": 2}, "channel_axis must name one of 2 axes, got 2"),
        ({"patch_size": 4}, "patch_size must be odd.* got 4"),
        ({"patch_size": (3, 3, 3)}, "patch_size needs 2 values"),
        ({"patch_size": 23}, r"less than twice the image's sides, which are \(9, 11\), got 23"),
        ({"patch_distance": -1}, "patch_distance must not be negative, got -1"),
        ({"channel_axis": "last"}, "channel_axis must name one of 2 axes, got 'last'"),
        ({"components": 1.5}, "components must be at least 1, or None for whole patches, got 1.5"),
        ({"components": 0}, "components must be at least 1, or None for whole patches, got 0"),
        ({"sigma": -0.1}, "sigma must be a finite number that is not negative, got -0.1"),
        ({"sigma": math.inf}, "sigma must be a finite number"),
        ({"h": 0.0}, "h must be above 0"),
        ({"h": math.nan}, "h must be a finite number"),
        ({"sigma": 0.0}, "h must be given where sigma is 0"),
        ({"memory_bytes": 1000, "patch_distance": 2}, "at least 9 rows of .* bytes .two search windows., got 1,000"),
        ({"backend": "nonsense"}, "nonsense"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str):
    arguments: dict[str, Any] = {"image": picture((9, 11), seed=0), "sigma": 0.1} | change
    with pytest.raises((InvalidProblem, Unsupported), match=message):
        denoise(**arguments)


def test_a_single_pixel_has_no_noise_to_estimate():
    with pytest.raises(InvalidProblem, match="single pixel"):
        estimate_sigma(np.zeros((1, 1)))
