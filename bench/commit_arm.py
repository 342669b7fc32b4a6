"""One build of vapr in a process of its own: takes steps as it is told to, a line each, and answers with a line each.

    python bench/commit_arm.py TREE THREADS

:mod:`bench.commit_process` starts it by this file's path, so that the same lines drive every commit. What trains is
TREE's: of it only ``bench.arms`` and ``bench.workloads`` are used, in the way in which they could always be used.
"""

import gc
import importlib
import importlib.util
import inspect
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

OURS = ("bench", "vapr", "vapr_kernels")


def first_step(arm: Any) -> tuple[float, dict[str, Any]]:
    """Loss of a ``VaprArm``'s first step, and the gradients that its update would use; makes no update."""
    gradients = {}

    def keep() -> None:
        for name, master in arm.engine.masters.items():
            if master.grad is not None:
                gradients[name] = master.grad.detach().float().cpu().clone()
                master.grad = None

    arm.start(prebuilt=True)
    with mock.patch.object(arm.engine, "step", keep):
        arm()
    return arm.losses.pop(), gradients


class Build:
    """The cases of one commit, by name."""

    def __init__(self, tree: Path, threads: int) -> None:
        self.tree = tree
        use_only(tree)
        import torch

        torch.set_num_threads(threads)
        # This tree's, under another name: how a step is timed must not depend on the commit.
        self.clock = load_file(Path(__file__).with_name("record.py"), "clock")
        self.arms = importlib.import_module("bench.arms")
        self.workloads = importlib.import_module("bench.workloads")
        self.subjects: dict[str, Any] = {}
        self.pairs: dict[str, Any] = {}
        self.loaders: dict[str, Any] = {}
        self.arm: Any = None

    def open(self, order: dict[str, Any]) -> dict[str, Any]:
        """Build a subject whose model folder is the one of the order, read its rows, start its data processes."""
        import torch

        fields = {**order["shape"], "image_size": tuple(order["shape"]["image_size"])}
        shape = self.workloads.Shape(**fields)
        folder = Path(order["folder"])
        folder.mkdir(parents=True)
        subject = self.workloads.Subject(shape, folder, torch.device(order["device"]), lora=order["lora"])
        for file in Path(order["files"]).iterdir():
            if file.suffix in (".json", ".jinja"):
                shutil.copy(file, folder)
        vars(subject).pop("config", None)  # was read before the files were copied
        subject.processor = subject.new_processor()
        name = order["case"]
        self.subjects[name] = subject
        self.pairs[name] = list(self.workloads.read_pairs(Path(order["rows"])))
        self.loaders[name] = self.new_loader(name, order)
        return {}

    def new_loader(self, name: str, order: dict[str, Any]) -> Any:
        """Data processes ahead of the training, as a run has them; None of a commit whose arm starts them itself."""
        if "loader" not in inspect.signature(self.arms.VaprArm).parameters:
            return None
        subject = self.subjects[name]
        config = self.arms.vapr_config(subject, order["share"], order["pairs_per_step"], None)
        return self.arms.load_pairs(config, self.pairs[name], subject.new_processor())

    def build(self, order: dict[str, Any]) -> dict[str, Any]:
        """Build the arm of a case around the given weights, its reference in the cache."""
        import safetensors.torch
        import torch

        name = order["case"]
        subject, loader = self.subjects[name], self.loaders[name]
        weights, new_policy = safetensors.torch.load_file(order["weights"]), subject.policy

        def policy_of_the_weights(*args: Any, **kwargs: Any) -> Any:
            policy = new_policy(*args, **kwargs)
            with torch.no_grad():
                for parameter, value in policy.trained_parameters().items():
                    value.copy_(weights[parameter])
            return policy

        subject.policy = policy_of_the_weights
        loaders = {} if loader is None else {"loader": loader}
        self.arm = self.arms.VaprArm(
            subject, self.pairs[name], order["pairs_per_step"], share=order["share"], cached=True, **loaders
        )
        check_modules(self.tree)
        return {}

    def first_step(self, order: dict[str, Any]) -> dict[str, Any]:
        """Write the gradients of the first step into a file; answer its loss."""
        import safetensors.torch

        loss, gradients = first_step(self.arm)
        safetensors.torch.save_file(gradients, order["gradients"])
        return {"loss": loss}

    def start(self, order: dict[str, Any]) -> dict[str, Any]:
        """Go back to the first row."""
        self.arm.start(prebuilt=order["prebuilt"])
        return {}

    def step(self, order: dict[str, Any]) -> dict[str, Any]:
        """Take a step; answer its seconds, its loss, and the memory that it took, if asked to."""
        timing, device = self.clock.Timing(), self.arm.policy.device
        seconds = self.clock.step_here(self.arm, timing, device, self.clock.host_clock, watch_memory=order["watch"])
        memory = {"step_mib": timing.step_mib, "peak_mib": timing.peak_mib}
        return {"seconds": seconds, "loss": self.arm.losses[-1], **memory}

    def close(self, order: dict[str, Any]) -> dict[str, Any]:
        """Drop a case."""
        import torch

        self.arm = None
        loader = self.loaders.pop(order["case"], None)
        if loader is not None:
            loader.close()
        self.subjects.pop(order["case"], None), self.pairs.pop(order["case"], None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {}


def use_only(tree: Path) -> None:
    """Let nothing but ``tree`` serve vapr: an editable install elsewhere has modules that the commit lacks."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not is_editable(finder)]
    sys.path_hooks[:] = [hook for hook in sys.path_hooks if not is_editable(hook)]
    others = [entry for entry in sys.path[1:] if "__editable__" not in entry]  # the first is this file's folder
    sys.path[:] = [str(tree), str(tree / "kernels"), *others]
    sys.path_importer_cache.clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]


def is_editable(finder: Any) -> bool:
    """Whether setuptools put it there for an editable install."""
    return str(getattr(finder, "__module__", "")).startswith("__editable__")


def check_modules(tree: Path) -> None:
    """Raise ImportError if a module of vapr was loaded from anywhere else."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in OURS:
            file = getattr(module, "__file__", None) or next(iter(module.__path__))
            if not Path(file).resolve().is_relative_to(tree.resolve()):
                raise ImportError(f"{name} comes from {file}, not from {tree}")


def load_file(path: Path, name: str) -> ModuleType:
    """Import a file under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


def answer_to(build: Build, order: dict[str, Any]) -> dict[str, Any]:
    """Carry an order out; whatever a commit raises becomes the answer, and the reason of its absent row."""
    try:
        answer: dict[str, Any] = getattr(build, order["do"])(order)
    except Exception as error:  # noqa: BLE001
        if type(error).__name__ == "OutOfMemoryError":
            return {"out_of_memory": True}
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return answer


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    build = Build(Path(sys.argv[1]), int(sys.argv[2]))
    for line in sys.stdin:
        replies.write(json.dumps(answer_to(build, json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
