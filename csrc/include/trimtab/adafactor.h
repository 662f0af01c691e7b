/* adafactor: one step of Adafactor over all tensors of a model (Shazeer and Stern, arXiv:1804.04235), with
 * torch.optim.Adafactor's formulas; csrc/math/adafactor.h has them.
 *
 * The second moment of a matrix is a row and a column: state 0 is row_var [batch, rows, 1], state 1 col_var
 * [batch, 1, columns]. A vector keeps all of it: state 0 is variance [numel].
 *
 * Everything that tt_optim_step folds in is folded in here: gradients are unscaled and clipped, the step
 * is skipped after an overflow, parameters are shrunk, masked, averaged and copied, gradients zeroed. What a
 * mask takes out counts for no sum.
 *
 * Where tensors are pieces of larger ones, held by several processes, the step is made in parts, and
 * between them the processes add up `sums`:
 *
 *   TT_ADAFACTOR_SQUARES     writes row sums and column sums
 *   TT_ADAFACTOR_AVERAGE     from whole row and column sums: row_var, col_var; writes sums of row_var
 *   TT_ADAFACTOR_DIRECTION   from whole sums of row_var: variance; writes |param|^2 and |direction|^2
 *   TT_ADAFACTOR_UPDATE      from whole squares: param, and all else; counts the step
 */
#ifndef TRIMTAB_ADAFACTOR_H_
#define TRIMTAB_ADAFACTOR_H_
#include <trimtab/optim_step.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef enum tt_adafactor_part {
  TT_ADAFACTOR_WHOLE = 0,
  TT_ADAFACTOR_SQUARES = 1,
  TT_ADAFACTOR_AVERAGE = 2,
  TT_ADAFACTOR_DIRECTION = 3,
  TT_ADAFACTOR_UPDATE = 4
} tt_adafactor_part;

/* Beside lr, weight_decay, l1 and TT_MAXIMIZE of the tt_optim_group with the same index. */
typedef struct tt_adafactor_group {
  double beta2_decay, eps1, eps2, d;
} tt_adafactor_group;

typedef struct tt_adafactor_shape {
  int64_t batch, rows, columns; /* batch * rows * columns == numel; rows == 0: a vector of numel */
  int64_t whole_rows, whole_columns,
      whole_numel; /* of the tensor that this one is a piece of, or its own */
  int64_t sums_at; /* index into sums, with room for tt_adafactor_sums(shape); read only in parts */
} tt_adafactor_shape;

typedef struct tt_adafactor_call {
  const tt_optim_call* step; /* rule and torch_tails are not read; states are not 8-bit */
  const tt_adafactor_group* groups; /* [step->n_groups] */
  const tt_adafactor_shape* shapes; /* [step->n_tensors] */
  double* sums; /* of each tensor |param|^2, |direction|^2, sums of row_var [batch], row sums
                   [batch * rows], column sums [batch * columns]; NULL: the step is made whole */
  int32_t part; /* tt_adafactor_part */
  int32_t reserved;
} tt_adafactor_call;

TT_API tt_status tt_adafactor_step(const tt_adafactor_call* call, const tt_parallel* parallel);

/* On CUDA (libtrimtab_cuda.so), as tt_optim_step_cuda: groups and shapes are the host's, sums the device's and
 * all 0 before the first part. The parts of a step follow each other on one stream with one workspace; it is
 * the first of them that finds scale, found_inf and lr_tensor, and counts the step. One table serves until a
 * tensor, a group or a shape changes. The bits are those of tt_adafactor_step. */
TT_API tt_status tt_adafactor_sizes_cuda(const tt_adafactor_call* call, int64_t* table,
                                         int64_t* workspace);
TT_API tt_status tt_adafactor_table_cuda(const tt_adafactor_call* call, void* table);
TT_API tt_status tt_adafactor_step_cuda(const tt_adafactor_call* call, const void* table,
                                        void* workspace, tt_stream stream);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_ADAFACTOR_H_ */
