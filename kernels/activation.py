import triton
import triton.language as tl
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
def check_activation(op, activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected activation {' or '.join(ACTIVATIONS)}, got {activation!r}")
@triton.jit
def activate(t, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        t = tl.where(t < 0.0, 0.0, t)
    return t
