"""Bytes sent, counted by hand in programs that are written here."""

import pytest

from opd_jax.memory_plan.collectives import sent_bytes

pytestmark = pytest.mark.short

TEXT = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %gathered = bf16[16,8]{1,0} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%condition (carry: (s32[], f32[4,8])) -> pred[] {
  ROOT %more = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[32,8]) -> f32[4,8] {
  %part = f32[4,8]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
  %loop = (s32[], f32[4,8]{1,0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %pair = (f32[10]{0}, f32[]) all-reduce(%a, %b), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %start = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%c), dimensions={0}
  %done = bf16[16,8]{1,0} all-gather-done(%start)
  %sum = ((f32[6]{0}), f32[6]{0}) all-reduce-start(%e), replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','fsdp'}
  %moved = u32[5]{0} collective-permute(%d), source_target_pairs={{0,1}}
}
"""  # noqa: E501


def test_each_collective_is_counted_as_often_as_its_loop_runs():
    scattered = 7 * 4 * 8 * 4
    looped = 3 * 16 * 8 * 2 * 3 / 4  # 3 rounds; groups of 4
    reduced = 2 * (10 * 4 + 4) / 2  # pairs
    gathered = 16 * 8 * 2 * 7 / 8  # all 8; what is given does not count
    named = 2 * 6 * 4 * 3 / 4  # data x fsdp
    moved = 5 * 4
    assert sent_bytes(TEXT, 8) == scattered + looped + reduced + gathered + named + moved


def test_a_loop_of_unknown_length_counts_once():
    unknown = TEXT.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    assert sent_bytes(TEXT, 8) - sent_bytes(unknown, 8) == 2 * 16 * 8 * 2 * 3 / 4


def test_a_program_without_collectives_sends_nothing():
    text = "HloModule f\n\nENTRY %main (p: f32[]) -> f32[] {\n  ROOT %p = f32[] copy(%q)\n}\n"
    assert sent_bytes(text, 8) == 0
