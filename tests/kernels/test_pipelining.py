"""The check for copies that overtake products: on lines as Triton writes them."""

import pytest

from benchmarks.pipelining import early_copies

LOOP = """
    %keys = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x64x128xbf16, #shared, #smem, mutable>
    %sum:2 = scf.for %i = %c0 to %c9 step %c1 iter_args(%acc = %zero, %at = %c0) {{
      %wait = ttg.async_wait %token {{num = 1 : i32}}
      %k_1 = ttg.memdesc_index %keys[%at] : !ttg.memdesc<{buffers}x64x128xbf16, #shared, #smem, mutable> -> !x
      %t = ttg.memdesc_trans %k_1 {{order = array<i32: 1, 0>}} : !ttg.memdesc<64x128xbf16, #shared> -> !x
      %s = ttng.warp_group_dot %q, %t, %zero {{inputPrecision = 0 : i32, isAsync = true}} : tensor
      %s_2:2 = ttng.warp_group_dot_wait %s, %t {{pendings = 0 : i32}} : tensor
      %o = ttng.warp_group_dot %p, %k_1, %acc {{inputPrecision = 0 : i32, isAsync = true}} : tensor
      {wait}
      %to = ttg.memdesc_index %keys[%next] : !ttg.memdesc<{buffers}x64x128xbf16, #shared, #smem, mutable> -> !x
      %c = ttg.async_copy_global_to_local %from, %to mask %m other %zero : tensor -> <64x128xbf16>
      scf.yield %o, %next : tensor
    }}
"""


@pytest.mark.parametrize(
    ("buffers", "wait", "races"),
    [
        (2, "", True),
        (3, "", False),
        (2, "%w = ttng.warp_group_dot_wait %o {pendings = 0 : i32} : tensor", False),
        (2, "%w = ttng.warp_group_dot_wait %o {pendings = 1 : i32} : tensor", True),
    ],
)
def test_a_copy_may_not_overtake_the_product_that_reads(buffers: int, wait: str, races: bool) -> None:
    found = early_copies(LOOP.format(buffers=buffers, wait=wait), stages=3)
    assert bool(found) is races
    if races:
        assert "%keys has 2 buffers for 3 stages" in found[0]
