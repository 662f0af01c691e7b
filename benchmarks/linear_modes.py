"""bench_int8_linear's other questions: cliffs, instruction sets, the cost of a call."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial

import harness
import peers
import torch
from harness import Table, Timing

import trimtab.nn
from trimtab import ops


def layer_call(M: int, K: int, N: int, threads: int) -> peers.Call:
    problem = peers.problem(M, K, N, torch.float32, threads)
    return partial(trimtab.nn.Int8Linear.from_float(peers.linear(problem)), problem.x)


# --- no cliffs

# An odd shape and the one it would be padded to: K to 64, N to 16.
ODD = (((17, 1001, 4099), (17, 1024, 4112)), ((128, 1001, 1003), (128, 1024, 1008)),
       ((512, 769, 3071), (512, 832, 3072)), ((1, 4095, 4097), (1, 4096, 4112)))  # fmt: skip


def bench_sweep(options: argparse.Namespace) -> None:
    """Every M from 1 to 65 at K = N = 1024, then odd shapes beside padded ones."""
    table = Table("int8_linear_sweep", options.out)
    last, size = (9, 256) if options.quick else (65, 1024)
    problem = peers.problem(last, size, size, torch.float32, options.threads)
    layer = trimtab.nn.Int8Linear.from_float(peers.linear(problem))
    calls = {str(M): partial(layer, problem.x[:M]) for M in range(1, last + 1)}
    times = harness.interleave(calls, 0.5 if options.quick else 30.0, keep=calls)
    steps: dict[int, float] = {}
    for M in range(1, last + 1):
        table.add("trimtab int8", "fp32->fp32", ("M", str(M)), times[str(M)], K=size, N=size)
        if M > 1:
            steps[M] = times[str(M)].median / times[str(M - 1)].median
    worst = max(steps, key=lambda M: steps[M])
    print(f"\nsweep M = 1...{last} at K = N = {size}: {times['1'].median:.1f} to ", end="")
    print(f"{times[str(last)].median:.1f} us; largest step {steps[worst]:.3f} to M = {worst}")
    for odd, padded in ODD[-1:] if options.quick else ODD:
        calls = {
            "odd": layer_call(*odd, options.threads),
            "padded": layer_call(*padded, options.threads),
        }
        pair = harness.interleave(calls, 0.3 if options.quick else 2.0)
        ratio = pair["odd"].median / pair["padded"].median
        names = [",".join(map(str, case)) for case in (odd, padded)]
        print(f"odd {names[0]} takes {ratio:.3f} × the time of {names[1]}", flush=True)
        table.add("trimtab int8", "odd", ("M,K,N", names[0]), pair["odd"], padded=names[1])
        table.add("trimtab int8", "padded", ("M,K,N", names[1]), pair["padded"])
    table.write()


# --- instruction sets

COMPUTE_BOUND = ((128, 768, 3072), (512, 1024, 4096), (2048, 1024, 1024))
# What the libraries under torch are told, so that they run as on a machine without AVX-512.
AVX2_MACHINE = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
# Each machine: its environment, and the paths measured on it.
MACHINES = {
    "AVX2": (AVX2_MACHINE, ("avx2", "avxvnni")),
    "this": ({}, ("avx2", "avxvnni", "avx512", "amx")),
}


def bench_isa(options: argparse.Namespace) -> None:
    """Each instruction set against torch fp32: as this machine runs it, and as an AVX2 one does.

    Both run in a child process, since torch's libraries read their limits when they load.
    """
    table = Table("int8_linear_isa", options.out)
    print()
    for machine, (limits, isas) in MACHINES.items():
        wanted = [isa for isa in isas if isa in ops.available_isas()]
        shapes = ((32, 256, 256),) if options.quick else COMPUTE_BOUND
        task = {
            "isas": wanted,
            "shapes": shapes,
            "threads": options.threads,
            "quick": options.quick,
        }
        command = [sys.executable, __file__, json.dumps(task)]
        child = subprocess.run(
            command, env={**os.environ, **limits}, stdout=subprocess.PIPE, text=True, check=True
        )
        for name, shape, figures in json.loads(child.stdout):
            value = Timing(*figures)
            table.add(name, f"{machine} machine", ("M,K,N", shape), value)
            if name == "torch fp32":
                fp32 = value
                continue
            ratio = fp32.median / value.median
            print(
                f"{machine + ' machine':<13} {shape:<16} {name:<8} {value.median:10.1f} us, ",
                end="",
            )
            print(f"{ratio:.2f} × torch fp32's speed", flush=True)
    table.write()


def isa_child(task: dict) -> list:
    """[name, shape, timing] of torch fp32 and of each path, in the same rounds."""
    torch.set_num_threads(task["threads"])
    torch.set_grad_enabled(False)
    found = []
    for shape in task["shapes"]:
        problem = peers.problem(*shape, torch.float32, task["threads"])
        layer = trimtab.nn.Int8Linear.from_float(peers.linear(problem))

        def run(isa: str, layer: torch.nn.Module = layer, x: torch.Tensor = problem.x) -> None:
            ops.set_isa(isa)
            layer(x)

        calls = {"torch fp32": peers.torch_fp32(problem)}
        calls |= {isa: partial(run, isa) for isa in task["isas"]}
        times = harness.interleave(calls, 0.3 if task["quick"] else 4.0, keep=calls, min_rounds=5)
        for name, value in times.items():
            figures = (value.median, value.p20, value.p80, value.rounds)
            found.append([name, ",".join(map(str, shape)), figures])
    return found


# --- the cost of a call


def bench_overhead(options: argparse.Namespace) -> None:
    """1×64×64: nearly nothing to compute, so that the call itself is what takes time."""
    table = Table("int8_linear_overhead", options.out)
    problem = peers.problem(1, 64, 64, torch.float32, options.threads)
    linear = peers.linear(problem)
    layer = trimtab.nn.Int8Linear.from_float(linear)
    calls = {"Int8Linear": partial(layer, problem.x), "nn.Linear": partial(linear, problem.x)}
    times = harness.interleave(calls, 0.3 if options.quick else 3.0)
    for name, value in times.items():
        table.add(name, "fp32->fp32", ("M,K,N", "1,64,64"), value)
    ours, theirs = times["Int8Linear"].median, times["nn.Linear"].median
    print(f"\ncall of 1×64×64: Int8Linear {ours:.2f} us, nn.Linear {theirs:.2f} us, ", end="")
    print(f"{ours - theirs:+.2f} us")
    table.write()


if __name__ == "__main__":
    json.dump(isa_child(json.loads(sys.argv[1])), sys.stdout)
