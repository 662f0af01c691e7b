/* optim_step: one optimizer step over all tensors of a model, in one call (NUMERICS.md section 6).
 *
 *   g = grad / grad_scale * clip,  negated if the group maximizes
 *   param, state = rule(param, g, state)             the formulas stand in csrc/math/<rule>.h
 *   param = sign(param) * max(|param| - lr * l1, 0)  if l1 > 0
 *   param, state = 0                                 where mask is 0
 *   ema = ema + (1 - ema_decay) * (param - ema)
 *   copy = param, rounded;  grad = 0 if zero_grad
 *
 *   clip = min(1, max_norm / (norm + 1e-6)),  norm = sqrt(sum of (grad / grad_scale)^2 over all tensors)
 *
 * A step happens or it doesn't: everything is checked before anything is written, and with a found_inf
 * that is not 0 (or a NaN or Inf among the gradients, where skip_nonfinite asks) no parameter, state or
 * step count changes; only `skipped` does, and the gradients if they were to be zeroed.
 *
 * States may be 8-bit codes, one fp32 scale for each 256 of them (math/dynamic_code.h); bf16 parameters may
 * have a master (math/master.h). With stochastic rounding, 8-bit states, bf16 states and bf16 parameters
 * without a master round by a hash of (seed, step count, index of the tensor, element)
 * (math/stochastic_rounding.h): the same for any instruction set and number of threads.
 */
#ifndef TRIMTAB_OPTIM_STEP_H_
#define TRIMTAB_OPTIM_STEP_H_
#include <trimtab/trimtab.h>
#ifdef __cplusplus
extern "C" {
#endif

#define TT_OPTIM_STATES 4
#define TT_OPTIM_STATE_BLOCK 256 /* elements that share a scale */
#define TT_DYNAMIC8 16 /* a state_dtype beside those of tt_dtype: 8-bit codes */

/* The states of each rule, in order; those in brackets only with their flag or option. */
typedef enum tt_rule {
  TT_SGD = 0,     /* [momentum_buffer: momentum] */
  TT_ADAM = 1,    /* exp_avg, exp_avg_sq, [max_exp_avg_sq: amsgrad]; AdamW is Adam, decoupled */
  TT_ADAGRAD = 2, /* sum */
  TT_RMSPROP = 3, /* square_avg, [momentum_buffer: momentum], [grad_avg: centered] */
  TT_NADAM = 4,   /* exp_avg, exp_avg_sq; product: mu_product */
  TT_RADAM = 5,   /* exp_avg, exp_avg_sq */
  TT_ADAMAX = 6,  /* exp_avg, exp_inf */
  TT_LION = 7,    /* exp_avg */
  TT_LAMB = 8,    /* exp_avg, exp_avg_sq */
  TT_RULES
} tt_rule;

typedef enum tt_optim_flag {
  TT_MAXIMIZE = 1,
  TT_AMSGRAD = 2,
  TT_NESTEROV = 4,
  TT_DECOUPLED = 8, /* weight decay multiplies the parameter instead of entering the gradient */
  TT_CENTERED = 16,
  TT_BIAS_CORRECTION = 32, /* LAMB: divide the averages by 1 - beta^t */
  TT_ALWAYS_ADAPT = 64,    /* LAMB: without weight decay too */
} tt_optim_flag;

/* What a bf16 parameter keeps beside itself. */
typedef enum tt_master {
  TT_MASTER_NONE = 0,
  TT_MASTER_KAHAN = 1, /* bf16: what rounding took off, to be added next time */
  TT_MASTER_REMAINDER = 2, /* int16: the lower half of an exact fp32 */
} tt_master;

/* The hyper-parameters of a group of tensors, under torch's names; a rule ignores those it has not. */
typedef struct tt_optim_group {
  double lr, beta1, beta2, eps, weight_decay;
  double momentum, dampening; /* SGD; momentum: RMSprop too */
  double alpha;               /* RMSprop */
  double lr_decay;            /* Adagrad */
  double momentum_decay;      /* NAdam */
  double l1;                  /* strength of the proximal shrinkage after the update; 0: none */
  int64_t flags;              /* tt_optim_flag, or-ed */
  const float* lr_tensor;     /* CUDA: on the device, stands for lr; NULL: lr. The CPU takes lr */
} tt_optim_group;

/* One parameter. All arrays have numel elements in the same order; none overlaps another. */
typedef struct tt_optim_tensor {
  void* param;
  void* grad; /* NULL: this parameter is left alone, and its step count */
  void* state[TT_OPTIM_STATES];
  float* ema;     /* NULL: no average */
  void* copy;     /* a copy of the parameter in another dtype; NULL: none */
  uint8_t* mask;  /* 0: pruned; NULL: nothing is */
  float* step;    /* how many steps were made, counted up by one; NULL for SGD and Lion */
  float* product; /* NAdam's mu_product */
  float* scale[TT_OPTIM_STATES]; /* [ceil(numel / 256)] of 8-bit states */
  void* master; /* of 16 bits an element, as master_kind says */
  int64_t numel;
  int32_t group; /* index into groups */
  uint8_t param_dtype, grad_dtype, state_dtype, copy_dtype; /* tt_dtype */
  int32_t fresh; /* SGD: momentum_buffer holds nothing yet */
  int32_t master_kind; /* tt_master */
} tt_optim_tensor;

typedef struct tt_optim_call {
  int32_t rule; /* tt_rule */
  int32_t zero_grad, skip_nonfinite;
  int32_t
      torch_tails; /* Adam: round the last numel % 8 elements (16 in 16 bits) as torch's kernel does;
                          0: as all others, so that a tensor in pieces gives the bits of the whole */
  const tt_optim_tensor* tensors;
  int64_t n_tensors;
  const tt_optim_group* groups;
  int64_t n_groups;
  const float* grad_scale; /* the loss was multiplied by it; NULL: 1 */
  const float* found_inf; /* not 0: skip; NULL: no one looked */
  double max_norm; /* clip the gradients to this norm; < 0: don't */
  double ema_decay;
  float* norm; /* receives the norm before clipping, where it is computed; or NULL */
  int64_t* skipped; /* counted up when the step is skipped; or NULL */
  const float* given_norm; /* clip as if this were the norm; NULL: compute it */
  int32_t round_clipped; /* as clip_grad_norm_ does it: coefficient and clipped gradients rounded to
                            the gradient's dtype; 0: they stay in fp32 on their way into the rule */
  int32_t reserved;
  int64_t stochastic; /* round what is narrower than fp32 stochastically; all tensors need a step */
  uint64_t seed;
} tt_optim_call;

TT_API tt_status tt_optim_step(const tt_optim_call* call, const tt_parallel* parallel);

/* 8-bit states to and from fp32, rounded to nearest: x [n], codes [n], scale [ceil(n / 256)]. Of the rules'
 * states exp_avg, momentum_buffer and grad_avg have a sign, the others are never negative. */
TT_API tt_status tt_optim_encode(const float* x, int64_t n, int32_t is_signed, uint8_t* codes,
                                 float* scale);
TT_API tt_status tt_optim_decode(const uint8_t* codes, const float* scale, int64_t n,
                                 int32_t is_signed, float* x);

/* On CUDA (libtrimtab_cuda.so): tensors and groups are the host's, all else that the call points to is the
 * device's. The kernels read tensors and groups from a table, which is made on the host and copied to the
 * device, both aligned to 64 bytes; one table serves every step until a tensor or a group changes, or
 * torch_tails. Step counts, grad_scale, found_inf and lr_tensor are read, and everything is decided, on the
 * device; the bits are those of tt_optim_step. */
TT_API tt_status tt_optim_step_sizes_cuda(const tt_optim_call* call, int64_t* table,
                                          int64_t* workspace);
TT_API tt_status tt_optim_step_table_cuda(const tt_optim_call* call, void* table);
TT_API tt_status tt_optim_step_cuda(const tt_optim_call* call, const void* table, void* workspace,
                                    tt_stream stream);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_OPTIM_STEP_H_ */
