"""gated_mlp against the same module by module: addition, norm, gate and up, silu, product, and down, with adapters.

python -m bench.gated_mlp
"""

from typing import Any

from torch import Tensor

from bench.decoder_parts import Part, flops, inputs, one_by_one, resident, sizes
from bench.microbench import Op, Shape, Work, compiled, main
from vapr_kernels import add_rms_norm, gated_mlp, naive, swiglu


def vapr(x: Tensor, residual: Tensor, part: Part, *parameters: Any) -> tuple[Tensor, Tensor]:
    return gated_mlp(x, residual, part.norm.weight, part.eps, *part.linears)


def by_modules(x: Tensor, residual: Tensor, part: Part, *parameters: Any) -> tuple[Tensor, Tensor]:
    gate_up, down = part.linears
    normed, total = add_rms_norm(x, residual, part.norm.weight, part.eps)
    (out,) = one_by_one(swiglu(*one_by_one(normed, gate_up)), down)
    return out, total


def peft(x: Tensor, residual: Tensor, part: Part, *parameters: Any) -> tuple[Tensor, Tensor]:
    total = residual + x
    return part.layer.mlp(part.norm(total)), total


def truth(x: Tensor, residual: Tensor, part: Part, weight: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
    return naive.gated_mlp(x, residual, weight, part.eps, *part.with_parameters(parameters))


def work(shape: Shape, rows: int, name: str, element: int) -> Work:
    hidden, wide = shape["D"], shape["I"]
    layers = [(hidden, wide), (hidden, wide), (wide, hidden)]
    return Work(flops=flops(rows, layers, shape["R"], both=name != "forward"), count="2T(DO+R(D+O))")


OP = Op(
    name="gated_mlp",
    rows_name="tokens",
    passes=("forward", "forward + backward"),
    providers={
        "vapr": lambda: vapr, "vapr by modules": lambda: by_modules, "peft": lambda: peft,
        "torch.compile": compiled(peft),
    },
    inputs=inputs("post_attention_layernorm", [["gate_proj", "up_proj"], ["down_proj"]]),
    work=work,
    truth=truth,
    share_inputs=True,
    resident=resident,
    **sizes(["qwen2.5-vl-7b", "llava-1.5-7b"], ["small-qwen2.5-vl", "deep-qwen2.5-vl"]),
)  # fmt: skip

if __name__ == "__main__":
    main(OP)
