"""What counts as a race in Triton's GPU code, on lines cut out of what it made of a pipelined loop in the gradients kernel."""

from __future__ import annotations

import pytest
from deltaproduct_kernels.triton_backend.races import Race, races

LOOP = """\
  %S = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x64x64xbf16, #shared, #smem, mutable>
  %out:2 = scf.for %i = %c0 to %c128 step %c64 iter_args(%acc = %zero, %slot = %c0) -> (tensor<64x64xf32>, i32)  : i32 {{
    %tile = ttg.memdesc_index %S[%slot] : !ttg.memdesc<{buffers}x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %turned = ttg.memdesc_trans %tile {{order = array<i32: 1, 0>}} : !ttg.memdesc<64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %dot = ttng.warp_group_dot %rows, %turned, %acc {{inputPrecision = 0 : i32, isAsync = {asynchronous}}} : tensor<64x64xf32>
    %done:2 = ttng.warp_group_dot_wait %dot, %tile {{pendings = {pendings} : i32}} : tensor<64x64xf32>, !ttg.memdesc<64x64xbf16>
    %next = ttg.memdesc_index %{copied}[%slot] : !ttg.memdesc<{buffers}x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %copy = ttg.async_copy_global_to_local %pointers, %next mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>
    scf.yield %done#0, %slot : tensor<64x64xf32>, i32
  }}
"""


def found(stages: int = 2, buffers: int = 1, pendings: int = 1, asynchronous: str = "true", copied: str = "S") -> list[Race]:
    return races(LOOP.format(buffers=buffers, pendings=pendings, asynchronous=asynchronous, copied=copied), stages)


@pytest.mark.parametrize(("stages", "buffers"), [(2, 1), (3, 2), (3, 1)])
def test_a_copy_into_a_buffer_that_an_unfinished_product_reads_is_a_race(stages: int, buffers: int) -> None:
    assert found(stages, buffers) == [Race("64x64", buffers, stages)]


@pytest.mark.parametrize(
    "harmless",
    [
        pytest.param({"buffers": 2}, id="a buffer for every stage"),
        pytest.param({"pendings": 0}, id="the product is waited for"),
        pytest.param({"asynchronous": "false"}, id="the product is no asynchronous one"),
        pytest.param({"copied": "other"}, id="the copy goes elsewhere"),
        pytest.param({"stages": 1}, id="nothing is copied ahead"),
    ],
)
def test_no_race_where_one_of_its_conditions_is_missing(harmless: dict) -> None:
    assert found(**harmless) == []


def test_a_copy_in_an_inner_loop_is_not_the_outer_loops() -> None:
    inner = "".join(
        f"    {line}\n" for line in LOOP.format(buffers=1, pendings=0, asynchronous="false", copied="S").splitlines()[1:]
    )
    outer = LOOP.format(buffers=1, pendings=1, asynchronous="true", copied="other").replace("    %next", inner + "    %next")
    assert races(outer, 2) == []
