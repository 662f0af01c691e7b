import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def check_activation(op, activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected activation in {list(ACTIVATIONS)}, got {activation!r}")


@triton.jit
def _min(a, b):
    return tl.where(a < b, a, b)


@triton.jit
def _max(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _pow2(n):
    return (_bits(n + 8388735.0) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _ldexp(x, n):
    n1 = _max(-100.0, n)
    return x * _pow2(n1) * _pow2(n - n1)


@triton.jit
def gelu(x):
    t = _min(14.5, tl.abs(x))
    h = (_bits(t) & -4096).to(tl.float32, bitcast=True)
    l = t - h
    u = h * h
    v = l * (t + h)
    n = (u * -0.7213475 + 12582912.0) - 12582912.0
    r = (u + n * 1.38629150390625) + (v + n * 2.8e-06)
    z = r * r
    a = z + 40.0101999114
    b = r * (z * 0.0416138629178 + 10.0025499586)
    p = (((t * 0.39 + 3.9) * t + 17.7) * t + 42.5) * t + 48.5
    q = ((((t + 9.8) * t + 45.5) * t + 116.6) * t + 162.0) * t + 97.0
    w = _ldexp(tl.div_rn((t * p) * (a - b), q * (a + b)), n)
    return _max(0.0, x) - w


@triton.jit
def activate(t, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return _max(0.0, t)
    elif ACTIVATION == "none":
        return t
    else:
        return tl.map_elementwise(gelu, t) if not INTERPRETED else gelu(t)
