"""`Program` and `Target`: what a compiled program launches, read from its text, for GPUs that are not there."""

import functools
import importlib.util
import json
import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmp.cli import main
from jaxmp.errors import InputError
from jaxmp.instruments.audit import audit
from jaxmp.instruments.program import Program
from jaxmp.instruments.target import Target

F16, BF16, F32 = jnp.float16, jnp.bfloat16, jnp.float32

# As XLA prints a program for GPUs, with one of each kind of kernel: a fused product of converted operands, a library's
# product, of which one operand is wider, and convolution, a sum in half and one in float32, a maximum, a conversion, a
# copy, a loop of three turns around a collective that starts and ends apart, a collective within an async computation,
# and what launches nothing.
TEXT = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/model.py"
2 "/env/lib/python3.12/site-packages/flax/linen/linear.py"

FunctionNames
1 "loss"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=90 end_line=90 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%add (a: f16[], b: f16[]) -> f16[] {
  %a = f16[] parameter(0)
  %b = f16[] parameter(1)
  ROOT %sum = f16[] add(%a, %b)
}

%max (a.1: f16[], b.1: f16[]) -> f16[] {
  %a.1 = f16[] parameter(0)
  %b.1 = f16[] parameter(1)
  ROOT %larger = f16[] maximum(%a.1, %b.1)
}

%fused_dot (p0: f16[8,4], p1: f32[4,2]) -> f16[8,2] {
  %p0 = f16[8,4]{1,0} parameter(0)
  %p1 = f32[4,2]{1,0} parameter(1)
  %half = f16[4,2]{1,0} convert(%p1)
  ROOT %dot.1 = f16[8,2]{1,0} dot(%p0, %half), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_reduce (p2: f16[8,2]) -> f16[2] {
  %p2 = f16[8,2]{1,0} parameter(0)
  %zero = f16[] constant(0)
  ROOT %reduce.1 = f16[2]{0} reduce(%p2, %zero), dimensions={0}, to_apply=%add, metadata={op_name="jit(step)/jvp(Net)/Dense_0/reduce_sum" stack_frame_id=2}
}

%add_wide (a.2: f32[], b.2: f32[]) -> f32[] {
  %a.2 = f32[] parameter(0)
  %b.2 = f32[] parameter(1)
  ROOT %sum.2 = f32[] add(%a.2, %b.2)
}

%fused_reduce_wide (p6: f16[8,2]) -> f16[2] {
  %p6 = f16[8,2]{1,0} parameter(0)
  %wide = f32[8,2]{1,0} convert(%p6)
  %zero.2 = f32[] constant(0)
  %reduce.3 = f32[2]{0} reduce(%wide, %zero.2), dimensions={0}, to_apply=%add_wide
  ROOT %narrow = f16[2]{0} convert(%reduce.3)
}

%fused_max (p3: f16[8,2]) -> f16[2] {
  %p3 = f16[8,2]{1,0} parameter(0)
  %low = f16[] constant(-inf)
  ROOT %reduce.2 = f16[2]{0} reduce(%p3, %low), dimensions={0}, to_apply=%max
}

%fused_convert (p4: f16[2]) -> f32[2] {
  %p4 = f16[2]{0} parameter(0)
  ROOT %convert.1 = f32[2]{0} convert(%p4)
}

%body (state: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %state = (s32[], /*index=1*/bf16[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[4]{0} get-tuple-element(%state), index=1
  %all-reduce-start.1 = ((bf16[4]{0}), bf16[4]{0}) all-reduce-start(%x), to_apply=%add, metadata={op_name="jit(step)/while/body/psum"}
  %all-reduce-done.1 = bf16[4]{0} all-reduce-done(%all-reduce-start.1)
  ROOT %next = (s32[], bf16[4]{0}) tuple(%i, %all-reduce-done.1)
}

%condition (state.1: (s32[], bf16[4])) -> pred[] {
  %state.1 = (s32[], bf16[4]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%scattered (p5: f32[16]) -> f32[4] {
  %p5 = f32[16]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[4]{0} reduce-scatter(%p5), dimensions={0}, to_apply=%add
}

ENTRY %main (w: f32[4,2], x.1: f16[8,4], y: bf16[4], g: f32[16]) -> (f32[2], bf16[4]) {
  %w = f32[4,2]{1,0} parameter(0)
  %x.1 = f16[8,4]{1,0} parameter(1)
  %y = bf16[4]{0} parameter(2)
  %g = f32[16]{0} parameter(3)
  %gemm_fusion_dot.12 = f16[8,2]{1,0} fusion(%x.1, %w), kind=kCustom, calls=%fused_dot, metadata={op_name="jit(step)/jvp(Net)/Dense_0/dot_general" stack_frame_id=2}
  %cublas-gemm.1 = (f32[4,4]{1,0}, s8[64]{0}) custom-call(%x.1, %w), custom_call_target="__cublas$gemm", metadata={op_name="jit(step)/jvp(Net)/head/dot_general" stack_frame_id=1}
  %cudnn-conv.1 = (f16[8,4]{1,0}, u8[0]{0}) custom-call(%x.1, %x.1), custom_call_target="__cudnn$convForward"
  %input_reduce_fusion = f16[2]{0} fusion(%gemm_fusion_dot.12), kind=kInput, calls=%fused_reduce
  %input_reduce_fusion.1 = f16[2]{0} fusion(%gemm_fusion_dot.12), kind=kInput, calls=%fused_max
  %input_reduce_fusion.2 = f16[2]{0} fusion(%gemm_fusion_dot.12), kind=kInput, calls=%fused_reduce_wide
  %wrapped_convert = f32[2]{0} fusion(%input_reduce_fusion), kind=kLoop, calls=%fused_convert
  %copy.1 = bf16[4]{0} copy(%y)
  %all-gather.1 = bf16[16]{0} all-gather(%y), dimensions={0}
  %zero.1 = s32[] constant(0)
  %start = (s32[], bf16[4]{0}) tuple(%zero.1, %copy.1)
  %while.1 = (s32[], bf16[4]{0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %out = bf16[4]{0} get-tuple-element(%while.1), index=1
  %scatter-start = ((f32[16]{0}), f32[4]{0}) async-start(%g), calls=%scattered
  %scatter-done = f32[4]{0} async-done(%scatter-start)
  ROOT %results = (f32[2]{0}, bf16[4]{0}) tuple(%wrapped_convert, %out)
}
"""  # noqa: E501


class Compiled:
    """What of a compiled function `Program` reads."""

    argument_size_in_bytes, output_size_in_bytes, alias_size_in_bytes, temp_size_in_bytes = 100, 50, 40, 7

    def __init__(self, text=TEXT):
        self.text = text

    def as_text(self):
        return self.text

    def memory_analysis(self):
        return self


PROGRAM = Program.read(Compiled(), "h100x4")


def test_kernels_are_told_apart_by_what_they_compute_and_in_which_dtype():
    assert [kernel[:3] for kernel in PROGRAM.kernels] == [
        ("product", "float16", "gemm_fusion_dot"),
        ("product", "float32", "__cublas$gemm"),
        ("convolution", "float16", "__cudnn$convForward"),
        ("reduction", "float16", "input_reduce_fusion"),
        ("reduction", "float16", "input_reduce_fusion"),
        ("reduction", "float32", "input_reduce_fusion"),  # of what comes out in half
        ("conversion", "float32", "wrapped_convert"),
        ("copy", "bfloat16", "copy"),
    ]
    assert PROGRAM.launches()["product", "float16"] == 1


def test_kernels_and_sums_have_the_path_of_their_operation_and_the_line_of_the_users_code():
    product, library, *_ = PROGRAM.kernels
    assert product.path == "jit(step)/jvp(Net)/Dense_0/dot_general"
    assert product.source == library.source == "/home/me/model.py:7"  # outside of Flax, which called


def test_collectives_count_their_bytes_and_the_turns_of_a_loop():
    assert [(c.kind, c.dtype, c.nbytes, c.times) for c in PROGRAM.collectives] == [
        ("all-gather", "bfloat16", 32, 1),
        ("all-reduce", "bfloat16", 8, 3),
        ("reduce-scatter", "float32", 64, 1),
    ]
    assert PROGRAM.exchanged() == {
        ("all-gather", "bfloat16"): (1, 32),
        ("all-reduce", "bfloat16"): (3, 24),
        ("reduce-scatter", "float32"): (1, 64),
    }


def test_sums_in_half_are_found_and_maxima_are_not():
    assert [(each.dtype, each.terms, each.path) for each in PROGRAM.half_sums] == [
        ("float16", 8, "jit(step)/jvp(Net)/Dense_0/reduce_sum")
    ]


def test_the_peak_counts_results_in_the_place_of_arguments_once():
    assert PROGRAM.memory.peak == 100 + 50 - 40 + 7
    assert PROGRAM.to_json()["memory"]["peak"] == 117


def test_the_table_shows_what_was_read():
    text = str(PROGRAM)
    assert "compiled for h100x4: 8 kernels a call" in text and "__cublas$gemm 1" in text
    assert "all-reduce of bfloat16: 3, of 24 bytes" in text


def test_a_program_for_a_cpu_is_read_too():
    compiled = (
        jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x @ x), x)).lower(jnp.ones((8, 8))).compile()
    )
    assert ("product", "float32") in Program.read(compiled).launches()


def compiled(fn):
    return Program.read(jax.jit(fn).lower(jnp.ones((8, 8))).compile())


def test_of_a_conditional_the_branch_with_most_products_is_counted():
    branches = [lambda x: jnp.sin(x + 1).T, lambda x: x @ x @ x, lambda x: x @ x]
    program = compiled(lambda x: jax.lax.switch(x[0, 0].astype(int), branches, x))
    assert program.launches()["product", "float32"] == 2
    assert ("elementwise", "float32") not in program.launches(), "of the first branch"


def test_the_condition_of_a_loop_is_counted_where_it_is_computed():
    program = compiled(lambda x: jax.lax.while_loop(lambda x: jnp.sum(x @ x) < 9, lambda x: x + x @ x, x))
    assert program.launches()["product", "float32"] == 2


def test_a_conditional_exchanges_what_one_branch_does_and_every_branch_is_searched_for_sums_in_half():
    other = """%other (state.2: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %state.2 = (s32[], bf16[4]{0}) parameter(0)
  %y.2 = bf16[4]{0} get-tuple-element(%state.2), index=1
  %x.2 = f16[8,2]{1,0} constant({...})
  %all-reduce.2 = bf16[4]{0} all-reduce(%y.2), to_apply=%add
  %all-reduce.3 = bf16[4]{0} all-reduce(%all-reduce.2), to_apply=%add
  %input_reduce_fusion.4 = f16[2]{0} fusion(%x.2), kind=kInput, calls=%fused_reduce
  ROOT %next.2 = (s32[], bf16[4]{0}) tuple(%i.2, %all-reduce.3)
}

ENTRY"""
    loop = 'while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    assert loop in TEXT

    def with_branches(names):
        conditional = f"conditional(%zero.1, %start, %start), branch_computations={{{names}}}"
        return Program.read(Compiled(TEXT.replace(loop, conditional).replace("ENTRY", other)))

    for names in ("%body, %other", "%other, %body"):
        program = with_branches(names)
        assert program.exchanged()["all-reduce", "bfloat16"] == (2, 16)
        assert [each.terms for each in program.half_sums] == [8, 8]
        assert sum(program.launches().values()) == 9
    assert len(with_branches("%body, %body").half_sums) == 1


def with_program(fn, *args, policy=None):
    """The audit of `fn` as if it had been compiled to `TEXT`."""
    from jaxmp.instruments import audit as module

    report = audit(fn, *args)
    found = [*report.observed, *module._compiled(PROGRAM, list(report.observed))]
    return module.dataclasses.replace(report, program=PROGRAM, observed=tuple(found)).under(policy)


def test_what_the_compiler_added_is_found():
    found = with_program(lambda x: x, jax.ShapeDtypeStruct((2,), F16), policy="head=float32; mixed_float16").findings
    assert [(f.rule, f.path, f.times) for f in found] == [
        ("half collective", "", 3),
        ("half accumulation", "Net/Dense_0", 1),
    ]
    # A product that is in float32 where the policy is not; a collective in the dtype that the policy asks for.
    rules = [
        f.rule
        for f in with_program(
            lambda x: x, jax.ShapeDtypeStruct((2,), F16), policy="mixed_bfloat16,reduce=bf16"
        ).findings
    ]
    assert rules == ["half accumulation", "float32 dot"]


def test_what_the_jaxpr_shows_as_well_is_one_finding():
    from jaxmp.instruments.audit import Finding, _compiled

    line = "/home/me/model.py:7"
    known = [Finding(f"half {what}", "", "", at, "", 1) for what, at in (("collective", ""), ("accumulation", line))]
    assert not list(_compiled(PROGRAM, known))
    product = jax.named_scope("Net/head")(lambda x: x @ x)
    found = with_program(product, jax.ShapeDtypeStruct((4, 4), F32), policy="mixed_float16").findings
    assert [f.what for f in found if f.rule == "float32 dot"] == [
        "dot_general of float32 operands where the policy computes in float16"
    ]


@pytest.mark.parametrize("text", ["h10", "h100x0", "x8", "h100x", "h100x8x"])
def test_an_unknown_target_is_one_message(text):
    with pytest.raises(InputError, match=r"expected h100, with the number of GPUs behind it"):
        Target.parse(text)


def test_targets_are_spelled_as_they_are_read():
    assert [str(Target.parse(text)) for text in ("h100", "h100x1", "h100x8")] == ["h100", "h100", "h100x8"]


CUDA = any(importlib.util.find_spec(f"jax_{extra}_plugin") for extra in ("cuda12", "cuda13"))
without_cuda = pytest.mark.skipif(CUDA, reason="the CUDA build of JAX is installed")
with_cuda = pytest.mark.skipif(
    not CUDA or os.environ.get("JAX_PLATFORMS") != "cpu", reason="takes the CUDA build of JAX, and JAX_PLATFORMS=cpu"
)


@without_cuda
def test_without_the_cuda_build_one_message_says_how_to_get_it():
    with pytest.raises(InputError, match=r"uv sync --extra cuda12.*pip install 'jaxmp\[cuda12\]'"):
        audit(jnp.sin, jnp.ones(3), target="h100")


@functools.cache
def partitioned():
    target = Target.parse("h100x8")
    mesh = target.mesh()

    def loss(w, x):
        return jnp.mean((x @ w.astype(BF16)).astype(F32) ** 2)

    w = jax.ShapeDtypeStruct((128, 128), F32)
    x = jax.ShapeDtypeStruct((64, 128), BF16, sharding=NamedSharding(mesh, P("data")))
    return audit(jax.grad(loss), w, x, target=target, policy="mixed_bfloat16")


@with_cuda
def test_a_collective_in_half_that_the_partitioner_added_is_found():  # T12
    report = partitioned()
    assert {(c.kind, c.dtype, c.nbytes) for c in report.program.collectives} == {
        ("all-reduce", "bfloat16", 2 * 128 * 128)
    }
    (finding,) = report.findings
    assert finding.rule == "half collective" and __file__ in finding.source
    report.assert_clean("mixed_bfloat16,reduce=bf16")


@with_cuda
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_a_product_is_a_kernel_in_its_own_dtype(dtype):
    x = jax.ShapeDtypeStruct((256, 256), dtype)
    kernels = audit(jnp.matmul, x, x, target="h100").program.kernels
    # Where it is split along the sum, the parts are added up in a kernel of their own.
    assert {kernel.dtype for kernel in kernels if kernel.kind == "product"} == {jnp.dtype(dtype).name}
    assert {kernel.dtype for kernel in kernels if kernel.kind == "reduction"} <= {"float32"}


@with_cuda
def test_the_command_compiles_the_step_of_a_config(tmp_path, capsys):
    file = tmp_path / "audit.json"
    assert main(["audit", "digits_mlp", "--target", "h100x8", "--strict", "--json", str(file)]) == 0
    assert "compiled for h100x8" in capsys.readouterr().out
    program = json.loads(file.read_text())["program"]
    assert [(each["kind"], each["dtype"]) for each in program["collectives"]] == [("all-reduce", "float32")] * 2


@with_cuda
def test_donated_arguments_are_where_results_lie():
    step = jax.jit(lambda s, x: s + x, donate_argnums=0)
    x = jax.ShapeDtypeStruct((1024,), F32)
    memory = audit(step, x, x, target="h100").program.memory
    assert (memory.arguments, memory.results, memory.aliased) == (8192, 4096, 4096)
