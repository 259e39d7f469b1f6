"""Device helpers of `augment`: the colours of a block of pixels, as red, green and blue in float32.

They are whole numbers from 0 to 255 between the steps, cut off where torchvision cuts them off. Numbers of steps are
positions in PHOTOMETRIC, and columns those of COLUMNS, in fastssl/ops/photometric.py.
"""

import triton
import triton.language as tl

JITTER, GRAYSCALE, BLUR, SOLARIZE, ERASING = (tl.constexpr(number) for number in range(5))
BRIGHTNESS, CONTRAST, SATURATION, HUE = (tl.constexpr(part) for part in range(4))  # parts of the jitter and columns
ORDER, GRAY, SIGMA, THRESHOLD, TOP, LEFT, HEIGHT, WIDTH = (tl.constexpr(column) for column in range(4, 12))
COLUMNS = tl.constexpr(12)


@triton.jit
def load_pixels(place: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Red, green and blue of the pixels at `place`, which are of 8 bits."""
    r = tl.load(place, mask=inside, other=0)
    g = tl.load(place + 1, mask=inside, other=0)
    b = tl.load(place + 2, mask=inside, other=0)
    # From 8 bits at once takes a slow unit.
    return r.to(tl.int32).to(tl.float32), g.to(tl.int32).to(tl.float32), b.to(tl.int32).to(tl.float32)


@triton.jit
def store_pixels(place: tl.tensor, r: tl.tensor, g: tl.tensor, b: tl.tensor, inside: tl.tensor) -> None:
    """Write red, green and blue to the pixels at `place`, cast to what these are."""
    tl.store(place, r.to(place.dtype.element_ty), mask=inside)
    tl.store(place + 1, g.to(place.dtype.element_ty), mask=inside)
    tl.store(place + 2, b.to(place.dtype.element_ty), mask=inside)


@triton.jit
def luma(r: tl.tensor, g: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Brightness as the eye sees it, torchvision's weights."""
    return tl.floor(0.2989 * r + 0.587 * g + 0.114 * b)


@triton.jit
def cut(x: tl.tensor) -> tl.tensor:
    """To whole numbers in 0…255."""
    return tl.floor(tl.minimum(tl.maximum(x, 0.0), 255.0))


@triton.jit
def blend(x: tl.tensor, other: tl.tensor, factor: tl.tensor) -> tl.tensor:
    """What PIL and torchvision call so; `other` is what a factor of 0 gives."""
    return cut(x * factor + other * (1.0 - factor))


@triton.jit
def turned(r: tl.tensor, g: tl.tensor, b: tl.tensor, turn: tl.tensor) -> tl.tensor:
    """The hue turned in HSV by `turn` of a circle; value and chroma stay."""
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    reds, greens = value == r, value == g
    across = tl.where(reds, g - b, tl.where(greens, b - r, r - g))
    sector = tl.where(reds, 0.0, tl.where(greens, 2.0, 4.0)) + across / tl.where(chroma > 0, chroma, 1.0)
    hue = sector + 6.0 * turn
    hue -= 6.0 * tl.floor(hue * (1.0 / 6))
    return channel(hue + 5.0, value, chroma), channel(hue + 3.0, value, chroma), channel(hue + 1.0, value, chroma)


@triton.jit
def channel(k: tl.tensor, value: tl.tensor, chroma: tl.tensor) -> tl.tensor:
    """HSV to RGB in one formula, V - C·max(0, min(k, 4-k, 1)) with k mod 6, of k in 0…12."""
    k = tl.where(k >= 6.0, k - 6.0, k)
    share = tl.minimum(tl.maximum(2.0 - tl.abs(k - 2.0), 0.0), 1.0)
    return tl.floor((value - chroma * share) * (255.999 / 255))  # torchvision's way from 0…1 to 0…255


@triton.jit
def jitter_order(row: tl.tensor) -> tl.tensor:
    """The parts of the jitter in this image's order, four bits each, and at which position contrast comes.

    Orders are numbered as itertools.permutations lists them.
    """
    order = tl.minimum(tl.maximum(tl.load(row + ORDER).to(tl.int32), 0), 23)
    remaining = order * 0 + 0x3210
    sequence = order * 0
    contrast = order * 0
    for position in tl.static_range(4):
        shift = order // (6 if position == 0 else 2 if position == 1 else 1) % (4 - position) * 4
        part = (remaining >> shift) & 15
        contrast = tl.where(part == CONTRAST, position, contrast)
        sequence |= part << (4 * position)
        below = (1 << shift) - 1
        remaining = (remaining & below) | ((remaining >> 4) & ~below)
    return sequence, contrast


@triton.jit
def jittered(
    r: tl.tensor, g: tl.tensor, b: tl.tensor, row: tl.tensor, sequence: tl.tensor, parts: tl.tensor, mean: tl.tensor
) -> tl.tensor:
    """The first `parts` of the four parts in `sequence`, without those that are neutral."""
    for position in range(parts):
        part = (sequence >> (4 * position)) & 15
        factor = tl.load(row + part)
        if part == BRIGHTNESS and factor != 1.0:
            r, g, b = cut(r * factor), cut(g * factor), cut(b * factor)
        if part == CONTRAST and factor != 1.0:
            r, g, b = blend(r, mean, factor), blend(g, mean, factor), blend(b, mean, factor)
        if part == SATURATION and factor != 1.0:
            gray = luma(r, g, b)
            r, g, b = blend(r, gray, factor), blend(g, gray, factor), blend(b, gray, factor)
        if part == HUE and factor != 0.0:
            r, g, b = turned(r, g, b, factor)
    return r, g, b


@triton.jit
def stepped(
    r: tl.tensor,
    g: tl.tensor,
    b: tl.tensor,
    row: tl.tensor,  # parameters of the image
    pixel: tl.tensor,  # numbers of the pixels in the image
    width: tl.tensor,  # of the image
    mean: tl.tensor,  # luma of the image where contrast is reached
    STEPS: tl.constexpr,
) -> tl.tensor:
    """All steps of one pixel by itself."""
    for at in tl.static_range(len(STEPS)):
        if STEPS[at] == JITTER:
            sequence, _ = jitter_order(row)
            r, g, b = jittered(r, g, b, row, sequence, 4, mean)
        elif STEPS[at] == GRAYSCALE:
            if tl.load(row + GRAY) > 0:
                r = luma(r, g, b)
                g, b = r, r
        elif STEPS[at] == SOLARIZE:
            threshold = tl.load(row + THRESHOLD)
            if threshold <= 1:
                r = solarized(r, threshold)
                g = solarized(g, threshold)
                b = solarized(b, threshold)
        elif STEPS[at] == ERASING:
            if tl.load(row + HEIGHT) > 0:
                inside = erased(pixel, row, width)
                r, g, b = tl.where(inside, 0.0, r), tl.where(inside, 0.0, g), tl.where(inside, 0.0, b)
    return r, g, b


@triton.jit
def solarized(x: tl.tensor, threshold: tl.tensor) -> tl.tensor:
    """Inverted from the threshold on."""
    return tl.where(x >= 255.0 * threshold, 255.0 - x, x)


@triton.jit
def erased(pixel: tl.tensor, row: tl.tensor, width: tl.tensor) -> tl.tensor:
    """Which pixels lie in the rectangle to erase."""
    y, x = (pixel // width).to(tl.float32), (pixel % width).to(tl.float32)
    top, left = tl.load(row + TOP), tl.load(row + LEFT)
    bottom, right = top + tl.load(row + HEIGHT), left + tl.load(row + WIDTH)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)
