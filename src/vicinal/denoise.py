"""Non-local means written as neighborhood attention: pictures, volumes and signals without their noise.

Every pixel becomes the mean of the pixels around it, weighted by how alike the patches around both are.
That is attention. With `f` the features of a patch, divided by the filter strength `h`,

    query = [sqrt(2) f, 1],   key = [sqrt(2) f, -|f|^2],   value = pixel,   scale = 1
    query_i . key_j = |f_i|^2 - |f_i - f_j|^2

and softmax drops `|f_i|^2`, which all keys share: what is left are the Gaussian weights of non-local means.
The search window is the neighborhood.

Sources: Buades, Coll & Morel, "A non-local algorithm for image denoising", CVPR 2005 (the method);
Tasdizen, "Principal neighborhood dictionaries for nonlocal means image denoising", IEEE TIP 18(12), 2009
(principal components of patches); Salmon, "On two parameters for denoising with non-local means",
IEEE SPL 17(3), 2010 (the centre's weight).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, conv3d, pad

from vicinal._tuples import canonical, ceil_div, is_integer
from vicinal.errors import InvalidProblem
from vicinal.functional import attention_with_lse

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STRENGTH = 1.5
"""Filter strength, in units of the noise's standard deviation, if patches are compared by principal components."""

STRENGTH_WHOLE = 0.9
"""The same if whole patches are compared."""

_SAMPLES = 2**16
"""Patches whose principal components stand for those of all."""

_CONVOLUTIONS = {1: conv1d, 2: conv2d, 3: conv3d}


@overload
def denoise(
    image: NDArray[Any],
    *,
    sigma: float | None = None,
    h: float | None = None,
    patch_size: int | Sequence[int] | None = None,
    patch_distance: int | Sequence[int] | None = None,
    components: int | None = 15,
    channel_axis: int | None = None,
    backend: str | None = None,
    memory_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]: ...
@overload
def denoise(
    image: Tensor,
    *,
    sigma: float | None = None,
    h: float | None = None,
    patch_size: int | Sequence[int] | None = None,
    patch_distance: int | Sequence[int] | None = None,
    components: int | None = 15,
    channel_axis: int | None = None,
    backend: str | None = None,
    memory_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor: ...
def denoise(
    image: Any,
    *,
    sigma: float | None = None,
    h: float | None = None,
    patch_size: int | Sequence[int] | None = None,
    patch_distance: int | Sequence[int] | None = None,
    components: int | None = 15,
    channel_axis: int | None = None,
    backend: str | None = None,
    memory_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Remove noise by non-local means, in one pass of neighborhood attention.

        out[i] = sum_j w[i, j] image[j] / sum_j w[i, j],   j in the search window of i
        w[i, j] = exp(-distance(patch i, patch j) / h^2),   w[i, i] = exp(-2 sigma^2 / h^2)

    `distance` is a mean of squared differences, weighted by a Gaussian around the patch's centre of standard
    deviation (patch_size - 1) / 4, over channels alike: the one of scikit-image's
    `denoise_nl_means(fast_mode=False)`, whose names and units the arguments follow. Two differences are meant
    to denoise better, and both go away with `sigma=0, components=None`:

    * The centre would always win with weight 1, since it is compared with itself. It gets what a pixel gets
      whose patch differs from it by noise alone. (scikit-image subtracts `2 sigma^2` from every
      distance and clips at zero.)
    * With `components`, patches are compared by their principal components, each counted by the share of
      its variance that is not noise (its Wiener gain), scaled so that noise alone is as far apart as before.
      Fewer, cleaner numbers per patch: better and faster.

    One more difference stays. Near a border our search window shifts inward and keeps its size; theirs is cut off.
    Both reflect the picture for patches that stick out. A picture smaller than the window is searched entirely.

    Args:
        image: a signal, picture or volume of 1 to 3 axes, and one for channels where `channel_axis` names it;
            NumPy array or tensor. Integers count as fractions of the largest of their type (255 is 1).
        sigma: standard deviation of the noise, in units of (converted) pixels. `None`: `estimate_sigma`. 0: plain
            weights, for which `h` must be given.
        h: filter strength, in the same units: larger is smoother. `None`: `1.5 * sigma`, or `0.9 * sigma` for
            whole patches. Weights lose digits below about a thousandth of the picture's range.
        patch_size: pixels along each side of a patch, odd; one number, or one per axis. `None`: 5, or 3 for
            volumes, and less along axes too thin for that.
        patch_distance: pixels from the centre of the search window to its edge, so that the window
            holds `2 * patch_distance + 1`; one number, or one per axis. `None`: 8, or 4 for volumes.
        components: principal components by which patches are compared. `None` compares whole patches.
        channel_axis: the axis of colours, if there is one.
        backend: as for `neighborhood_attention`.
        memory_bytes: for queries, keys and values. Pictures that need more are cut into overlapping slabs along
            their first axis, which changes nothing but rounding.
        progress: called with rows done and rows in all.

    Returns:
        An array or tensor, as `image` was, of its shape, in float32, on its device.

    Raises:
        InvalidProblem: naming the argument, what was expected and what came.

    Example:
        >>> stripes = torch.arange(24 * 30).reshape(24, 30) // 6 % 2
        >>> noisy = stripes + 0.1 * torch.randn(24, 30, generator=torch.Generator().manual_seed(0))
        >>> clean = denoise(noisy, sigma=0.1, patch_distance=5)
        >>> bool((clean - stripes).square().mean() < 0.2 * (noisy - stripes).square().mean())
        True
    """
    pixels, restore = _pixels(image, channel_axis)  # [C, *S]
    shape = tuple(pixels.shape[1:])
    patch = _odd(patch_size, shape)
    if patch_distance is None:
        patch_distance = 4 if len(shape) == 3 else 8
    reach = canonical(patch_distance, len(shape), "patch_distance")
    if min(reach) < 0:
        raise InvalidProblem(f"patch_distance must not be negative, got {patch_distance}")
    if components is not None and (not is_integer(components) or components < 1):
        raise InvalidProblem(f"components must be at least 1, or None for whole patches, got {components!r}")
    if sigma is None and h is None and not (sigma := _noise(pixels)):
        return restore(pixels)  # Not a trace of noise: a drawing, or one colour.
    sigma = _noise(pixels) if sigma is None else _number("sigma", sigma)
    if h is None:
        if sigma == 0:
            raise InvalidProblem("h must be given where sigma is 0: without noise nothing says how much to smooth")
        h = sigma * (STRENGTH_WHOLE if components is None else STRENGTH)
    elif (h := _number("h", h)) == 0:
        raise InvalidProblem("h must be above 0: it divides the distances, and 0 would forbid every other pixel")
    # Neither distances nor means mind a common shift, but rounding does: small numbers keep more digits.
    level = pixels.mean(dim=tuple(range(1, pixels.ndim)), keepdim=True)
    pixels = pixels - level
    most = float(pixels.abs().max())
    if most > 1e9 * h:  # squares of features would overflow
        raise InvalidProblem(f"h must be at least a billionth of the image's range, about {most:.3g}, got {h:g}")
    features = Features.of(pixels, patch, components, sigma)
    window = tuple(min(2 * far + 1, length) for far, length in zip(reach, shape, strict=True))
    out = torch.empty_like(pixels)
    for first, last, start, stop in _slabs(shape, window, features.bytes_per_pixel, memory_bytes):
        part = _attend(features, pixels[:, start:stop], start, window, sigma, h, backend)
        out[:, first:last] = part[:, first - start : last - start]
        if progress is not None:
            progress(last, shape[0])
    return restore(out.add_(level))


def estimate_sigma(image: Any, *, channel_axis: int | None = None) -> float:
    """Standard deviation of the noise in a picture, in units of its (converted) pixels.

        sigma = median |d| / 0.6745

    where `d` are differences of differences of neighbours along the last two axes (the finest diagonal details of
    a Haar wavelet), in which there is more noise than picture. Meant for Gaussian noise that differs from pixel to
    pixel; fine texture is taken for noise, so an estimate tends to be high. Channels are averaged.

    Args:
        image, channel_axis: as for `denoise`, of two pixels at least.

    Source: Donoho & Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 81, 1994.

    Example:
        >>> noise = torch.randn(150, 170, generator=torch.Generator().manual_seed(0))
        >>> round(estimate_sigma(7.0 + 0.1 * noise), 2)
        0.1
    """
    return _noise(_pixels(image, channel_axis)[0])


def _noise(pixels: Tensor) -> float:
    details = pixels
    for axis in range(max(pixels.ndim - 2, 1), pixels.ndim):
        if details.shape[axis] > 1:
            details = details.diff(dim=axis) * 0.5**0.5
    if details.shape == pixels.shape:
        raise InvalidProblem(f"sigma cannot be estimated from a single pixel, got shape {tuple(pixels.shape)}; give it")
    # Every channel on its own: a median over all would be that of the cleanest.
    return float(details.flatten(1).abs().median(dim=1).values.mean()) / 0.6745


@dataclass(frozen=True)
class Features:
    """How patches are compared: filters whose responses are features, so that `|f_i - f_j|^2` is the distance.

    Noise of standard deviation `sigma` alone sets two patches `2 sigma^2` apart on average, whatever the filters.

    Args:
        filters: `[K, C, *patch]`.
        padded: the picture, reflected at its borders by half a patch: `[1, C, *S + patch - 1]`.
    """

    filters: Tensor
    padded: Tensor

    @classmethod
    def of(cls, pixels: Tensor, patch: tuple[int, ...], components: int | None, sigma: float) -> Features:
        """Filters for the picture `[C, *S]`: every pixel of a patch, or its principal components."""
        channels = pixels.shape[0]
        margins = [side // 2 for side in reversed(patch) for _ in range(2)]
        padded = pad(pixels[None], margins, mode="reflect")
        weights = _gaussian(patch, pixels).expand(channels, *patch).reshape(-1) / channels
        basis = weights.sqrt().diag()
        if components is not None:
            basis = _principal(_samples(padded, patch), weights, sigma, components)
        return cls(basis.reshape(-1, channels, *patch), padded)

    @property
    def head_dim(self) -> int:
        """Features and the column of `-|f|^2`, filled up to the multiple of 8 that fast kernels want."""
        return ceil_div(len(self.filters) + 1, 8) * 8

    @property
    def bytes_per_pixel(self) -> int:
        """Features, queries, keys, values and what comes of them, in float32."""
        return 4 * (len(self.filters) + 2 * self.head_dim + 3 * self.filters.shape[1] + 2)

    def rows(self, start: int, stop: int) -> Tensor:
        """Features of rows `[start, stop)` of the first axis: `[*S, K]`."""
        halo = self.filters.shape[2] - 1
        convolve = _CONVOLUTIONS[self.filters.ndim - 2]
        return convolve(self.padded[:, :, start : stop + halo], self.filters)[0].movedim(0, -1)


def _gaussian(patch: tuple[int, ...], like: Tensor) -> Tensor:
    """Weights of a patch's pixels `[*patch]`; they add up to 1."""
    weights = torch.ones((), dtype=like.dtype, device=like.device)
    for side in patch:
        offset = torch.arange(side, dtype=like.dtype, device=like.device) - side // 2
        spread = max((side - 1) / 4, 0.25)  # A side of one pixel has one weight, whatever the spread.
        weights = weights[..., None] * torch.exp(-(offset**2) / (2 * spread**2))
    return weights / weights.sum()


def _samples(padded: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Patches spread evenly over the picture, `[at most 2^16, C * prod(patch)]`."""
    views = padded[0].movedim(0, -1)  # [*S + patch - 1, C]
    for axis, side in enumerate(patch):
        views = views.unfold(axis, side, 1)
    grid = views.shape[: len(patch)]  # views: [*S, C, *patch], not copied
    count = math.prod(grid)
    flat = torch.linspace(0, count - 1, min(count, _SAMPLES), dtype=torch.float64, device=padded.device).long()
    return views[torch.unravel_index(flat, grid)].flatten(1)


def _principal(samples: Tensor, weights: Tensor, sigma: float, components: int) -> Tensor:
    """Rows that take a patch to its principal components, in order of variance, each times the root of its gain."""
    samples = samples.double() * weights.double().sqrt()
    samples = samples - samples.mean(dim=0)
    variance, vectors = torch.linalg.eigh(samples.T @ samples / len(samples))
    variance, vectors = variance.flip(0)[:components], vectors.flip(1)[:, :components]  # [K], [P, K]
    unit_noise = (vectors**2 * weights.double()[:, None]).sum(dim=0)  # Variance that noise of sigma = 1 has in each.
    tiny = torch.finfo(torch.float32).tiny
    gain = ((variance - sigma**2 * unit_noise) / variance.clamp(min=tiny)).clamp(min=0)
    # The kept components shall set noise as far apart as whole patches do, so that `h` keeps its meaning.
    # Where nothing but noise is left, all gains are 0, all patches are alike and the mean of the window is right.
    vectors = vectors * (gain / (gain * unit_noise).sum().clamp(min=tiny)).sqrt()
    return (vectors * weights.double().sqrt()[:, None]).T.to(weights.dtype)


def _slabs(
    shape: tuple[int, ...], window: tuple[int, ...], bytes_per_pixel: int, memory_bytes: int
) -> Iterator[tuple[int, int, int, int]]:
    """Rows `[first, last)` to compute and rows `[start, stop)` that they see, until all are done.

    A slab is a grid of its own whose windows shift inward at its ends. They shift just as in the whole,
    because a slab ends where the windows of its first and last row do.
    """
    length, size = shape[0], window[0]
    row = bytes_per_pixel * math.prod(shape[1:])
    rows = memory_bytes // row
    if rows < min(2 * size, length):
        raise InvalidProblem(
            f"memory_bytes must hold at least {min(2 * size, length)} rows of {row:,} bytes (two search windows), "
            f"got {memory_bytes:,}; allow more, or use a smaller patch_distance or fewer components"
        )
    step = length if rows >= length else rows - size + 1
    for first in range(0, length, step):
        last = min(first + step, length)
        start, end = (min(max(i - size // 2, 0), length - size) for i in (first, last - 1))
        yield first, last, start, end + size


def _attend(
    features: Features,
    pixels: Tensor,
    start: int,
    window: tuple[int, ...],
    sigma: float,
    h: float,
    backend: str | None,
) -> Tensor:
    """Non-local means of a slab `[C, *S]` that begins at row `start`, its end included."""
    f = features.rows(start, start + pixels.shape[1]) * (1 / h)  # [*S, K]
    square = f.square().sum(dim=-1)  # [*S]
    query = f.new_zeros(1, *f.shape[:-1], 1, features.head_dim)
    key = torch.zeros_like(query)
    count = f.shape[-1]
    query[0, ..., 0, :count] = f * 2**0.5
    key[0, ..., 0, :count] = query[0, ..., 0, :count]
    query[0, ..., 0, count] = 1.0
    key[0, ..., 0, count] = -square
    value = pixels.movedim(0, -1)[None, ..., None, :].contiguous()  # [1, *S, 1, C]
    out, lse = attention_with_lse(query, key, value, kernel_size=window, scale=1.0, backend=backend)
    # The centre's score is |f|^2, so its share of the mean is known; take out all of it but what noise leaves.
    excess = -math.expm1(-2 * sigma**2 / h**2)
    share = excess * torch.exp((square - lse[0, ..., 0]).clamp(max=0.0))
    mean = (out[0, ..., 0, :] - share[..., None] * value[0, ..., 0, :]) / (1 - share[..., None])
    return mean.movedim(-1, 0)


def _pixels(image: Any, channel_axis: int | None) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The picture as float32 `[C, *S]`, and the way back to what it was."""
    is_tensor = isinstance(image, Tensor)
    if not is_tensor:
        import numpy as np

        array: Any = np.asarray(image)
        if array.dtype.kind not in "biuf":
            raise InvalidProblem(f"image must hold real numbers, got an array of {array.dtype}")
        # Torch lacks most unsigned operations, and wants native byte order and positive strides.
        top = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else 1
        tensor = torch.from_numpy(np.asarray(array / np.float64(top), dtype=np.float32, order="C"))
    elif image.dtype.is_floating_point:
        tensor = image.detach().to(torch.float32)
    elif image.dtype.is_complex:
        raise InvalidProblem(f"image must hold real numbers, got a tensor of {image.dtype}")
    else:
        top = 1 if image.dtype == torch.bool else torch.iinfo(image.dtype).max
        tensor = (image.double() / top).float()
    rank = tensor.ndim - (channel_axis is not None)
    if not 1 <= rank <= 3:
        hint = "" if tensor.ndim != 4 else "; name the axis of colours with channel_axis"
        raise InvalidProblem(f"image must have 1 to 3 axes beside channels, got shape {tuple(tensor.shape)}{hint}")
    if channel_axis is not None and not (is_integer(channel_axis) and -tensor.ndim <= channel_axis < tensor.ndim):
        raise InvalidProblem(f"channel_axis must name one of {tensor.ndim} axes, got {channel_axis!r}")
    if not tensor.numel():
        raise InvalidProblem(f"image must hold at least one pixel, got shape {tuple(tensor.shape)}")
    if not bool(tensor.isfinite().all()):
        raise InvalidProblem("image must be finite, got NaN or infinity in it; replace those pixels first")

    def restore(pixels: Tensor) -> Any:
        result = pixels[0] if channel_axis is None else pixels.movedim(0, channel_axis)
        result = result.clone(memory_format=torch.contiguous_format)
        return result if is_tensor else result.numpy()

    return (tensor[None] if channel_axis is None else tensor.movedim(channel_axis, 0)).contiguous(), restore


def _odd(patch_size: int | Sequence[int] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    if patch_size is None:
        return tuple(min(3 if len(shape) == 3 else 5, 2 * length - 1) for length in shape)
    patch = canonical(patch_size, len(shape), "patch_size")
    for side, length in zip(patch, shape, strict=True):
        if side < 1 or side % 2 == 0:
            raise InvalidProblem(f"patch_size must be odd, so that a patch has a centre, got {patch_size}")
        if side // 2 >= length:
            raise InvalidProblem(
                f"patch_size must be less than twice the image's sides, which are {shape}, got {patch_size}; "
                f"one number per axis allows 1 along thin axes"
            )
    return patch


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise InvalidProblem(f"{name} must be a finite number that is not negative, got {value!r}")
    return number
