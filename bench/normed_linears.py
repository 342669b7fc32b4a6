"""normed_linears against the same module by module: addition, norm, and queries, keys and values with their adapters.

python -m bench.normed_linears
"""

from typing import Any

from torch import Tensor

from bench.decoder_parts import Part, flops, inputs, one_by_one, resident, sizes
from bench.microbench import Op, Shape, Work, compiled, main
from vapr_kernels import add_rms_norm, naive, normed_linears


def vapr(x: Tensor, residual: Tensor, part: Part, *parameters: Any) -> tuple[Tensor, ...]:
    total, heads = normed_linears(x, residual, part.norm.weight, part.eps, part.linears[0])
    return *heads, total


def by_modules(x: Tensor, residual: Tensor, part: Part, *parameters: Any) -> tuple[Tensor, ...]:
    normed, total = add_rms_norm(x, residual, part.norm.weight, part.eps)
    return *one_by_one(normed, part.linears[0]), total


def peft(x: Tensor, residual: Tensor, part: Part, *parameters: Any) -> tuple[Tensor, ...]:
    total = residual + x
    normed = part.norm(total)
    attention = part.layer.self_attn
    return attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed), total


def truth(x: Tensor, residual: Tensor, part: Part, weight: Tensor, *parameters: Any) -> tuple[Tensor, ...]:
    total, heads = naive.normed_linears(x, residual, weight, part.eps, *part.with_parameters(parameters))
    return *heads, total


def work(shape: Shape, rows: int, name: str, element: int) -> Work:
    keys = shape["D"] // shape["H"] * shape["G"]
    layers = [(shape["D"], out) for out in (shape["D"], keys, keys)]
    return Work(flops=flops(rows, layers, shape["R"], both=name != "forward"), count="2T(DO+R(D+O))")


OP = Op(
    name="normed_linears",
    rows_name="tokens",
    passes=("forward", "forward + backward"),
    providers={
        "vapr": lambda: vapr, "vapr by modules": lambda: by_modules, "peft": lambda: peft,
        "torch.compile": compiled(peft),
    },
    inputs=inputs("input_layernorm", [["q_proj", "k_proj", "v_proj"]]),
    work=work,
    truth=truth,
    share_inputs=True,
    resident=resident,
    **sizes(["qwen2.5-vl-7b", "llava-1.5-7b"], ["small-qwen2.5-vl", "small-llava", "deep-qwen2.5-vl"]),
)  # fmt: skip

if __name__ == "__main__":
    main(OP)
