"""Count what a reader of this code has to carry: lines, long lists of arguments, repeated runs, docstrings with shapes.

python scripts/count.py [TREE]                # another work tree, to compare with
python scripts/count.py --path [TREE]         # files and functions entered from vapr train to the first loss
"""

import argparse
import ast
import collections
import contextlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

SHAPE = re.compile(r"\((?:[A-Z]|\.\.\.|[a-z' ]+,)[\w+*. ,']*\)|\bshape|scalar")
PATTERN = re.compile(r"\bre\.(?:compile|search|match|fullmatch|sub|split|findall|finditer)\(")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--path", action="store_true", help="run vapr train on one pair and count what it enters")
    options = parser.parse_args()
    tree = options.tree.resolve()
    if options.path:
        follow_to_loss(tree)
        return
    files = sorted([*tree.glob("vapr/**/*.py"), *tree.glob("kernels/**/*.py")])
    folders: dict[str, list[int]] = collections.defaultdict(list)
    for file in files:
        folders[str(file.parent.relative_to(tree))].append(len(file.read_text().splitlines()))
    for folder, lines in folders.items():
        print(f"{folder:28} {len(lines):3} files {sum(lines):6,} lines, longest {max(lines)}")
    print(f"{'in all':28} {len(files):3} files {sum(map(sum, folders.values())):6,} lines")
    product = [function for file in files if "kernels" not in file.parts for function in functions(file)]
    print("longest argument list outside kernels:", max((num_arguments(f), f.name) for f in product))
    print("longest function outside kernels:", max((f.end_lineno - f.lineno + 1, f.name) for f in product))
    print("runs of six lines that stand twice:", len(repeated_runs(files)))
    print("uses of re. in editing:", sum(len(PATTERN.findall(f.read_text())) for f in files if "editing" in f.parts))
    arrays = [f for file in files for f in functions(file) if takes_arrays(f)]
    shapes = [f for f in arrays if SHAPE.search(ast.get_docstring(f) or "")]
    print(f"public functions of arrays whose docstring gives shapes: {len(shapes)} of {len(arrays)}")


def functions(file: Path) -> Iterator[Any]:
    """Yield the functions and methods of a file, those inside functions left out."""
    for node in ast.parse(file.read_text()).body:
        for inner in [node, *(node.body if isinstance(node, ast.ClassDef) else ())]:
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                yield inner


def num_arguments(function: Any) -> int:
    """Count the arguments of a function, self left out."""
    given = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return len(given) - bool(given and given[0].arg in ("self", "cls"))


def takes_arrays(function: Any) -> bool:
    """Tell whether a public function takes or returns arrays; kernels are not called by people."""
    if function.name.startswith("_") or (function.decorator_list and "jit" in ast.unparse(function.decorator_list[0])):
        return False
    annotations = [a.annotation for a in function.args.args + function.args.kwonlyargs if a.annotation]
    return bool(
        re.search("Tensor|ndarray", " ".join(map(ast.unparse, [*annotations, *filter(None, [function.returns])])))
    )


def repeated_runs(files: list[Path]) -> list[str]:
    """Return runs of six lines of code, blank lines, comments and imports left out, that stand in two places."""
    places: collections.Counter[str] = collections.Counter()
    for file in files:
        lines = [line.strip() for line in file.read_text().splitlines()]
        lines = [line for line in lines if line and not line.startswith(("import", "from", "#"))]
        places.update("\n".join(lines[n : n + 6]) for n in range(len(lines) - 5))
    return [run for run, count in places.items() if count > 1 and len(run) > 120]


def follow_to_loss(tree: Path) -> None:
    """Train on one pair with a data worker and print what is entered, in all and from the first call for a step."""
    sys.path[:0] = [str(tree), str(tree / "kernels")]
    from vapr.cli import main as vapr
    from vapr.demo.tiny_policy import build_tiny_policy

    ours = (f"{tree}/vapr/", f"{tree}/kernels/")
    entered: list[tuple[str, str]] = []
    after: list[int] = []
    calls: list[str] = []

    def note(frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or calls or "<" in code.co_name or not code.co_filename.startswith(ours):
            return
        if code.co_name == "steps" and not after:
            after.append(len(entered))
        entered.append((code.co_filename, code.co_qualname))
        if code.co_name in ("preference_loss", "preference_losses"):
            while frame is not None:
                if frame.f_code.co_filename.startswith(ours):
                    calls.append(frame.f_code.co_qualname)
                frame = frame.f_back

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        model = build_tiny_policy(
            "qwen2_5_vl", folder / "model", ["It is red. What colour is it?"] * 50, vocab_size=300
        )
        Image.new("RGB", (56, 56), "red").save(folder / "a.png")
        pair = {"images": ["a.png"], "prompt": "What is it?", "chosen": "It is red.", "rejected": "It is blue."}
        (folder / "pairs.jsonl").write_text(json.dumps(pair))
        config = {
            "run_dir": str(folder / "run"),
            "policy": {"model": str(model), "dtype": "float32", "lora": {"rank": 4, "alpha": 8}},
            "data": {"train": str(folder / "pairs.jsonl"), "workers": 1},
            "reference": {"cache_dir": str(folder / "cache")},
            "optim": {"pairs_per_step": 1, "max_steps": 1},
        }
        (folder / "run.yaml").write_text(json.dumps(config))
        sys.setprofile(note)
        vapr(["train", str(folder / "run.yaml")], standalone_mode=False)
        sys.setprofile(None)
    for what, part in (("from the command", entered), ("after set-up", entered[after[0] :])):
        print(f"{what}: {len({file for file, _ in part})} files, {len(set(part))} functions")
    print("calls:", " -> ".join(reversed(calls)))


if __name__ == "__main__":
    main()
