"""The Triton kernels of chunk attention compile for Hopper, use its matrix units, and fit into its shared memory."""

import pytest

from support.processes import run_python

pytest.importorskip("triton")

SHARED_BYTES = 227 * 1024

COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from megalodon_plugin.kernels.chunk_attention import hopper as kernels
from megalodon_plugin.ops.chunk_attention import hopper as launches

def tile(rows, cols):
    return f"tensordesc<bf16[{rows}, {cols}]>"

def arguments(name):
    numbers = dict.fromkeys("first n_chunks n_heads length start chunk".split(), "i32")
    if name == "attention_weights":
        b = launches.WEIGHTS
        types = {"q": tile(b.rows, 256), "k": tile(b.cols, 256), "weights": tile(b.rows, b.cols)}
        types |= {"inverse_sum": "*fp32", "log_sum": "*fp32"}
        return numbers | types, {"WIDTH": 256, "ROWS": b.rows, "COLS": b.cols}, b
    if name == "score_gradients":
        b = launches.GRADIENTS
        types = {n: tile(b.rows, b.inner) for n in ("q", "k", "v", "dout")}
        types |= {n: tile(b.rows, b.rows) for n in ("weights", "dscores")} | {"log_sum": "*fp32", "delta": "*fp32"}
        sizes = {"QK_WIDTH": 256, "V_WIDTH": 2048, "SIDE": b.rows, "INNER": b.inner, "QK_INNER": b.inner}
        return numbers | types, sizes, b
    transposed = name == "transposed"
    b = launches.PRODUCT_TRANSPOSED if transposed else launches.PRODUCT
    types = {"a": tile(b.inner, b.rows) if transposed else tile(b.rows, b.inner), "x": tile(b.inner, b.cols)}
    types |= {"scale": "*fp32", "y": tile(b.rows, b.cols)}
    sizes = {"WIDTH": 2048, "ROWS": b.rows, "COLS": b.cols, "INNER": b.inner, "TRANSPOSED": transposed}
    return numbers | types, sizes, b

name = sys.argv[1]
function = getattr(kernels, "causal_product" if name in ("product", "transposed") else name)
types, sizes, blocks = arguments(name)
source = ASTSource(
    fn=function,
    signature={n: "constexpr" if n in sizes else types[n] for n in function.arg_names},
    constexprs={(function.arg_names.index(n),): value for n, value in sizes.items()},
)
options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
print(made.metadata.shared, made.asm["ptx"].count("wgmma.mma_async"))
"""


@pytest.mark.parametrize("kernel", ["attention_weights", "product", "transposed", "score_gradients"])
def test_kernel_compiles_for_hopper(kernel: str, tmp_path) -> None:
    script = tmp_path / "compile_kernel.py"  # Triton reads a kernel's source from its file
    script.write_text(COMPILE)
    done = run_python(script, kernel)
    assert done.returncode == 0, done.stdout[-3000:]
    shared, products = (int(number) for number in done.stdout.splitlines()[-1].split())
    assert 0 < shared <= SHARED_BYTES
    assert products > 0
