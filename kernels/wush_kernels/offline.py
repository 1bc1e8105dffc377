"""Compile kernels for GPUs that are not here, and read the instructions, registers and spills of the machine code.

A kernel's module lists `Case`s in a function `offline_cases()`. Run as a program in a process of its own, since a
failing compiler may abort, and since interpreted functions (`TRITON_INTERPRET=1`) cannot be compiled:

    python -m wush_kernels.offline wush_kernels.quantize 90 100 120        one JSON line a case and capability
"""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CAPABILITIES = (90, 100, 120)
SHARED_LIMITS = {90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes of shared memory a block may use


@dataclass(frozen=True)
class Case:
    """One specialization of a kernel.

    `types`: Triton's names of the arguments' types, such as `*bf16` and `i32`. `constants`: the constexprs.
    Pointers and integers are taken to be multiples of 16, as in real calls, but for those in `odd`. `expects`:
    by compute capability, patterns of which each must occur in the PTX; `forbids`: patterns of which none may.
    `capabilities`: those it is meant for; it is not compiled for others.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    expects: Mapping[int, tuple[str, ...]]
    num_warps: int = 4
    num_stages: int = 3
    odd: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = CAPABILITIES


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case: PTX, machine code statistics, and the patterns that failed.

    `missing`: expected and not there; `unwanted`: forbidden and there. `stack_bytes`: zero unless registers spill.
    """

    name: str
    capability: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    missing: tuple[str, ...]
    unwanted: tuple[str, ...]
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Without the code, ready for JSON."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in ("ptx", "cubin")}


def compile_case(case: Case, capability: int) -> Compiled:
    """Lower a case to PTX and machine code for a compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = [
        name
        for name, kind in case.types.items()
        if name not in case.odd and (kind.startswith("*") or kind in ("i32", "i64"))
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constants), attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    usage = _tool("cuobjdump", "-res-usage", cubin=cubin)
    patterns = case.expects.get(capability, ())
    return Compiled(
        name=case.name,
        capability=capability,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        stack_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        shared_bytes=compiled.metadata.shared,
        missing=tuple(pattern for pattern in patterns if not re.search(pattern, ptx)),
        unwanted=tuple(pattern for pattern in case.forbids if re.search(pattern, ptx)),
        ptx=ptx,
        cubin=cubin,
    )


def _tool(name: str, *arguments: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *arguments, file.name], capture_output=True, text=True, check=True).stdout


def cases(module: str, capability: int) -> Iterator[Case]:
    """A module's cases for a compute capability."""
    return (case for case in importlib.import_module(module).offline_cases() if capability in case.capabilities)


def main(module: str, *capabilities: str) -> None:
    """Compile every case of a module for each capability and print one JSON line each."""
    for capability in map(int, capabilities):
        for case in cases(module, capability):
            print(json.dumps(compile_case(case, capability).summary()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
