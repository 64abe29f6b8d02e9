"""What a step launches, read off programs that are compiled for a GPU."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu_program
from benchmarks.gpu_program import compile_for_gpu, has_plugin, read


pytestmark = pytest.mark.one_precision

# As XLA writes it: a solve of two loops, of which the second has a known length.
TEXT = """\
HloModule jit_solve, is_scheduled=true, entry_computation_layout={(f32[4])->f32[4]}

%fused_computation (param_0: f32[4]) -> f32[4] {
  %param_0 = f32[4]{0} parameter(0)
  ROOT %tanh.1 = f32[4]{0} tanh(%param_0)
}

%small (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %copy.1 = f32[4]{0} copy(%p)
}

%large (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  %fusion.1 = f32[4]{0} fusion(%q), kind=kLoop, calls=%fused_computation
  ROOT %fusion.2 = f32[4]{0} fusion(%fusion.1), kind=kLoop, calls=%fused_computation
}

%body.1 (arg: (s32[], f32[4])) -> (s32[], f32[4]) {
  %arg = (s32[], f32[4]{0}) parameter(0)
  %gte.1 = f32[4]{0} get-tuple-element(%arg), index=1
  %call.1 = f32[4]{0} custom-call(%gte.1), custom_call_target="__cublas$gemm"
  %cond.1 = f32[4]{0} conditional(%pred, %call.1, %call.1), \
branch_computations={%small, %large}
  ROOT %tuple.1 = (s32[], f32[4]{0}) tuple(%gte.0, %cond.1)
}

%condition.1 (arg.1: (s32[], f32[4])) -> pred[] {
  %arg.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %wrapped = pred[] fusion(%gte.2), kind=kLoop, calls=%wrapped_computation
}

%body.2 (arg.2: (s32[], f32[4])) -> (s32[], f32[4]) {
  %arg.2 = (s32[], f32[4]{0}) parameter(0)
  %while.1 = (s32[], f32[4]{0}) while(%arg.2), condition=%condition.1, body=%body.1
  %start = ((f32[4]{0}), f32[4]{0}) copy-start(%gte.3)
  %done = f32[4]{0} copy-done(%start)
  ROOT %tuple.2 = (s32[], f32[4]{0}) tuple(%gte.4, %done)
}

%command_buffer (c: f32[4]) -> f32[4] {
  %c = f32[4]{0} parameter(0)
  ROOT %fusion.3 = f32[4]{0} fusion(%c), kind=kLoop, calls=%fused_computation
}

ENTRY %main.1 (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %call.2 = f32[4]{0} call(%x), to_apply=%command_buffer
  %while.2 = (s32[], f32[4]{0}) while(%t.1), condition=%condition.1, body=%body.1
  %while.3 = (s32[], f32[4]{0}) while(%t.2), condition=%condition.1, body=%body.2, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = f32[4]{0} get-tuple-element(%while.3), index=1
}
"""


def test_kernels_and_waits_of_every_loop():
    counts = read(TEXT)
    assert counts.number == 1 and counts.waits == 0
    loops = dict(counts.walk())
    assert list(loops) == ["1", "2", "2.1"]
    # The product, the larger branch, and the predicate's; a wait for each predicate.
    assert loops["1"].kernels == {"__cublas$gemm": 1, "fusion": 3}
    assert loops["1"].waits == 2 and str(loops["1"]) == "4 + 2"
    assert loops["2"].kernels == {"copy-start": 1, "fusion": 1}
    assert loops["2"].waits == 0
    assert str(loops["2"]) == "2 + 0 (4 + 2)"


@pytest.mark.skipif(not has_plugin(), reason="JAX' CUDA plugin is not installed.")
def test_programs_are_compiled_without_a_gpu(monkeypatch):
    def loop(x):
        return jax.lax.while_loop(lambda z: jnp.sum(z) < 1, lambda z: 2 * z, x)

    compiled = compile_for_gpu(loop, jax.ShapeDtypeStruct((8,), jnp.float32))
    ((_, step),) = read(compiled.as_text()).walk()
    assert step.waits == 1 and step.number >= 1
    case = gpu_program.dense(4, 16)
    chosen = (gpu_program.BARE, "AndersonAcceleration", "JacobianFreeAdjoint")
    rows = [*gpu_program.count_rows(case, chosen)]
    assert {row["method"] for row in rows} == set(chosen)
    steps = {row["method"]: row for row in reversed(rows)}
    assert steps[gpu_program.BARE]["waits a step"] == 0
    assert steps["AndersonAcceleration"]["waits a step"] >= 1
    bare = steps[gpu_program.BARE]["kernels a step"]
    assert steps["AndersonAcceleration"]["kernels a step"] > bare
