"""The int8 linear layers one could use instead of ours, each behind the same small factory.

A factory takes a Problem and returns a callable that computes ``x @ weight.T + bias`` once, in the
dtype of the problem, or raises Absent with the reason why it can't here.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Call = Callable[[], Any]


class Absent(Exception):
    """Why a peer is not measured."""


@dataclass(frozen=True)
class Problem:
    """``x`` [M, K], ``weight`` [N, K], ``bias`` [N]: float32, or all three bfloat16."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    threads: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.x.shape, self.weight.shape[0])  # type: ignore[return-value]


def problem(M: int, K: int, N: int, dtype: torch.dtype, threads: int) -> Problem:
    """Normal random data, the weight scaled as a trained layer's is, so that outputs are near 1."""
    generator = torch.Generator().manual_seed(M * 7919 + K * 31 + N)
    x = torch.randn(M, K, generator=generator)
    weight = torch.randn(N, K, generator=generator) / K**0.5
    bias = torch.randn(N, generator=generator)
    return Problem(x.to(dtype), weight.to(dtype), bias.to(dtype), threads)


def load(package: str) -> Any:
    """The package, or Absent with what importing it said. Its warnings are kept off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise Absent(str(error).splitlines()[0][:120]) from error
    finally:
        logging.disable(before)


def linear(p: Problem) -> nn.Linear:
    layer = nn.Linear(p.weight.shape[1], p.weight.shape[0], dtype=p.weight.dtype)
    layer.weight.data, layer.bias.data = p.weight.clone(), p.bias.clone()
    return layer.eval()


def torch_fp32(p: Problem) -> Call:
    return lambda: nn.functional.linear(p.x, p.weight, p.bias)


def torch_bf16(p: Problem) -> Call:
    """On a float32 layer with the two casts that such a layer then needs."""
    weight, bias = p.weight.bfloat16(), p.bias.bfloat16()
    if p.x.dtype == torch.bfloat16:
        return lambda: nn.functional.linear(p.x, weight, bias)
    return lambda: nn.functional.linear(p.x.bfloat16(), weight, bias).float()


def torch_int_mm(p: Problem) -> Call:
    """What one writes by hand: quantize per row, torch._int_mm, scale and add, all eager."""
    scale = p.weight.float().abs().amax(1) / 127
    quantized = (p.weight.float() / scale[:, None]).round().to(torch.int8).t()
    bias = p.bias.float()

    def call() -> Tensor:
        x = p.x.float()
        absmax = x.abs().amax(1, keepdim=True)
        q = (x * (127 / absmax)).round_().to(torch.int8)
        acc = torch._int_mm(q, quantized).float()
        return acc.mul_(scale).mul_(absmax / 127).add_(bias).to(p.x.dtype)

    return call


def quantize_dynamic(engine: str) -> Callable[[Problem], Call]:
    """torch.ao.quantization.quantize_dynamic, whose weights are packed for one engine."""

    def build(p: Problem) -> Call:
        if engine not in torch.backends.quantized.supported_engines:
            raise Absent(f"this torch has no {engine} engine")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.backends.quantized.engine = engine
            model = torch.ao.quantization.quantize_dynamic(
                nn.Sequential(linear(p)), {nn.Linear}, dtype=torch.qint8
            )
        layer = model[0]

        def call() -> Tensor:
            torch.backends.quantized.engine = engine  # 0.3 us; the run-time choice reads it too
            return layer(p.x)

        return call

    return build


def onnxruntime_int8(p: Problem) -> Call:
    """ONNX Runtime's dynamic quantization: the graph that its quantize_dynamic makes.

    Symmetric int8 weights with a scale a column; its optimizer fuses the six nodes into one.
    """
    ort, onnx = load("onnxruntime"), load("onnx")
    h, numpy_helper = onnx.helper, onnx.numpy_helper
    weight = p.weight.float().numpy()
    scale = (np.abs(weight).max(1) / 127).astype(np.float32)
    q = np.rint(weight / scale[:, None]).astype(np.int8).T.copy()
    constants = {"w": q, "w_zero": np.zeros(len(scale), np.int8), "w_scale": scale}
    constants["b"] = p.bias.float().numpy()
    nodes = [
        h.make_node("DynamicQuantizeLinear", ["x"], ["xq", "x_scale", "x_zero"]),
        h.make_node("MatMulInteger", ["xq", "w", "x_zero", "w_zero"], ["acc"]),
        h.make_node("Cast", ["acc"], ["facc"], to=onnx.TensorProto.FLOAT),
        h.make_node("Mul", ["x_scale", "w_scale"], ["scale"]),
        h.make_node("Mul", ["facc", "scale"], ["scaled"]),
        h.make_node("Add", ["scaled", "b"], ["y"]),
    ]
    M, K, N = p.shape
    value = h.make_tensor_value_info
    graph = h.make_graph(
        nodes,
        "linear",
        [value("x", onnx.TensorProto.FLOAT, [M, K])],
        [value("y", onnx.TensorProto.FLOAT, [M, N])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = p.threads, 3
    session = ort.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
    x = p.x.numpy()
    return lambda: session.run(None, {"x": x})[0]


def openvino(precision: str) -> Callable[[Problem], Call]:
    """OpenVINO's CPU plug-in: bf16 inference, or compressed int8 weights with dynamic quantization."""

    def build(p: Problem) -> Call:
        ov = load("openvino")
        op = load("openvino.opset13")
        x = op.parameter(list(p.x.shape), ov.Type.f32)
        weight = p.weight.float().numpy()
        if precision == "int8":
            scale = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
            q = op.convert(op.constant(np.rint(weight / scale).astype(np.int8)), "f32")
            node = op.multiply(q, op.constant(scale))
        else:
            node = op.constant(weight)
        y = op.add(op.matmul(x, node, False, True), op.constant(p.bias.float().numpy()[None]))
        config = {"INFERENCE_NUM_THREADS": p.threads, "PERFORMANCE_HINT": "LATENCY"}
        config["INFERENCE_PRECISION_HINT"] = "f32" if precision == "int8" else "bf16"
        if precision == "int8":
            config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(2**64 - 1)  # one scale a row
        compiled = ov.Core().compile_model(ov.Model([y], [x]), "CPU", config)
        request, data = compiled.create_infer_request(), p.x.numpy()
        return lambda: request.infer([data], share_inputs=True, share_outputs=True)[0]

    return build


def torchao(p: Problem) -> Call:
    """torchao's dynamic int8 activations and weights, compiled, as its documentation says to."""
    quantization = load("torchao.quantization")
    model = nn.Sequential(linear(p))
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False)
    return lambda: compiled(p.x)


def bitsandbytes(p: Problem) -> Call:
    """Linear8bitLt on the CPU, all columns in int8 (threshold 0)."""
    bnb = load("bitsandbytes")
    _, K, N = p.shape
    layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict({"weight": p.weight.clone(), "bias": p.bias.clone()})
    layer = layer.to("cpu").eval()
    x = p.x
    if type(layer(x[:1])) is not Tensor:
        raise Absent("its CPU layer gives no tensor")
    return lambda: layer(x)


FP32 = {
    "torch fp32": torch_fp32,
    "torch bf16 (casts)": torch_bf16,
    "torch._int_mm": torch_int_mm,
    "quantize_dynamic x86": quantize_dynamic("x86"),
    "quantize_dynamic onednn": quantize_dynamic("onednn"),
    "ONNX Runtime int8": onnxruntime_int8,
    "OpenVINO bf16": openvino("bf16"),
    "OpenVINO int8": openvino("int8"),
    "torchao int8 (compiled)": torchao,
    "bitsandbytes int8": bitsandbytes,
}
BF16 = {"torch bf16": torch_bf16, "torch._int_mm": torch_int_mm}

# Relative error against float64 that a correct peer stays below: bf16 keeps 8 bits; int8 with one
# scale a tensor, two operands: about 1.5 %.
TOLERANCE = 0.04


def build(
    peers: dict[str, Callable[[Problem], Call]], p: Problem
) -> tuple[dict[str, Call], dict[str, str]]:
    """Callables of the peers that work, and the reason for each that doesn't.

    A peer that raises, or whose answer is wrong, is named with what it said: it can't be compared.
    """
    calls, absent = {}, {}
    truth = expected(p)
    for name, factory in peers.items():
        try:
            call = factory(p)
            error = relative_error(call(), truth)
            if not error <= TOLERANCE:
                raise Absent(f"wrong answer: relative error {error:.3g}")
            calls[name] = call
        except Absent as reason:
            absent[name] = str(reason)
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return calls, absent


def expected(p: Problem) -> Tensor:
    """The float64 answer for the first rows, which is enough to tell right from wrong."""
    return p.x[:64].double() @ p.weight.double().T + p.bias.double()


def relative_error(answer: Any, truth: Tensor) -> float:
    out = torch.as_tensor(np.asarray(answer) if not isinstance(answer, Tensor) else answer)
    return float((out[: len(truth)].double() - truth).norm() / truth.norm())
