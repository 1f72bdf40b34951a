"""Statistics over seeds, what can be compared, differences at equal size, fronts, and which fits are made."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs import write_run, write_study
from titan_dp.errors import UserError
from titan_dp.studies.report.comparisons import Comparison, compare, front, welch
from titan_dp.studies.report.configurations import clusters, group
from titan_dp.studies.report.results import Results, results_of
from titan_dp.studies.report.runs import find_runs, read_runs
from titan_dp.studies.report.text import summary


def results(folder: Path, loss: str = "nats") -> Results:
    return results_of(read_runs(find_runs([folder])), loss, "study")


def comparisons(folder: Path) -> list[Comparison]:
    """Of a report, without its fits."""
    return compare(group(read_runs(find_runs([folder])), "nats"), [])


def law(noise: float = 0.0) -> Callable[[int, int, int, int], float]:
    """A loss that falls with size, tokens and n_h; seeds shift it up and down."""
    return lambda n_h, N, D, seed: 1.5 - 0.02 * n_h + 60 / N**0.34 + 60 / D**0.4 + noise * (-1) ** seed


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_the_spread_over_seeds_is_the_sample_standard_deviation(tmp_path: Path) -> None:
    for seed, loss in ((1, 3.0), (2, 3.1), (3, 3.5)):
        write_run(tmp_path / f"run-{seed}", {"debug.seed": seed}, loss)
    (configuration,) = results(tmp_path).configurations
    assert configuration.mean == pytest.approx(3.2)
    assert configuration.spread == pytest.approx(math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2))
    assert len(configuration.losses) == 3


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    assert results(tmp_path).configurations[0].spread is None


@pytest.mark.parametrize(("key", "value"), [("metrics.log_freq", 3), ("checkpoint.interval", 7), ("validation.freq", 9)])
def test_settings_that_cannot_change_the_loss_do_not_divide_seeds(tmp_path: Path, key: str, value: int) -> None:
    write_run(tmp_path / "a", {"debug.seed": 1})
    write_run(tmp_path / "b", {"data.seed": 2, key: value, "job.description": "another"})
    assert len(results(tmp_path).configurations) == 1


@pytest.mark.parametrize(
    ("key", "value"), [("optimizer.lr", 0.001), ("model.head_dim", 16), ("training.mixed_precision_param", "float32")]
)
def test_settings_that_can_change_the_loss_do(tmp_path: Path, key: str, value: Any) -> None:
    write_run(tmp_path / "a", {"debug.seed": 1})
    write_run(tmp_path / "b", {"debug.seed": 2, key: value})
    assert len(results(tmp_path).configurations) == 2


def test_unfinished_and_diverged_runs_are_in_no_mean_and_named(tmp_path: Path) -> None:
    write_run(tmp_path / "good", {"debug.seed": 1}, 3.0)
    write_run(tmp_path / "early", {"debug.seed": 2}, 9.0, until=60)
    write_run(tmp_path / "broken", {"debug.seed": 3}, math.nan)
    found = results(tmp_path)
    assert found.configurations[0].losses == [3.0]
    text = " ".join(summary(found))
    assert "Unfinished, so in no mean and no fit: early (step 60 of 100)." in text
    assert "Diverged, so in no mean and no fit: broken." in text


def test_a_run_done_twice_counts_once(tmp_path: Path) -> None:
    for name in ("a", "copy"):
        write_run(tmp_path / name, {"debug.seed": 1}, 3.0)
    found = results(tmp_path)
    assert found.configurations[0].losses == [3.0]
    assert found.warnings == ["copy repeats a (same configuration and seeds) and is not counted"]


def test_runs_that_never_started_make_no_report(tmp_path: Path) -> None:
    (write_run(tmp_path / "run") / "run.json").unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="none of the 1 runs has started"):
        results(tmp_path)


# -- what is comparable ------------------------------------------------------------------------------------------------


def two_tokenizers(folder: Path, **facts: Any) -> None:
    write_run(folder / "bytes", {"debug.seed": 1}, 1.0)
    other = {"tokenizer": "gpt2", "validation_fingerprint": "e" * 64, "bytes_per_token": 4.0, **facts}
    write_run(folder / "gpt2", {"debug.seed": 1, "model.vocab_size": 50304}, 3.0, facts=other)


def test_losses_of_two_tokenizers_are_not_compared_in_nats(tmp_path: Path) -> None:
    two_tokenizers(tmp_path)
    with pytest.raises(UserError, match=r"'bytes' and .*'gpt2': losses in nats a token are not comparable.*bits-per-byte"):
        results(tmp_path)


def test_bits_a_byte_compare_two_tokenizers(tmp_path: Path) -> None:
    two_tokenizers(tmp_path)
    means = {c.settings["tokenizer"]: c.mean for c in results(tmp_path, "bits-per-byte").configurations}
    assert means == pytest.approx({"bytes": 1 / math.log(2), "gpt2": 3 / 4 / math.log(2)})


def test_bits_a_byte_need_to_have_been_recorded(tmp_path: Path) -> None:
    write_run(tmp_path / "run", facts={"bytes_per_token": None})
    with pytest.raises(UserError, match="has no validation_bits_per_byte"):
        results(tmp_path, "bits-per-byte")


@pytest.mark.parametrize("loss", ["nats", "bits-per-byte"])
def test_losses_on_two_validation_texts_are_not_compared(tmp_path: Path, loss: str) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", facts={"validation_fingerprint": "e" * 64})
    with pytest.raises(UserError, match="were validated on different texts"):
        results(tmp_path, loss)


def test_validation_texts_of_different_lengths_are_not_compared_across_tokenizers(tmp_path: Path) -> None:
    two_tokenizers(tmp_path, validation_text_bytes=5)
    write_run(tmp_path / "bytes", facts={"validation_text_bytes": 6})
    with pytest.raises(UserError, match="different texts"):
        results(tmp_path, "bits-per-byte")


def test_different_training_data_are_allowed_with_a_warning(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", facts={"fingerprint": "0" * 64})
    found = results(tmp_path)
    assert found.warnings == ["runs were trained on 2 different data sets, for example a (dddddddd) and b (00000000)"]
    assert len(found.configurations) == 2


def test_times_of_different_machines_carry_a_warning(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"debug.seed": 1})
    write_run(tmp_path / "b", {"debug.seed": 2}, facts={"world_size": 8})
    assert "of different machines: 1 x a test's CPU, 8 x a test's CPU" in results(tmp_path).warnings[0]


# -- equal size, fronts ------------------------------------------------------------------------------------------------


def test_each_n_h_is_compared_with_the_smallest_at_equal_size_and_tokens(tmp_path: Path) -> None:
    found = comparisons(write_study(tmp_path / "study", law(0.001), sizes=((64, 2), (128, 4)), steps=(100, 400)))
    assert len(found) == 4
    for comparison in found:
        assert [row.configuration.n_h for row in comparison.rows] == [1, 2, 3]
        assert [row.difference for row in comparison.rows[1:]] == pytest.approx([-0.02, -0.04])
        assert comparison.rows[0].against is None
        assert {row.against.n_h for row in comparison.rows[1:] if row.against} == {1}


def test_runs_with_another_learning_rate_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"model.num_householder": 1}, facts={"parameters": 100000})
    write_run(tmp_path / "b", {"model.num_householder": 2, "optimizer.lr": 1.0}, facts={"parameters": 100000})
    assert comparisons(tmp_path) == []


def test_sizes_two_percent_apart_are_not_equal(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"model.num_householder": 1}, facts={"parameters": 100000})
    write_run(tmp_path / "b", {"model.num_householder": 2}, facts={"parameters": 102000})
    assert comparisons(tmp_path) == []


def test_the_smallest_n_h_of_the_same_gate_and_shape_is_compared_with(tmp_path: Path) -> None:
    for gate in (False, True):
        for n_h, heads, head_dim in ((1, 8, 16), (1, 4, 32), (2, 4, 16), (2, 2, 32)):
            shape = {"model.num_householder": n_h, "model.num_heads": heads, "model.head_dim": head_dim}
            write_run(
                tmp_path / f"{gate}{n_h}{head_dim}", {**shape, "model.use_forget_gate": gate}, facts={"parameters": 100000}
            )
    (comparison,) = comparisons(tmp_path)
    for row in comparison.rows:
        model = row.configuration.first.config.model
        if model.num_householder == 2:
            assert row.against is not None
            against = row.against.first.config.model
            expected = (1, model.use_forget_gate, model.head_dim)
            assert (against.num_householder, against.use_forget_gate, against.head_dim) == expected


def test_welchs_interval_is_that_of_the_textbook() -> None:
    # Means 3 and 2, variances of the means 1/3 and 4/3: 2.941 degrees of freedom, t(0.975) = 3.219 (from tables).
    low, high = welch([2, 3, 4], [0, 2, 4]) or (0.0, 0.0)
    half = 3.219 * math.sqrt(1 / 3 + 4 / 3)
    assert (low, high) == pytest.approx((1 - half, 1 + half), abs=0.01)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0]), ([1.0, 1.0], [2.0, 2.0])])
def test_without_scatter_on_both_sides_there_is_no_interval(a: list[float], b: list[float]) -> None:
    assert welch(a, b) is None


def test_the_front_is_what_nothing_cheaper_beats(tmp_path: Path) -> None:
    for name, parameters, loss in (("a", 100, 3.0), ("b", 200, 3.5), ("c", 300, 2.5), ("d", 300, 2.6), ("e", 400, 2.5)):
        write_run(tmp_path / name, {"optimizer.lr": parameters * loss}, loss, facts={"parameters": parameters})
    configurations = group(read_runs(find_runs([tmp_path])), "nats")
    assert [c.first.name for c in front(configurations, lambda c: c.parameters, 0.01)] == ["a", "c"]


def test_a_model_that_is_hardly_smaller_is_not_on_the_front_for_that(tmp_path: Path) -> None:
    for name, parameters, loss in (("a", 1000, 3.0), ("b", 1003, 2.5)):
        write_run(tmp_path / name, {"optimizer.lr": loss}, loss, facts={"parameters": parameters})
    configurations = group(read_runs(find_runs([tmp_path])), "nats")
    assert [c.first.name for c in front(configurations, lambda c: c.parameters, 0.01)] == ["b"]


def test_clusters_start_anew_beyond_their_tolerance() -> None:
    assert clusters([103, 100, 101, 250], float, 0.02) == [[100, 101], [103], [250]]


# -- which fits are made -----------------------------------------------------------------------------------------------


def test_too_few_points_say_what_is_missing_and_fit_nothing(tmp_path: Path) -> None:
    found = results(write_study(tmp_path / "study", law(), sizes=((64, 2), (128, 4)), seeds=(1,)))
    for fits in found.fits:
        assert (fits.surface, fits.compute) == (None, None)
        assert "3 sizes (there are 2), 3 numbers of tokens (there are 1), 6 configurations" in fits.surface_lacks
        assert "4 budgets of FLOPs" in fits.compute_lacks
    assert found.isoflops == []


def test_tokens_in_proportion_to_size_cannot_tell_the_two_apart(tmp_path: Path) -> None:
    for i in range(7):
        scale = 2**i
        facts = {"parameters": 1000 * scale, "flops_per_token": 6000 * scale}
        write_run(tmp_path / str(i), {"training.steps": 100 * scale}, 4 - 0.1 * i, facts=facts)
    (fits,) = results(tmp_path).fits
    assert "size and tokens change together" in fits.surface_lacks
    assert fits.compute is not None


def test_a_grid_of_sizes_and_tokens_is_fitted_for_each_family(tmp_path: Path) -> None:
    sizes, steps = ((64, 2), (128, 4), (256, 6)), (1000, 4000, 16000)
    found = results(write_study(tmp_path / "study", law(0.001), n_h=(1, 2), sizes=sizes, steps=steps))
    assert [fits.family for fits in found.fits] == ["DeltaNet [-1, 1]", "DeltaProduct_2 [-1, 1]"]
    for fits in found.fits:
        assert fits.surface is not None
        assert fits.surface.estimates["a"].value == pytest.approx(0.34, abs=0.05)
        assert fits.surface.estimates["b"].value == pytest.approx(0.40, abs=0.05)


def test_only_the_best_learning_rate_at_a_size_is_fitted(tmp_path: Path) -> None:
    for lr, loss in ((0.001, 3.0), (0.002, 2.9), (0.004, 3.3)):
        write_run(tmp_path / str(lr), {"optimizer.lr": lr}, loss)
    (fits,) = results(tmp_path).fits
    assert [c.mean for c in fits.fitted] == [2.9]
    assert fits.left_out == 2


def test_sizes_that_share_a_budget_give_a_parabola(tmp_path: Path) -> None:
    for i, (N, loss) in enumerate(((1e5, 3.2), (2e5, 3.0), (4e5, 3.2))):
        facts = {"parameters": int(N), "flops_per_token": int(6 * N)}
        for seed in (1, 2):
            settings = {"training.steps": 4000 // 2**i, "debug.seed": seed}
            write_run(tmp_path / f"{i}-{seed}", settings, loss + 0.001 * seed, facts=facts)
    (profile,) = results(tmp_path).isoflops
    assert profile.parabola.minimum == pytest.approx(2e5, rel=0.01)
    assert profile.budget == pytest.approx(6e5 * 4000 * 128)
