"""Image formation and anatomy of the synthetic phantoms: CT, MR and ultrasound, each with its own physics of noise.

CT is a windowed Hounsfield-unit phantom with correlated Gaussian noise and rings, MR a Rician magnitude image under a
bias field, ultrasound Rayleigh speckle in sector geometry with attenuation and log compression. They are drawings to
try out training code on, not anatomy.

Coordinates: x to the image's right, y down, both -1 to 1 over the field of view; other lengths are in the same unit.
A mask is a tissue's coverage in [0, 1]; arrays are float32 (size, size) where nothing else is said.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from scipy.ndimage import gaussian_filter, map_coordinates, uniform_filter

Array = np.ndarray
Pair = tuple[float, float]

EDGE = 0.03  # width of a tissue boundary: the scanner's point spread


def smooth_field(rng: Generator, size: int, cells: int) -> Array:
    """Random field of unit variance, smooth over 1/cells of the image's width."""
    # The coarse grid does not depend on size: an image keeps its anatomy at every resolution.
    coarse = rng.standard_normal((cells + 1, cells + 1), dtype=np.float32)
    position = (np.arange(size, dtype=np.float32) + 0.5) * (cells / size)
    weight = np.exp(-2 * (position[:, None] - np.arange(cells + 1, dtype=np.float32)) ** 2)
    weight /= np.sqrt((weight**2).sum(axis=1, keepdims=True))
    return weight @ coarse @ weight.T  # (size, cells + 1), (cells + 1, cells + 1), (cells + 1, size)


def patient_grid(rng: Generator, size: int) -> tuple[Array, Array]:
    """x and y of a patient who lies shifted, rotated, scaled and deformed in the scanner."""
    axis = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
    column, row = np.meshgrid(axis - rng.normal(0, 0.04), axis - rng.normal(0, 0.04))
    angle, zoom, aspect = rng.normal(0, 0.1), rng.uniform(0.9, 1.08), rng.uniform(0.95, 1.05)
    x = (math.cos(angle) * column + math.sin(angle) * row) / (zoom * aspect)
    y = (math.cos(angle) * row - math.sin(angle) * column) / zoom
    return x + 0.02 * smooth_field(rng, size, 3), y + 0.02 * smooth_field(rng, size, 3)


def ellipse(x: Array, y: Array, centre: Pair, axes: Pair, angle: float = 0, edge: float = EDGE) -> Array:
    """Mask of an ellipse with semi-axes (axes), the first turned by angle radians from x."""
    u, v, cosine, sine = x - centre[0], y - centre[1], math.cos(angle), math.sin(angle)
    along = u * (cosine / axes[0]) + v * (sine / axes[0])
    across = v * (cosine / axes[1]) - u * (sine / axes[1])
    # Half of 1 - r**2 is the distance from the outline to first order, and cheaper than a root.
    return np.clip((1 - along * along - across * across) * (min(axes) / (2 * edge)) + 0.5, 0, 1)


def mass(
    x: Array,
    y: Array,
    centre: Pair,
    radius: float,
    rng: Generator,
    waves: Sequence[int] = (2, 3, 5),
    depth: float = 0.08,
    edge: float = EDGE,
) -> Array:
    """Mask of a mass whose outline waves: low frequencies (waves) lobulate it, high ones spiculate it."""
    u, v = x - centre[0], y - centre[1]
    theta, outline = np.arctan2(v, u), 1.0
    for wave in waves:
        outline = outline + depth * np.cos(wave * theta + rng.uniform(0, 2 * math.pi))
    return np.clip((radius * outline - np.sqrt(u * u + v * v)) / edge + 0.5, 0, 1)


def paint(image: Array, mask: Array, value: float | Array) -> None:
    """Blend value into image in place where mask says so (partial volume)."""
    image += mask * (value - image)


def ct_noise(rng: Generator, size: int, sigma: float) -> Array:
    """Zero-mean Gaussian noise of standard deviation sigma, correlated between neighbours."""
    white = rng.standard_normal((size, size), dtype=np.float32)
    # Filtered back-projection suppresses the lowest frequencies, its kernel the highest.
    field = gaussian_filter(white, 0.6) - 0.7 * uniform_filter(white, 5)
    return field * (sigma / float(field.std()))


def ct_scan(hounsfield: Array, rng: Generator, sigma: float, level: float, width: float) -> Array:
    """CT image of a phantom in Hounsfield units: noise of sigma, the same at every signal; the window on 0..1."""
    scanned = hounsfield + ct_noise(rng, len(hounsfield), sigma)
    if rng.random() < 0.25:  # a few detector elements out of calibration draw rings
        elements = rng.normal(0, 1.5 * sigma, 48) * (rng.random(48) < 0.15)
        axis = np.linspace(-1, 1, len(hounsfield))
        radius = np.hypot(axis[:, None], axis[None, :])  # (size, 1), (1, size) -> (size, size)
        scanned += np.interp(radius, np.linspace(0, 1, 48), elements)
    return (scanned - level) / width + 0.5


def rician(signal: Array, sigma: float, rng: Generator) -> Array:
    """MR magnitude of signal (any shape) with Gaussian noise of sigma in both channels.

    Air becomes Rayleigh with mean sigma * sqrt(pi / 2); well above sigma the noise stays Gaussian.
    """
    noise = sigma * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    return np.hypot(signal + noise[0], noise[1])


def speckle(amplitude: Array, rng: Generator) -> Array:
    """Ultrasound envelope, (depth, line), of amplitude, the root-mean-square echo.

    Rayleigh and multiplicative: the standard deviation is 0.52 times the mean everywhere.
    """
    echo = rng.standard_normal((2, *amplitude.shape), dtype=np.float32)
    echo = gaussian_filter(echo, (0, 0.8, 1.4))  # the beam is wider than the pulse is long
    return amplitude * np.hypot(echo[0], echo[1]) / math.sqrt(2 * echo.var())


def head(x: Array, y: Array, rng: Generator, **values: float) -> tuple[Array, Array, Array]:
    """Axial slice through the lateral ventricles, and the masks of the brain and of its white matter.

    values are the signals of air, scalp, bone, fluid, grey, white and nuclei (the deep grey matter).
    """
    skull, a, b = rng.uniform(0.04, 0.06), rng.uniform(0.62, 0.68), rng.uniform(0.76, 0.82)
    image = np.full_like(x, values["air"])
    paint(image, ellipse(x, y, (0, 0), (a + skull + 0.07, b + skull + 0.07)), values["scalp"])
    paint(image, ellipse(x, y, (0, 0), (a + skull, b + skull)), values["bone"])
    paint(image, ellipse(x, y, (0, 0), (a, b)), values["fluid"])
    # Sulci run along the zero crossings of a fine field, near the surface only.
    sulci = np.clip(1.3 - 4 * np.abs(smooth_field(rng, len(x), 13)), 0, 1)
    sulci *= 1 - ellipse(x, y, (0, 0), (a - 0.16, b - 0.16), edge=0.08)
    fissure = ellipse(x, y, (0, 0), (0.015, b)) * (np.abs(y) > rng.uniform(0.38, 0.48))
    brain = ellipse(x, y, (0, 0), (a - 0.03, b - 0.03)) * (1 - rng.uniform(0.3, 0.8) * sulci)
    brain *= 1 - 0.6 * fissure
    paint(image, brain, values["grey"])
    fold, wide, long = smooth_field(rng, len(x), 10), rng.uniform(0.7, 1.4), rng.uniform(0.85, 1.15)
    ventricles = ellipse(x, y, (0, 0.03), (0.012, 0.1))  # the third; then the lateral ones
    hemispheres = np.zeros_like(x)
    for u in (x, -x):  # each hemisphere mirrors the other
        half = ellipse(u + 0.03 * fold, y, (a / 2, 0), (a / 2 - 0.07, b - 0.16), edge=0.06)
        front = ellipse(u, y, (0.09, -0.22), (0.045 * wide, 0.15 * long), -0.35)
        back = ellipse(u, y, (0.18, 0.27), (0.050 * wide, 0.18 * long), -0.40)
        paint(image, half, values["white"])
        paint(image, ellipse(u, y, (0.2, -0.02), (0.08, 0.16), -0.35, edge=0.06), values["nuclei"])
        hemispheres = np.maximum(hemispheres, half)
        ventricles = np.maximum(ventricles, np.maximum(front, back))
    paint(image, ventricles, values["fluid"])
    return image, brain * (1 - ventricles), hemispheres * (1 - ventricles)


def ct_head(finding: str, rng: Generator, size: int) -> Array:
    """Unenhanced CT in a brain window, black at 0 and white at 1."""
    x, y = patient_grid(rng, size)
    hounsfield, brain, _ = head(x, y, rng, air=-1000, scalp=25, bone=700, fluid=8, grey=38, white=29, nuclei=37)
    if rng.random() < 0.4:  # calcified pineal gland or choroid plexus, a normal bright spot
        paint(hounsfield, ellipse(x, y, (rng.uniform(-0.2, 0.2), 0.2), (0.03, 0.03)), rng.uniform(60, 90))
    u = x if rng.random() < 0.5 else -x  # either hemisphere
    if finding == "haemorrhage":
        centre, r = (rng.uniform(0.18, 0.42), rng.uniform(-0.42, 0.42)), rng.uniform(0.07, 0.2)
        paint(hounsfield, 0.7 * brain * mass(u, y, centre, 1.5 * r, rng, edge=0.1), 20)  # oedema
        paint(hounsfield, mass(u, y, centre, r, rng, edge=0.05), rng.uniform(50, 72))
    elif finding == "infarct":  # a wedge of grey and white matter, its base on the surface
        theta = np.arctan2(y - 0.05, u - 0.08) - rng.uniform(-0.9, 0.9) + 0.15 * smooth_field(rng, size, 6)
        wedge = np.clip((rng.uniform(0.35, 0.7) - np.abs(theta)) / 0.12, 0, 1)
        paint(hounsfield, rng.uniform(0.6, 1.0) * wedge * brain * (u > 0.15), 17)
    return ct_scan(hounsfield, rng, sigma=rng.uniform(2, 4), level=rng.uniform(32, 40), width=80)


def mr_brain(finding: str, rng: Generator, size: int) -> Array:
    """FLAIR image (dark fluid, bright oedema) with a bias field, black at 0 and white at 1."""
    x, y = patient_grid(rng, size)
    signal, _, white = head(x, y, rng, air=0, scalp=0.75, bone=0.06, fluid=0.1, grey=0.52, white=0.4, nuclei=0.48)
    if finding == "tumour":
        u, r = x if rng.random() < 0.5 else -x, rng.uniform(0.07, 0.18)
        centre = (rng.uniform(0.2, 0.42), rng.uniform(-0.45, 0.45))
        oedema = mass(u, y, centre, r * rng.uniform(1.2, 1.9), rng, (2, 3, 4), 0.15, edge=0.1)
        paint(signal, oedema * white, rng.uniform(0.55, 0.75))
        paint(signal, mass(u, y, centre, r, rng), rng.uniform(0.55, 0.85))
        paint(signal, mass(u, y, centre, r * rng.uniform(0.2, 0.6), rng, (2, 3)), 0.3)  # necrosis
    # Small bright spots beside the ventricles: many in sclerosis, a few in normal ageing.
    for _ in range(rng.integers(5, 12) if finding == "sclerosis" else rng.integers(0, 3)):
        u = x if rng.random() < 0.5 else -x
        centre = (rng.uniform(0.16, 0.36), rng.uniform(-0.45, 0.5))
        axes = (rng.uniform(0.04, 0.08), rng.uniform(0.03, 0.045))  # long axis off the ventricle
        paint(signal, ellipse(u, y, centre, axes) * white, rng.uniform(0.6, 0.9))
    signal *= rng.uniform(0.8, 1.2) * np.exp(0.12 * smooth_field(rng, size, 2))
    return rician(signal, rng.uniform(0.02, 0.04), rng)


def ct_abdomen(finding: str, rng: Generator, size: int) -> Array:
    """Contrast-enhanced CT at the level of liver and kidneys, black at 0 and white at 1."""
    x, y = patient_grid(rng, size)
    a, b, fat = rng.uniform(0.86, 0.94), rng.uniform(0.64, 0.72), rng.uniform(0.04, 0.12)
    cavity = ellipse(x, y, (0, -0.02), (a - fat - 0.06, b - fat - 0.06))
    hounsfield = np.full_like(x, -1000)
    paint(hounsfield, ellipse(x, y, (0, 0), (a, b)), -100)  # subcutaneous fat
    paint(hounsfield, ellipse(x, y, (0, 0), (a - fat, b - fat)), 55)  # muscle
    paint(hounsfield, cavity, -90)
    for _ in range(6):  # bowel loops
        centre, axes = (rng.uniform(-0.1, 0.5), rng.uniform(-0.2, 0.15)), (rng.uniform(0.08, 0.14), 0.075)
        paint(hounsfield, ellipse(x, y, centre, axes, rng.uniform(0, 3)), rng.uniform(20, 70))
    liver, liver_hu = cavity * ellipse(x, y, (-0.44, -0.12), (0.44, 0.38), 0.5), rng.uniform(95, 120)
    vessels = np.clip(1 - 9 * np.abs(smooth_field(rng, size, 5)), 0, 1)
    paint(hounsfield, liver, liver_hu + 35 * vessels)
    for u in (x, -x):
        low = rng.uniform(-0.03, 0.03)
        paint(hounsfield, ellipse(u, y, (0.36, 0.25 + low), (0.15, 0.10), -0.7), 170)  # kidney
        paint(hounsfield, ellipse(u, y, (0.32, 0.24 + low), (0.07, 0.03), -0.7), -20)  # its fat
        paint(hounsfield, ellipse(u, y, (0.2, 0.42), (0.15, 0.1)), 55)  # muscle beside the spine
    for value, centre, axes in (
        (35, (0.25, -0.32), (0.2, 0.11)),  # stomach, with gas on top
        (-900, (0.24, -0.38), (rng.uniform(0.04, 0.12), 0.035)),
        (rng.uniform(100, 130), (0.62, 0.05), (0.11, 0.24)),  # spleen
        (140, (-0.1, 0.1), (0.065, 0.05)),  # inferior vena cava
        (190, (0.06, 0.1), (0.055, 0.055)),  # aorta
        (420, (0, 0.27), (0.14, 0.11)),  # vertebra: cortex, marrow, spinous process, canal
        (190, (0, 0.27), (0.115, 0.085)),
        (420, (0, 0.45), (0.035, 0.1)),
        (30, (0, 0.405), (0.05, 0.035)),
    ):
        paint(hounsfield, ellipse(x, y, centre, axes), value)
    if rng.random() < 0.5:  # the gallbladder looks like a cyst but lies at the liver's edge
        paint(hounsfield, ellipse(x, y, (-0.12, -0.16), (rng.uniform(0.06, 0.11), 0.065), 0.8), 10)
    for _ in range(0 if finding == "normal" else rng.integers(1, 5)):
        centre, r = (rng.uniform(-0.64, -0.3), rng.uniform(-0.3, 0.08)), rng.uniform(0.07, 0.15)
        if finding == "cyst":  # water, sharply bounded
            paint(hounsfield, liver * ellipse(x, y, centre, (r, 0.9 * r)), rng.uniform(0, 25))
        else:  # solid and ill-defined
            solid = mass(x, y, centre, 1.2 * r, rng, depth=0.12, edge=0.08)
            paint(hounsfield, liver * solid, liver_hu - rng.uniform(50, 85))
    return ct_scan(hounsfield, rng, sigma=rng.uniform(10, 20), level=rng.uniform(35, 60), width=400)


def us_breast(finding: str, rng: Generator, size: int) -> Array:
    """B-mode image of a curved array over skin, fat, gland and muscle, black at 0 and white at 1."""
    half_angle, near, far = rng.uniform(0.22, 0.28), 1.8, 3.8  # sector about a virtual apex
    angle = np.linspace(-half_angle, half_angle, size, dtype=np.float32)
    depth = np.linspace(0, far - near, size, dtype=np.float32)
    x = (near + depth)[:, None] * np.sin(angle)  # (depth, 1), (line,) -> (depth, line)
    y = (near + depth)[:, None] * np.cos(angle) - near
    layer = y + 0.05 * smooth_field(rng, size, 3)
    gland, fascia = rng.uniform(0.3, 0.6), rng.uniform(1.3, 1.55)

    def between(top: float, bottom: float) -> Array:
        return np.clip(np.minimum(layer - top, bottom - layer) / EDGE + 0.5, 0, 1)

    # Echo in decibels. Fat: dark lobules between bright septa.
    echo = -26 + 10 * np.clip(1.2 - 6 * np.abs(smooth_field(rng, size, 5)), 0, 1)
    parenchyma = -13 + 2.5 * smooth_field(rng, size, 8)
    paint(parenchyma, np.clip(smooth_field(rng, size, 6) - 0.6, 0, 1), -26)  # islands of fat
    paint(echo, between(-1, 0.09), -8)  # skin
    paint(echo, between(gland, fascia - 0.12), parenchyma)
    paint(echo, between(fascia, 3), -22 + 4 * np.cos(60 * layer))  # striated pectoral muscle
    paint(echo, between(fascia - 0.02, fascia + 0.02), -6)
    loss = np.full_like(x, 8)  # attenuation, decibels per unit of depth
    centre, r = (rng.uniform(-0.35, 0.35), rng.uniform(gland + 0.1, 1.1)), rng.uniform(0.1, 0.24)
    if finding == "cyst":  # smooth, nearly empty of echoes, brighter behind
        cyst = ellipse(x, y, centre, (1.2 * r, r), rng.normal(0, 0.15))
        paint(echo, cyst, rng.uniform(-60, -36))
        paint(loss, cyst, rng.uniform(-8, 4))
    elif finding == "carcinoma":  # dark, spiculated, often a shadow behind
        tumour = mass(x, y, centre, r, rng, rng.permutation(np.arange(2, 11)).tolist()[:5], 0.07, edge=0.06)
        paint(echo, tumour, rng.uniform(-42, -30))
        paint(loss, tumour, rng.uniform(8, 40))
    # Time-gain compensation restores the average loss of depth only.
    echo += rng.uniform(7, 8) * depth[:, None] - np.cumsum(loss, axis=0) * (far - near) / size
    envelope = speckle(10 ** ((echo + rng.uniform(-4, 4)) / 20), rng)
    compressed = 1 + 20 * np.log10(envelope + 1e-3) / rng.uniform(50, 60)  # dynamic range
    return scan_convert(compressed, half_angle, near, far)


def scan_convert(lines: Array, half_angle: float, near: float, far: float) -> Array:
    """Sector image of lines, (depth, line), at radii near to far about the apex; 0 outside."""
    size = len(lines)
    axis = (np.arange(size, dtype=np.float32) + 0.5) * 2.1 / size
    down, across = axis[:, None] - 0.08 + near, axis[None, :] - 1.05
    radius, theta = np.hypot(down, across), np.arctan2(across, down)
    sector = np.stack([(radius - near) / (far - near), (theta / half_angle + 1) / 2])
    return map_coordinates(lines, sector * (size - 1), order=1)  # (depth, line) -> (y, x)


PAINTERS = {"ct-abdomen": ct_abdomen, "ct-head": ct_head, "mr-brain": mr_brain, "us-breast": us_breast}
