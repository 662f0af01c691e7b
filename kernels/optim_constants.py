"""What all elements of a tensor share, from its step count on the device: csrc/math/<rule>.h's
<rule>_constants and csrc/math/power.h, line for line, for a vector of tensors, in float64.

Each is cast to fp32 once and stored in the order of the C++ struct.
"""

from __future__ import annotations

import triton
import triton.language as tl

CONSTANTS = tl.constexpr(20)  # room for those of any rule, then the threshold of the shrinkage
THRESHOLD = tl.constexpr(19)
LAMB_LR, LAMB_ADAPTS, LAMB_RATE = (tl.constexpr(i) for i in (8, 9, 10))  # rate: the probe's
# Adafactor's numbers of a group, in the places of others'; rate: the last of the direction's programs'
BETA2_DECAY, ADAFACTOR_EPS1, ADAFACTOR_EPS2, ADAFACTOR_D = (tl.constexpr(i) for i in (2, 3, 5, 6))
ADAFACTOR_RATE = tl.constexpr(4)
LARGEST = tl.constexpr(float.fromhex("0x1.fffffep127"))  # of fp32

LOG_096 = tl.constexpr(
    (float.fromhex("-0x1.4e69ed6d80eb3p-5"), float.fromhex("-0x1.067d54cb9a84cp-60"))
)
LOG2 = tl.constexpr((float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")))
INVERSE = tl.constexpr(
    (
        (2.0**-3, 0.0),
        (float.fromhex("0x1.2492492492492p-3"), float.fromhex("0x1.2492492492492p-57")),
        (float.fromhex("0x1.5555555555555p-3"), float.fromhex("0x1.5555555555555p-57")),
        (float.fromhex("0x1.999999999999ap-3"), float.fromhex("-0x1.999999999999ap-57")),
        (0.25, 0.0),
        (float.fromhex("0x1.5555555555555p-2"), float.fromhex("0x1.5555555555555p-56")),
        (0.5, 0.0),
        (1.0, 0.0),
    )
)

# --- power.h: pairs of doubles, high + low


@triton.jit
def _fast_sum(a, b):
    total = a + b
    return total, b - (total - a)


@triton.jit
def _add(a_high, a_low, b):
    total = a_high + b
    part = total - a_high
    lost = (a_high - (total - part)) + (b - part)
    return _fast_sum(total, lost + a_low)


@triton.jit
def _multiply(a_high, a_low, b_high, b_low):
    product = a_high * b_high
    lost = tl.fma(a_high, b_high, product * -1.0)
    return _fast_sum(product, lost + (a_high * b_low + a_low * b_high))


@triton.jit
def power(x, n):
    """x^n for 0 <= x <= 1 and a count n of steps."""
    high, low = x * 0.0 + 1.0, x * 0.0
    square_high, square_low = x, x * 0.0
    left = n.to(tl.int64)
    while tl.max(left, axis=0) > 0:
        taken_high, taken_low = _multiply(high, low, square_high, square_low)
        high = tl.where(left & 1 != 0, taken_high, high)
        low = tl.where(left & 1 != 0, taken_low, low)
        square_high, square_low = _multiply(square_high, square_low, square_high, square_low)
        left = left >> 1
    return high + low


@triton.jit
def _exponential(t_high, t_low):
    """e^t for t <= 0, high and low."""
    zero = t_high * 0.0
    # rint, ties to even: |t / log 2| < 1010, and beside 1.5 * 2^52 there is no room for a fraction
    k = (t_high * 1.4426950408889634 + 6755399441055744.0) - 6755399441055744.0
    r_high, r_low = _add(t_high - k * LOG2[0], t_low, k * LOG2[1] * -1.0)
    r_high = r_high * 0.00390625
    r_low = r_low * 0.00390625
    high, low = zero + 1.0, zero
    for i in tl.static_range(8):
        high, low = _multiply(high, low, r_high, r_low)
        high, low = _multiply(high, low, zero + INVERSE[i][0], zero + INVERSE[i][1])
        high, low = _add(high, low, zero + 1.0)
    for _ in tl.static_range(8):
        high, low = _multiply(high, low, high, low)
    scale = ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    normal = t_high >= -700.0
    rest = tl.where(t_high < -700.0, zero, t_high)
    return tl.where(normal, high * scale, rest), tl.where(normal, low * scale, zero)


@triton.jit
def power_of_096(y):
    """0.96^y for y >= 0."""
    zero = y * 0.0
    t_high, t_low = _multiply(y, zero, zero + LOG_096[0], zero + LOG_096[1])
    high, low = _exponential(t_high, t_low)
    return high + low


@triton.jit
def power_of_count(n, y):
    """n^y for a count n >= 1 of steps and y <= 0."""
    zero = n * 0.0
    guess = tl.log(n)
    high, low = _exponential(guess * -1.0, zero)
    one_high, one_low = _multiply(n, zero, high, low)
    d = (one_high - 1.0) + one_low
    log_high, log_low = _fast_sum(guess, d - 0.5 * d * d)
    t_high, t_low = _multiply(y, zero, log_high, log_low)
    high, low = _exponential(t_high, t_low)
    return high + low


# --- optim_rule.h


@triton.jit
def _store(out, at: tl.constexpr, value, mask):
    tl.store(out + at, value.to(tl.float32), mask=mask)


@triton.jit
def _store_lerp(out, at: tl.constexpr, weight, mask):
    w = weight.to(tl.float32)
    _store(out, at, tl.where(w < 0.5, w, w - 1.0), mask)
    _store(out, at + 1, tl.where(w < 0.5, 0.0, 1.0), mask)


@triton.jit
def _rounded(x, dtype):
    """fp32 of x as the parameter's dtype has it."""
    x = x.to(tl.float32)
    half = tl.where(dtype == 2, x.to(tl.float16).to(tl.float32), x)
    return tl.where(dtype == 1, x.to(tl.bfloat16).to(tl.float32), half)


@triton.jit
def group_number(group, at: tl.constexpr, mask):
    return tl.load(group + at, mask=mask, other=0).to(tl.float64, bitcast=True)


@triton.jit
def group_lr(group, mask):
    """lr, or what lr_tensor holds."""
    lr = group_number(group, 0, mask)
    address = tl.load(group + 12, mask=mask, other=0)
    there = mask & (address != 0)
    given = tl.load(address.to(tl.pointer_type(tl.float32)), mask=there, other=0.0)
    return tl.where(there, given.to(tl.float64), lr)


@triton.jit
def store_constants(out, group, lr, step, product, dtype, mask, RULE: tl.constexpr):
    """The constants of ``RULE`` for a vector of tensors; returns the new product (NAdam's).

    out: where the constants of each begin; group: where the row of its group does, in the table;
    lr, step: float64; dtype: tt_dtype of the parameter.
    """
    beta1 = group_number(group, 1, mask)
    beta2 = group_number(group, 2, mask)
    eps = group_number(group, 3, mask)
    weight_decay = group_number(group, 4, mask)
    flags = tl.load(group + 11, mask=mask, other=0)
    factor = tl.where(flags & 8 != 0, 1.0 - lr * weight_decay, tl.zeros_like(lr) + 1.0)
    if RULE == "SGD":
        _store(out, 0, lr * -1.0, mask)
        _store(out, 1, weight_decay, mask)
        _store(out, 2, group_number(group, 5, mask), mask)
        _store(out, 3, 1.0 - group_number(group, 6, mask), mask)
    elif RULE == "Adagrad":
        rate = lr / (1.0 + (step - 1.0) * group_number(group, 8, mask))
        for i in tl.static_range(2):
            whole = dtype * (1 - i)  # 0, fp32, for the tail
            _store(out, 3 * i, _rounded(rate * -1.0, whole), mask)
            _store(out, 3 * i + 1, _rounded(weight_decay, whole), mask)
            _store(out, 3 * i + 2, _rounded(eps, whole), mask)
    elif RULE == "RMSprop":
        alpha = group_number(group, 7, mask)
        _store_lerp(out, 0, 1.0 - alpha, mask)
        _store(out, 2, lr * -1.0, mask)
        _store(out, 3, weight_decay, mask)
        _store(out, 4, alpha, mask)
        _store(out, 5, 1.0 - alpha, mask)
        _store(out, 6, group_number(group, 5, mask), mask)
        _store(out, 7, eps, mask)
    elif RULE == "Adamax":
        _store_lerp(out, 0, 1.0 - beta1, mask)
        _store(out, 2, weight_decay, mask)
        _store(out, 3, beta2, mask)
        _store(out, 4, eps, mask)
        _store(out, 5, lr / (1.0 - power(beta1, step)) * -1.0, mask)
    elif RULE == "Lion":
        _store_lerp(out, 0, 1.0 - beta1, mask)
        _store_lerp(out, 2, 1.0 - beta2, mask)
        _store(out, 4, 1.0 - lr * weight_decay, mask)
        _store(out, 5, lr, mask)
    elif RULE == "LAMB":
        one = tl.zeros_like(lr) + 1.0
        corrected = flags & 32 != 0
        _store_lerp(out, 0, 1.0 - beta1, mask)
        _store(out, 2, weight_decay, mask)
        _store(out, 3, beta2, mask)
        _store(out, 4, 1.0 - beta2, mask)
        _store(out, 5, tl.where(corrected, 1.0 - power(beta1, step), one), mask)
        _store(out, 6, tl.sqrt(tl.where(corrected, 1.0 - power(beta2, step), one)), mask)
        _store(out, 7, eps, mask)
        _store(out, LAMB_LR, lr, mask)
        _store(
            out, LAMB_ADAPTS, tl.where((weight_decay != 0.0) | (flags & 64 != 0), 1.0, 0.0), mask
        )
        _store(out, LAMB_RATE, lr, mask)
    elif RULE == "Adafactor":
        limit = 1.0 / group_number(group, ADAFACTOR_EPS1, mask)
        _store_lerp(out, 0, power_of_count(step, group_number(group, BETA2_DECAY, mask)), mask)
        _store(out, 2, tl.where(limit < LARGEST, limit, tl.zeros_like(limit) + LARGEST), mask)
        _store(out, 3, 1.0 - lr * weight_decay, mask)
    else:  # Adam, NAdam and RAdam begin alike
        _store_lerp(out, 0, 1.0 - beta1, mask)
        _store(out, 2, factor, mask)
        _store(out, 3, weight_decay, mask)
        _store(out, 4, beta2, mask)
        _store(out, 5, 1.0 - beta2, mask)
        power2 = power(beta2, step)
        if RULE == "Adam":
            _store(out, 6, lr / (1.0 - power(beta1, step)) * -1.0, mask)
            _store(out, 7, tl.sqrt(1.0 - power2), mask)
            _store(out, 8, eps, mask)
        elif RULE == "NAdam":
            decay = group_number(group, 9, mask)
            now = beta1 * (1.0 - 0.5 * power_of_096(step * decay))
            next = beta1 * (1.0 - 0.5 * power_of_096((step + 1.0) * decay))
            product = product * now.to(tl.float32)
            so_far = product.to(tl.float64)
            _store(out, 6, tl.sqrt(1.0 - power2), mask)
            _store(out, 7, eps, mask)
            _store(out, 8, lr * (1.0 - now) / (1.0 - so_far) * -1.0, mask)
            _store(out, 9, lr * next / (1.0 - so_far * next) * -1.0, mask)
        else:
            limit = 2.0 / (1.0 - beta2) - 1.0
            rho = limit - 2.0 * step * power2 / (1.0 - power2)
            correction1 = 1.0 - power(beta1, step)
            over = (rho - 4.0) * (rho - 2.0) * limit
            under = (limit - 4.0) * (limit - 2.0) * rho
            rectified = tl.where(rho > 5.0, tl.sqrt(over / under), tl.zeros_like(lr))
            plain = tl.where(rectified > 0.0, tl.zeros_like(lr), tl.zeros_like(lr) + 1.0)
            _store(out, 6, eps, mask)
            _store(out, 7, tl.sqrt(1.0 - power2) * (lr * rectified / correction1) * -1.0, mask)
            _store(out, 8, lr * plain / correction1 * -1.0, mask)
    return product
