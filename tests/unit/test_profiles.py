"""Profiles: keys, interpolation, files that are none, and what a datasheet gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spdbench.errors import InputError
from spdbench.profiles.datasheet import BANDWIDTH_SHARE, DEVICES, LAUNCH_S, DrafterSize, Sizes, computed_seconds
from spdbench.profiles.profile import (
    Profile,
    RowCosts,
    make_key,
    nearest,
    parse_key,
    read_profile,
    require_model,
)
from tests.unit.judge.projection import projected

SECONDS = {
    "layer context=100 rows=1": 1.0,
    "layer context=100 rows=3": 2.0,
    "layer context=300 rows=1": 3.0,
    "layer context=300 rows=3": 4.0,
    "head rows=1": 0.5,
    "message bytes=2304": 1.0,
    "message bytes=6912": 2.0,
}


def make_profile(seconds: dict[str, float] = SECONDS) -> Profile:
    return projected.make_profile().model_copy(update={"seconds": seconds})


def test_a_key_is_read_as_it_was_made() -> None:
    key = make_key("draft", method="spd", stages=3)
    assert key == "draft method=spd stages=3"
    assert parse_key(key) == ("draft", {"method": "spd", "stages": "3"})


def test_a_layer_is_interpolated_between_rows_and_contexts() -> None:
    profile = make_profile()
    assert [profile.layer_s(rows, context) for rows, context in ((1, 100), (2, 100), (2, 200), (5, 100))] == [
        1.0,
        1.5,
        2.5,
        3.0,
    ]


def test_parts_with_one_measurement_are_constant_and_missing_ones_unknown() -> None:
    profile = make_profile()
    assert profile.head_s(9) == 0.5
    assert profile.message_s(4608) == 1.5
    assert make_profile({}).layer_s(1, 100) is None
    assert make_profile({}).head_s(1) is None
    assert make_profile({}).message_s(1) is None
    assert RowCosts((4,), (2.0,))(9) == 2.0


def test_noise_makes_no_cost_negative_beyond_what_was_measured() -> None:
    falling, steep = RowCosts((1, 4), (2.0, 1.0)), RowCosts((128, 1024), (1.0, 20.0))
    assert falling(400) == 1.0
    assert steep(64) == 0.5
    assert steep(1920) == 39.0


def test_costs_that_fall_with_more_rows_have_their_mean() -> None:
    costs = RowCosts.rising([1, 2, 3, 4, 6, 8], [5.0, 3.0, 4.0, 6.0, 7.0, 6.0])
    assert costs == RowCosts((1, 2, 3, 4, 6, 8), (4.0, 4.0, 4.0, 6.0, 6.5, 6.5))
    assert RowCosts.rising(costs.rows, costs.seconds) == costs
    assert RowCosts.rising([1, 2], [1.0, 2.0]) == RowCosts((1, 2), (1.0, 2.0))


def test_the_share_of_keys_and_values_is_what_grows_with_the_context() -> None:
    assert make_profile().attention_s(1, 50) == pytest.approx(0.5)  # 2 s for 200 tokens more
    assert make_profile({"layer context=100 rows=1": 1.0}).attention_s(1, 50) == 0.0


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(make_profile().to_json())
    assert read_profile(path) == make_profile()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{}", "created"),
        *(
            (make_profile().to_json().replace(old, new), why)
            for old, new, why in (
                ('"head rows=1": 0.5', '"head rows=1": 0.0', "seconds.head rows=1: has to be above 0"),
                ('"head rows=1": 0.5', '"head rows=1": 1e-300', "seconds.head rows=1: has to be above 0"),
                ('"head rows=1": 0.5', '"head rows=1": NaN', "head rows=1"),
                ('"head rows=1": 0.5', '"head rows=1": "0.5"', "head rows=1"),
                ("head rows=1", "head rows=one", "rows is 'one', no whole number above 0"),
                ("head rows=1", "head rows=0", "rows is '0', no whole number above 0"),
                ("head rows=1", f"head rows={'9' * 250}", "no whole number above 0"),
                ("head rows=1", "head row=1", "unknown field row; did you mean 'rows'"),
                ("context=100 rows=1", "rows=1", "field context is missing"),
                ("message bytes=2304", "message bytes=-5", "bytes is '-5'"),
                ("head rows=1", "draft method=spd", "field stages .* or levels"),
                ("head rows=1", "draft method=spd stages=3 threads=all", "threads is 'all'"),
                ('"hidden_size": 576', '"hidden_size": 577', r"model.hidden_size: a row of 577 .* 2308 bytes"),
                ('"num_layers": 30', '"num_layers": -30', "model.num_layers"),
            )
        ),
        ("nonsense", "no profile"),
        (make_profile().to_json().replace("profile/1", "profile/9"), "schema"),
        (make_profile().to_json().replace('"head rows=1": 0.5', '"head rows=1": -0.5'), "head rows=1"),
        (make_profile().to_json().replace("head rows=1", "head rows"), "head rows"),
        (make_profile().to_json().replace('"created"', '"created": "x", "created"'), "'created' occurs twice"),
    ],
)
def test_a_file_that_is_no_profile_is_named(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(InputError, match=why):
        read_profile(path)


@pytest.mark.parametrize(
    ("change", "what"),
    [({"num_layers": 12}, "layers 30"), ({"dtype": "bfloat16"}, "dtype float32"), ({"sha256": "x" * 64}, "weights")],
)
def test_a_profile_of_another_model_is_refused(change: dict[str, Any], what: str) -> None:
    same: dict[str, Any] = {"sha256": "m" * 64, "dtype": "float32", "num_layers": 30, "model": "smollm2"}
    require_model(make_profile(), "p.json", **same)
    with pytest.raises(InputError, match=what):
        require_model(make_profile(), "p.json", **(same | change))


def test_the_nearest_number_is_the_smaller_of_two() -> None:
    assert nearest([2, 4, 8], 3) == 2
    assert nearest([2, 4, 8], 7) == 8


def test_one_row_is_bound_by_memory_and_many_by_arithmetic() -> None:
    device, sizes = DEVICES["a100-80"], Sizes(layer=100e6, head=200e6, kv=1e3, row=2304, itemsize=2)
    found = computed_seconds(device, sizes, ())
    alone = found[make_key("layer", context=128, rows=1)]
    assert alone == pytest.approx((100e6 + 128e3) / (BANDWIDTH_SHARE * 2.039e12) + LAUNCH_S)
    assert found[make_key("layer", context=4096, rows=1)] > alone
    assert found[make_key("layer", context=128, rows=8)] == alone
    assert found[make_key("layer", context=128, rows=256)] > alone


def test_each_row_of_a_recurrent_layer_reads_a_state_and_writes_one_whatever_the_context() -> None:
    device, sizes = DEVICES["a100-80"], Sizes(layer=100e6, head=200e6, kv=0, row=2304, itemsize=2, state=1e6)
    found = computed_seconds(device, sizes, ())
    speed = BANDWIDTH_SHARE * device.bandwidth
    for rows in (1, 8):
        for context in (128, 4096):
            expected = (100e6 + 2 * rows * 1e6) / speed + LAUNCH_S
            assert found[make_key("layer", context=context, rows=rows)] == pytest.approx(expected)


def test_rows_read_the_experts_that_they_are_routed_to_and_each_is_multiplied_with_its_own() -> None:
    device = DEVICES["a100-80"]
    sizes = Sizes(layer=1000e6, head=200e6, kv=0, row=2304, itemsize=2, experts=800e6, routed=1 / 8)
    found = computed_seconds(device, sizes, ())
    speed = BANDWIDTH_SHARE * device.bandwidth
    read = {1: 300e6, 2: 200e6 + 800e6 * (1 - (7 / 8) ** 2), 64: 1000e6}
    for rows, num_bytes in read.items():
        seconds = found[make_key("layer", context=128, rows=rows)]
        assert seconds == pytest.approx(num_bytes / speed + LAUNCH_S, rel=1e-3)


def test_a_tree_takes_a_drafter_level_by_level_and_a_pipeline_once() -> None:
    sizes = Sizes(layer=100e6, head=200e6, kv=1e3, row=2304, itemsize=2)
    drafters = (
        DrafterSize("eagle3", "e" * 64, 50e6, (("tree", "chain"),)),
        DrafterSize("spd", "s", 50e6, (("stages", 4),)),
    )
    found = computed_seconds(DEVICES["l40s"], sizes, drafters)
    chain = [found[f"draft drafter=eeeeeeeeeeee levels={levels} method=eagle3 tree=chain"] for levels in (1, 4)]
    assert chain[1] == pytest.approx(4 * chain[0])
    assert found["draft drafter=s method=spd stages=4"] == chain[0]
    shared = DrafterSize("medusa", "m", 1e6, (("tree", "chain"),), once_bytes=40e6)
    found |= computed_seconds(DEVICES["l40s"], sizes, (shared,))
    heads = [found[f"draft drafter=m levels={levels} method=medusa tree=chain"] for levels in (1, 4)]
    level_s, once_s = (each / (BANDWIDTH_SHARE * DEVICES["l40s"].bandwidth) for each in (1e6, 40e6))
    assert heads == pytest.approx([each * (level_s + LAUNCH_S) + once_s for each in (1, 4)])
    Profile.model_validate(make_profile(found).model_dump(by_alias=True))


@pytest.mark.parametrize("name", DEVICES)
def test_a_model_of_four_billion_parameters_decodes_at_a_plausible_speed(name: str) -> None:
    """16-bit weights of 8 GB at 40 to 90 % of the card's bandwidth."""
    found = computed_seconds(DEVICES[name], Sizes(layer=230e6, head=600e6, kv=4096, row=5120, itemsize=2), ())
    token_s = 32 * found[make_key("layer", context=128, rows=1)] + found[make_key("head", rows=1)]
    assert 0.4 < (32 * 230e6 + 600e6) / token_s / DEVICES[name].bandwidth < 0.9
