"""Synthetic CT, MR and ultrasound images: drawings to test training code on, not anatomical models.

Each modality has its own noise: CT has Gaussian noise in Hounsfield units, MR is a Rician magnitude image, ultrasound
has multiplicative speckle below a logarithm.

Coordinates: x points right and y points down, both from -1 to 1 across the image; lengths use the same unit.
A mask is the coverage of a tissue, 0 to 1. Arrays are float32 (size, size). No draw of the anatomy depends on the size,
so that an image shows the same patient at every resolution.
"""

import math

import numpy as np
from numpy.random import Generator
from scipy.ndimage import gaussian_filter

Array = np.ndarray
Pair = tuple[float, float]

EDGE = 0.03  # width of a tissue boundary: the scanner's point spread


def smooth_field(rng: Generator, size: int, cells: int) -> Array:
    """Random field of unit variance, smooth over 1/cells of the image's width."""
    coarse = rng.standard_normal((cells + 1, cells + 1), dtype=np.float32)
    position = (np.arange(size, dtype=np.float32) + 0.5) * (cells / size)
    weight = np.exp(-2 * (position[:, None] - np.arange(cells + 1, dtype=np.float32)) ** 2)
    weight /= np.sqrt((weight**2).sum(axis=1, keepdims=True))
    return weight @ coarse @ weight.T  # (size, cells + 1), (cells + 1, cells + 1), (cells + 1, size)


def patient_grid(rng: Generator, size: int) -> tuple[Array, Array]:
    """Coordinates x and y of a patient who lies shifted, rotated, scaled and deformed in the scanner."""
    axis = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
    column, row = np.meshgrid(axis - rng.normal(0, 0.04), axis - rng.normal(0, 0.04))
    angle, zoom = rng.normal(0, 0.1), rng.uniform(0.9, 1.08)
    x = (math.cos(angle) * column + math.sin(angle) * row) / zoom
    y = (math.cos(angle) * row - math.sin(angle) * column) / zoom
    return x + 0.02 * smooth_field(rng, size, 3), y + 0.02 * smooth_field(rng, size, 3)


def ellipse(x: Array, y: Array, centre: Pair, axes: Pair, angle: float = 0) -> Array:
    """Mask of an ellipse with the given semi-axes, the first turned by angle radians from x."""
    u, v, cosine, sine = x - centre[0], y - centre[1], math.cos(angle), math.sin(angle)
    along, across = (cosine * u + sine * v) / axes[0], (cosine * v - sine * u) / axes[1]
    # Half of 1 - r**2 is the distance from the outline, to first order.
    return np.clip((1 - along**2 - across**2) * (min(axes) / (2 * EDGE)) + 0.5, 0, 1)


def mass(x: Array, y: Array, centre: Pair, radius: float, rng: Generator, edge: float = EDGE, spiky: int = 1) -> Array:
    """Mask of a lesion with a wavy outline of 2, 3 and 5 waves, times spiky."""
    u, v = x - centre[0], y - centre[1]
    angle, outline = spiky * np.arctan2(v, u), 1
    for waves in (2, 3, 5):
        outline = outline + 0.08 * np.cos(waves * angle + rng.uniform(0, 2 * math.pi))
    return np.clip((radius * outline - np.hypot(u, v)) / edge + 0.5, 0, 1)


def paint(image: Array, mask: Array, value: float | Array) -> None:
    """Blend value into the image, in place, where the mask covers it."""
    image += mask * (value - image)


def ct_scan(hounsfield: Array, rng: Generator, sigma: float, level: float, width: float) -> Array:
    """CT image: Gaussian noise of standard deviation sigma, correlated between neighbours; 0 to 1 is the window."""
    noise = gaussian_filter(rng.standard_normal(hounsfield.shape, dtype=np.float32), 0.6)
    return (hounsfield + noise * (sigma / noise.std()) - level) / width + 0.5


def mr_scan(signal: Array, rng: Generator, sigma: float) -> Array:
    """MR magnitude image: Gaussian noise of sigma in both channels, so that air has a positive mean."""
    noise = sigma * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    return np.hypot(signal + noise[0], noise[1])


def us_scan(echo: Array, rng: Generator) -> Array:
    """Ultrasound image of echoes in decibels: Rayleigh speckle, wider across the beam than along it, and a log."""
    waves = gaussian_filter(rng.standard_normal((2, *echo.shape), dtype=np.float32), (0, 0.8, 1.4))
    envelope = 10 ** (echo / 20) * np.hypot(waves[0], waves[1]) / math.sqrt(2 * waves.var())
    return 1 + 20 * np.log10(envelope + 1e-3) / rng.uniform(50, 60)


def head(x: Array, y: Array, rng: Generator, **signals: float) -> tuple[Array, Array]:
    """Axial slice through the lateral ventricles, and the mask of the brain; signals: by tissue."""
    a, b, wide = rng.uniform(0.62, 0.68), rng.uniform(0.76, 0.82), rng.uniform(0.7, 1.4)
    image, brain = np.full_like(x, signals["air"]), ellipse(x, y, (0, 0), (a - 0.03, b - 0.03))
    for tissue, margin in (("scalp", 0.12), ("bone", 0.05), ("fluid", 0), ("grey", -0.03)):
        paint(image, ellipse(x, y, (0, 0), (a + margin, b + margin)), signals[tissue])
    paint(image, 0.5 * brain * np.clip(1 - 4 * np.abs(smooth_field(rng, len(x), 13)), 0, 1), signals["fluid"])  # sulci
    for u in (x, -x):  # both hemispheres
        paint(image, ellipse(u, y, (a / 2, 0), (a / 2 - 0.07, b - 0.16)), signals["white"])
        ventricle = ellipse(u, y, (0.12, 0), (0.05 * wide, 0.3), -0.2)
        paint(image, ventricle, signals["fluid"])
        brain = brain * (1 - ventricle)
    return image, brain


def in_either_hemisphere(rng: Generator) -> Pair:
    """A random point of the white matter or the cortex."""
    return rng.choice((-1, 1)) * rng.uniform(0.16, 0.42), rng.uniform(-0.45, 0.45)


def ct_head(finding: str, rng: Generator, size: int) -> Array:
    """CT without contrast in a brain window: haemorrhages are bright, infarcts faintly dark."""
    x, y = patient_grid(rng, size)
    hounsfield, brain = head(x, y, rng, air=-1000, scalp=25, bone=700, fluid=8, grey=38, white=29)
    centre = in_either_hemisphere(rng)
    if finding == "haemorrhage":
        paint(hounsfield, mass(x, y, centre, rng.uniform(0.07, 0.2), rng, 0.05), rng.uniform(50, 72))
    elif finding == "infarct":
        paint(hounsfield, brain * mass(x, y, centre, rng.uniform(0.15, 0.3), rng, 0.1), rng.uniform(17, 25))
    return ct_scan(hounsfield, rng, sigma=rng.uniform(2, 4), level=rng.uniform(32, 40), width=80)


def mr_brain(finding: str, rng: Generator, size: int) -> Array:
    """FLAIR MR image with a bias field: a tumour is one bright mass, sclerosis many small bright spots."""
    x, y = patient_grid(rng, size)
    signal, brain = head(x, y, rng, air=0, scalp=0.75, bone=0.06, fluid=0.1, grey=0.52, white=0.4)
    if finding == "tumour":
        centre, r = in_either_hemisphere(rng), rng.uniform(0.07, 0.18)
        paint(signal, brain * mass(x, y, centre, 1.5 * r, rng, 0.1), rng.uniform(0.55, 0.75))  # oedema
        paint(signal, mass(x, y, centre, r, rng), rng.uniform(0.55, 0.85))
        paint(signal, mass(x, y, centre, r * rng.uniform(0.2, 0.6), rng), 0.3)  # necrosis
    for _ in range(rng.integers(5, 12) if finding == "sclerosis" else rng.integers(0, 3)):  # few are normal
        axes = (rng.uniform(0.04, 0.08), rng.uniform(0.03, 0.045))
        paint(signal, brain * ellipse(x, y, in_either_hemisphere(rng), axes), rng.uniform(0.6, 0.9))
    signal *= rng.uniform(0.8, 1.2) * np.exp(0.12 * smooth_field(rng, size, 2))
    return mr_scan(signal, rng, rng.uniform(0.02, 0.04))


def ct_abdomen(finding: str, rng: Generator, size: int) -> Array:
    """CT with contrast: cysts of the liver are dark and sharply bounded, metastases less dark and blurred."""
    x, y = patient_grid(rng, size)
    a, b, fat = rng.uniform(0.86, 0.94), rng.uniform(0.64, 0.72), rng.uniform(0.04, 0.12)
    cavity = ellipse(x, y, (0, -0.02), (a - fat - 0.06, b - fat - 0.06))
    hounsfield = np.full_like(x, -1000)
    paint(hounsfield, ellipse(x, y, (0, 0), (a, b)), -100)  # fat
    paint(hounsfield, ellipse(x, y, (0, 0), (a - fat, b - fat)), 55)  # muscle
    paint(hounsfield, cavity, -90)
    paint(hounsfield, cavity * np.clip(3 * smooth_field(rng, size, 6), 0, 1), rng.uniform(20, 70))  # bowel
    liver, enhanced = cavity * ellipse(x, y, (-0.44, -0.12), (0.44, 0.38), 0.5), rng.uniform(95, 120)
    vessels = np.clip(1 - 9 * np.abs(smooth_field(rng, size, 5)), 0, 1)
    paint(hounsfield, liver, enhanced + 35 * vessels)
    low = rng.uniform(-0.03, 0.03)
    for value, centre, axes, angle in (
        (170, (0.36, 0.25 + low), (0.15, 0.1), -0.7),  # kidneys
        (170, (-0.36, 0.25 - low), (0.15, 0.1), 0.7),
        (rng.uniform(100, 130), (0.62, 0.05), (0.11, 0.24), 0),  # spleen
        (190, (0.06, 0.1), (0.055, 0.055), 0),  # aorta
        (420, (0, 0.27), (0.14, 0.11), 0),  # vertebra
    ):
        paint(hounsfield, ellipse(x, y, centre, axes, angle), value)
    if rng.random() < 0.5:  # a gallbladder, which looks like a cyst but lies at the liver's edge
        paint(hounsfield, ellipse(x, y, (-0.12, -0.16), (rng.uniform(0.06, 0.11), 0.065), 0.8), 10)
    for _ in range(0 if finding == "normal" else rng.integers(1, 5)):
        centre, r = (rng.uniform(-0.64, -0.3), rng.uniform(-0.3, 0.08)), rng.uniform(0.07, 0.15)
        if finding == "cyst":
            paint(hounsfield, liver * ellipse(x, y, centre, (r, 0.9 * r)), rng.uniform(0, 25))
        else:
            paint(hounsfield, liver * mass(x, y, centre, 1.2 * r, rng, 0.08), enhanced - rng.uniform(50, 85))
    return ct_scan(hounsfield, rng, sigma=rng.uniform(10, 20), level=rng.uniform(35, 60), width=400)


def us_breast(finding: str, rng: Generator, size: int) -> Array:
    """Ultrasound of fat, gland and muscle: cysts are smooth and bright behind, carcinomas spiculated with a shadow."""
    x, y = patient_grid(rng, size)
    gland, muscle = rng.uniform(-0.7, -0.4), rng.uniform(0.3, 0.55)
    layer = y + 0.05 * smooth_field(rng, size, 3)
    echo = np.where(layer < gland, -24, -13 + 2.5 * smooth_field(rng, size, 8))  # decibels
    paint(echo, np.clip(smooth_field(rng, size, 6) - 0.6, 0, 1), -26)  # islands of fat
    paint(echo, layer > muscle, -20)
    centre, r = (rng.uniform(-0.35, 0.35), rng.uniform(gland + 0.1, 0.1)), rng.uniform(0.1, 0.24)
    if finding == "cyst":
        lesion, level, loss = ellipse(x, y, centre, (1.2 * r, r)), rng.uniform(-60, -36), rng.uniform(-16, -4)
    elif finding == "carcinoma":
        lesion, level, loss = mass(x, y, centre, r, rng, spiky=2), rng.uniform(-42, -30), rng.uniform(0, 32)
    if finding != "normal":
        paint(echo, lesion, level)
        echo -= np.cumsum(loss * lesion, axis=0) * (2 / size)  # attenuation of what lies behind, in decibels
    image = us_scan(echo + rng.uniform(-4, 4), rng)
    return image * (np.abs(np.arctan2(x, y + 2.8)) < 0.26)  # black outside of the sector


PAINTERS = {"ct-abdomen": ct_abdomen, "ct-head": ct_head, "mr-brain": mr_brain, "us-breast": us_breast}
