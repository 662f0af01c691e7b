/* optim_squares: a step in two parts of rules that step by the norms of a tensor (LAMB), where tensors are
 * pieces of larger ones that several processes hold.
 *
 *   tt_optim_squares  writes |param|^2 and |direction|^2 of each piece; changes nothing
 *   tt_optim_step_by  from their sums over all pieces: tt_optim_step
 *
 * Neither clips nor looks for NaN or Inf: a piece does not know the others.
 */
#ifndef TRIMTAB_OPTIM_SQUARES_H_
#define TRIMTAB_OPTIM_SQUARES_H_
#include <trimtab/optim_step.h>
#ifdef __cplusplus
extern "C" {
#endif

/* squares: [n_tensors][2]; 0 where a tensor has no gradient or no elements. */
TT_API tt_status tt_optim_squares(const tt_optim_call* call, double* squares,
                                  const tt_parallel* parallel);
TT_API tt_status tt_optim_step_by(const tt_optim_call* call, const double* squares,
                                  const tt_parallel* parallel);

/* On CUDA, as tt_optim_step_cuda: squares are the device's and begin as 0; both on one stream with one
 * workspace. The first finds scale, found_inf and lr_tensor, and counts the step. */
TT_API tt_status tt_optim_squares_cuda(const tt_optim_call* call, const void* table,
                                       void* workspace, double* squares, tt_stream stream);
TT_API tt_status tt_optim_step_by_cuda(const tt_optim_call* call, const void* table,
                                       void* workspace, const double* squares, tt_stream stream);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_OPTIM_SQUARES_H_ */
