"""Drawing: principal components, heat maps, lines."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_jax.visualization import pictures


def test_components_are_those_of_the_covariance_up_to_sign():
  rng = np.random.default_rng(0)
  features = (rng.normal(size=(6, 7, 12)) * np.geomspace(8, 0.1, 12)) @ np.linalg.qr(rng.normal(size=(12, 12)))[0] + 3
  rows = features.reshape(-1, 12)
  found = pictures.components(features.astype(np.float32))
  _, vectors = np.linalg.eigh(np.cov(rows.T))
  expected = vectors[:, ::-1][:, :3]
  # The features were rounded to float32: a direction turns by about 1e-7 over the gap of two variances.
  np.testing.assert_allclose(np.abs((found.directions * expected).sum(0)), 1, rtol=0, atol=1e-9)
  np.testing.assert_allclose(found.mean, rows.mean(0), rtol=0, atol=1e-6)
  assert (found.directions[np.abs(found.directions).argmax(0), range(3)] > 0).all()
  along = (rows - found.mean) @ found.directions
  np.testing.assert_allclose([found.low, found.high], np.percentile(along, (1, 99), axis=0), atol=1e-5)


def test_a_picture_of_features_runs_over_the_shared_range():
  shared = pictures.Components(np.zeros(4), np.eye(4)[:, :3], np.array([0.0, -1, 2]), np.array([1.0, 1, 4]))
  features = np.array([[[0, -1, 2, 9], [1, 1, 4, 9]], [[0.5, 0, 3, -9], [-5, 7, 3.5, 0]]], np.float32)
  expected = [[[0, 0, 0], [255, 255, 255]], [[128, 128, 128], [0, 255, 191]]]
  np.testing.assert_array_equal(pictures.pca_picture(features, shared), expected)


@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 4, 2), (2, 2, 1)])
def test_features_with_fewer_components_leave_the_others_gray(shape):
  features = np.random.default_rng(1).normal(size=shape)
  shown = pictures.pca_picture(features, pictures.components(features))
  assert (shown[..., min(shape[0] * shape[1] - 1, shape[2]) :] == 128).all()
  assert shown.dtype == np.uint8 and shown.shape == (*shape[:2], 3)
  constant = np.full((3, 3, 4), 7.0)
  assert (pictures.pca_picture(constant, pictures.components(constant)) == 128).all()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(0, 9))
def test_a_heat_map_keeps_the_sum(rows, columns, factor, seed):
  weights = np.random.default_rng(seed).dirichlet(np.ones(rows * columns)).reshape(rows, columns)
  spread = pictures.heat(weights, columns * factor, rows * factor)
  assert spread.shape == (rows * factor, columns * factor)
  # Pillow sums float32 numbers of at most 1.
  np.testing.assert_allclose(spread.sum(dtype=np.float64) / factor**2, 1, rtol=1e-5)
  assert spread.min() >= weights.min() - 1e-6 and spread.max() <= weights.max() + 1e-6


def test_an_overlay_mixes_grey_and_heat():
  pixels = np.full((1, 4, 3), 200, np.uint8)
  shown = pictures.overlay(pixels, np.array([[0, 1, -3, 9]], np.float32)).astype(int)
  cold, hot = 0.65 * 200 + 0.35 * pictures.HEAT[0], 0.3 * 200 + 0.7 * pictures.HEAT[-1]
  np.testing.assert_allclose(shown[0], [cold, hot, cold, hot], rtol=0, atol=0.51)  # rounding
  coloured = np.array([[[255, 0, 0]]], np.uint8)
  grey = 0.299 * 255
  np.testing.assert_allclose(
    pictures.overlay(coloured, np.zeros((1, 1)))[0, 0], 0.65 * grey + 0.35 * pictures.HEAT[0], atol=0.51
  )


def test_lines_lie_around_their_borders_and_on_the_picture():
  pixels = np.full((20, 30, 3), 90, np.uint8)
  drawn = pictures.lines(pixels, [10, 30], [0], (1, 2, 3), width=2)
  assert (drawn[5, [9, 10, 28, 29]] == (1, 2, 3)).all() and (drawn[0:2, 5] == (1, 2, 3)).all()
  assert (drawn[5, [8, 11, 26, 27]] == pictures.INK).all()  # the edge that sets a line off
  assert (drawn[5, [7, 12, 25]] == 90).all() and (pixels == 90).all()
  hairline = pictures.lines(pixels, [4.4], [], (1, 2, 3), width=1)
  assert np.flatnonzero((hairline[3] == (1, 2, 3)).all(-1)).tolist() == [4] and (hairline != 90).any(-1).sum() == 20


def test_frames_badges_and_montages():
  pixels = np.full((40, 60, 3), 90, np.uint8)
  framed = pictures.box(pixels, 10, 10, 50, 30, (1, 2, 3), width=2)
  assert (framed[10:12, 10:50] == (1, 2, 3)).all() and (framed[28:30, 10:50] == (1, 2, 3)).all()
  assert (framed[13:27, 13:47] == 90).all() and (framed[30:31, 10:50] == pictures.INK).all()
  badged = pictures.badge(pixels, 999, -999, "7", (200, 100, 50))  # moved onto the picture
  assert ((badged == (200, 100, 50)).all(-1).sum() > 60) and (badged[:, :30] == 90).all() and (badged[30:] == 90).all()
  joined = pictures.montage([pixels, framed, badged], 2, gap=4)
  assert joined.shape == (84, 124, 4)
  np.testing.assert_array_equal(joined[:40, 64:, :3], framed)
  np.testing.assert_array_equal(joined[44:, :60, :3], badged)
  assert not joined[:, 60:64].any() and not joined[44:, 64:].any() and (joined[:40, :60, 3] == 255).all()


def test_sizes_and_colours():
  small = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
  enlarged = pictures.nearest(small, 3)
  np.testing.assert_array_equal(enlarged[::3, ::3], small)
  np.testing.assert_array_equal(enlarged[2::3, 2::3], small)
  assert pictures.fitted(np.zeros((10, 40, 3), np.uint8), 100).shape == (25, 100, 3)
  assert pictures.fitted(np.zeros((1, 900, 3), np.uint8), 100).shape == (1, 100, 3)
  assert len(set(pictures.hues(24))) == 24
