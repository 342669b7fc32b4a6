"""normed_attention against the same module by module: addition, norm, projections, attention, projection, adapters.

python -m bench.normed_attention

Every provider attends by the same call of PyTorch's attention, and none rotates.
"""

from typing import Any

from torch import Tensor

from bench.decoder_parts import Part, flops, inputs, one_by_one, resident, sequence_length, sizes
from bench.microbench import Op, Shape, Work, compiled, main
from vapr_kernels import add_rms_norm, naive, normed_attention, normed_linears


def vapr(x: Tensor, residual: Tensor, part: Part, *parameters: Any) -> tuple[Tensor, Tensor]:
    return normed_attention(x, residual, part.norm.weight, part.eps, *part.linears, part.attend)


def kept(x: Tensor, residual: Tensor, part: Part, *parameters: Any) -> tuple[Tensor, Tensor]:
    """As layers run on a CPU, where attending again is no small part of the work."""
    qkv, output = part.linears
    total, heads = normed_linears(x, residual, part.norm.weight, part.eps, qkv)
    (out,) = one_by_one(part.attend(*heads), output)
    return out, total


def by_modules(x: Tensor, residual: Tensor, part: Part, *parameters: Any) -> tuple[Tensor, Tensor]:
    qkv, output = part.linears
    normed, total = add_rms_norm(x, residual, part.norm.weight, part.eps)
    (out,) = one_by_one(part.attend(*one_by_one(normed, qkv)), output)
    return out, total


def peft(x: Tensor, residual: Tensor, part: Part, *parameters: Any) -> tuple[Tensor, Tensor]:
    total = residual + x
    normed = part.norm(total)
    attention = part.layer.self_attn
    attended = part.attend(attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
    return attention.o_proj(attended), total


def truth(x: Tensor, residual: Tensor, part: Part, weight: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
    return naive.normed_attention(x, residual, weight, part.eps, *part.with_parameters(parameters), part.attend)


def work(shape: Shape, rows: int, name: str, element: int) -> Work:
    """Each query and the keys up to its own: two products forward and four backward, with no score computed again."""
    hidden, both = shape["D"], name != "forward"
    keys = hidden // shape["H"] * shape["G"]
    layers = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    attended = 2.0 * hidden * rows * (sequence_length(shape, rows) + 1) / 2
    return Work(
        flops=flops(rows, layers, shape["R"], both=both) + (6 if both else 2) * attended,
        count="2T(DO+R(D+O)+D(S+1))",
    )  # fmt: skip


OP = Op(
    name="normed_attention",
    rows_name="tokens",
    passes=("forward", "forward + backward"),
    providers={
        "vapr": lambda: vapr, "vapr kept": lambda: kept, "vapr by modules": lambda: by_modules, "peft": lambda: peft,
        "torch.compile": compiled(peft),
    },
    inputs=inputs("input_layernorm", [["q_proj", "k_proj", "v_proj"], ["o_proj"]]),
    work=work,
    truth=truth,
    share_inputs=True,
    resident=resident,
    **sizes(["qwen2.5-vl-7b", "llava-1.5-7b"], ["small-qwen2.5-vl", "small-llava", "deep-qwen2.5-vl"]),
)  # fmt: skip

if __name__ == "__main__":
    main(OP)
