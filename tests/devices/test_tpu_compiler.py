# SPDX-License-Identifier: Apache-2.0
"""The process that runs the TPU's compiler."""

from contrastive.devices import tpu_compiler


def test_collectives_of_a_program_are_counted_with_their_bytes():
    program = """
  %all-reduce.1 = f32[2,8]{1,0:T(2,128)} all-reduce(%a), to_apply=%add
  %s = (f32[4]{0}, f32[8]{0:T(8)S(1)}) all-gather-start(%b), dimensions={0}
  %d = f32[8]{0} all-gather-done(%s)
  ROOT %t = (bf16[10]{0}, pred[3]{0}) all-reduce(%c, %d), to_apply=%add
  %fusion = f32[2,8]{1,0} fusion(%all-reduce.1), calls=%all-reduce.like
"""
    assert tpu_compiler.collectives(program) == {
        "all-gather": {"count": 1, "bytes": 32},
        "all-reduce": {"count": 2, "bytes": 64 + 23},
    }
