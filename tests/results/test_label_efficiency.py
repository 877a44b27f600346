"""The label-efficiency figure: means, bands and ticks."""

import numpy as np

from utils.results.label_efficiency import Curve, label_efficiency


def test_lines_are_means_and_bands_the_range_of_the_draws():
    draws = np.array([[0.1, 0.2, 0.6], [0.5, 0.5, 0.8]])  # (shots, draws)
    curves = [Curve("a$b", draws, 0.9), Curve("_c", draws + 0.05, 0.95)]
    figure = label_efficiency({"kNN": curves, "logistic regression": curves}, [5, 10], 40.0, "Macro F1")
    for panel in figure.axes:
        first, second = panel.lines
        np.testing.assert_allclose(first.get_xdata(), [5, 10, 40])
        np.testing.assert_allclose(first.get_ydata(), [0.3, 0.6, 0.9])
        np.testing.assert_allclose(second.get_ydata(), [0.35, 0.65, 0.95])
        assert [label.get_text() for label in panel.get_xticklabels()] == ["5", "10", "all"]
        band = panel.collections[0].get_paths()[0].vertices
        assert {(x, round(y, 6)) for x, y in band} == {(5.0, 0.1), (5.0, 0.6), (10.0, 0.5), (10.0, 0.8)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [r"a\$b", " _c"]


def test_all_keeps_a_distance_from_the_last_number():
    curves = [Curve("a", np.array([[0.5]]), 0.6)]
    figure = label_efficiency({"kNN": curves}, [10], 10.5, "Macro F1")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [10, 16])
