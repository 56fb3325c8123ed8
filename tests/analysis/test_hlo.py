"""Memory, traffic and collectives read from what XLA compiled."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from halvit_jax.analysis import hlo
from halvit_jax.training.sharding import make_mesh

HLO = """
HloModule jit_train_step
  %all-reduce.1 = (bf16[384,384]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[384]{0:T(512)S(1)}) all-reduce(%a, %b), id=1
  ROOT %all-reduce.2 = s32[]{:T(128)} all-reduce(%c), to_apply=%max
  %ag = (f32[4,8]{1,0}, f32[4,32]{1,0}) all-gather-start(f32[4,8]{1,0} %p), dimensions={1}
  %agd = f32[4,32]{1,0} all-gather-done(%ag)
  %cp = (pred[16]{0}, pred[16]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%q), channel_id=3
  %ars = f32[100]{0} all-reduce-start(%r)
  reduce-scatter.7 = f8e4m3fn[2,5]{1,0} reduce-scatter(%s), dimensions={0}
  %fusion = f32[9]{0} fusion(%all-reduce.1), kind=kLoop, calls=%all-gather_computation
"""


def test_collectives_are_read_from_the_compiled_text() -> None:
    assert hlo.collectives(HLO) == {
        "all-gather": {"count": 1, "bytes": 4 * 32 * 4},
        "all-reduce": {"count": 3, "bytes": 384 * 384 * 2 + 384 * 4 + 4 + 400},
        "collective-permute": {"count": 1, "bytes": 16},
        "reduce-scatter": {"count": 1, "bytes": 10},
    }
    assert hlo.collectives("HloModule nothing") == {}


def test_collectives_of_a_sharded_sum_and_the_memory_of_its_program() -> None:
    mesh = make_mesh(data=8)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=rows)
    compiled = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec())).lower(x).compile()
    assert hlo.collectives(compiled.as_text()) == {"all-reduce": {"count": 1, "bytes": 16}}
    memory = hlo.memory_of(compiled)
    assert (memory["arguments"], memory["output"]) == (2 * 4 * 4, 4 * 4)


ENTRY = """HloModule jit_step

%fused_computation (p: f32[100]) -> f32[100] {
  %p = f32[100]{0:T(128)} parameter(0)
  ROOT %inside = f32[100]{0:T(128)} add(%p, %p)
}

%body (q: f32[10]) -> f32[10] {
  %q = f32[10]{0} parameter(0)
  ROOT %doubled = f32[10]{0} add(%q, %q), metadata={op_name="jit(step)/add"}
}

ENTRY %main (a: f32[100], b: bf16[8,16]) -> f32[100] {
  %a = f32[100]{0:T(128)} parameter(0), metadata={op_name="a"}
  %b = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(1)
  %fetched = (bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, bf16[8,16]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%b)
  %near = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} copy-done(%fetched)
  %cut = ((f32[100]{0:T(128)}), f32[25]{0:T(128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:25]}
  %part = f32[25]{0:T(128)S(1)} slice-done(%cut)
  %looped = f32[10]{0} while(%part), condition=%other, body=%body
  %made = (f32[100]{0:T(128)}, f32[7]{0:S(1)}) fusion(%a, %near), kind=kLoop, calls=%fused_computation
  ROOT %out = f32[100]{0:T(128)} get-tuple-element(%made), index=0
}
"""


def test_bytes_in_hbm_leave_out_what_lies_in_other_memories() -> None:
    fetched, sliced, body, fused = 8 * 16 * 2, 25 * 4, 3 * 40, 400 + 400
    assert hlo.hbm_bytes(ENTRY) == fetched + sliced + body + fused
    assert hlo.hbm_bytes("HloModule nothing") == 0


def test_bytes_in_hbm_of_a_real_program() -> None:
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    assert hlo.hbm_bytes(jax.jit(lambda x: jnp.sin(x) + 1).lower(x).compile().as_text()) == 2 * 4000


def test_the_compilers_message_of_too_little_memory_is_read() -> None:
    message = "the total memory required for HLO temporaries (16.50G) exceeds available HBM (15.75G)"
    assert hlo.bytes_named(message) == int(16.5 * 2**30)
    assert hlo.bytes_named("(512) exceeds available HBM") == 512
    assert hlo.bytes_named("another error") is None
