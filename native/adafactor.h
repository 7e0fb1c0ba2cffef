/* Adafactor's measure and apply for CPU tensors: the C interface of the native kernels.
 *
 * Equation numbers are those of docs/algorithm.md. All pointers are to dense memory, aligned to their element. A
 * factored parameter is seen as x[outer][rows][inner][columns], the columns contiguous: outer and inner index a stack
 * of matrices. The row statistic is [outer][rows][inner], the column statistic [outer][inner][columns]. A parameter
 * that is not factored is x[outer][columns] with rows = inner = 1 and outer = slices. A slice, outer / slices
 * consecutive blocks, has a clip factor and a scale of its own.
 *
 * Measure finishes the rows, of which it needs whole ones, and adds up the columns. With COLUMNS_FIRST it is the other
 * way round, for a shard that has whole columns and pieces of rows: wherever "row" stands below, read "column" and the
 * other way round, of `finished`, S, W and what divides them; `row` and `column` themselves stay what they are.
 *
 * T below is double for a float64 parameter and float for any other: the type of every statistic and of the math.
 */
#ifndef ADAFACTOR_H
#define ADAFACTOR_H

#include <stdint.h>

#if defined(_WIN32)
#define ADAFACTOR_API __declspec(dllexport)
#else
#define ADAFACTOR_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define ADAFACTOR_ABI 5

enum { ADAFACTOR_FLOAT32, ADAFACTOR_BFLOAT16, ADAFACTOR_FLOAT16, ADAFACTOR_FLOAT64 };

enum {
  ADAFACTOR_FACTORED = 1,
  ADAFACTOR_SCALE_PARAMETER = 2,    /* multiply the learning rate by max(eps2, RMS(x)), eq. 9 */
  ADAFACTOR_SCALE_AFTER_DECAY = 4,  /* RMS(x) of the decayed parameter (Keras), not of the one before (PyTorch) */
  ADAFACTOR_MAXIMIZE = 8,
  ADAFACTOR_SKIP_NONFINITE = 16,    /* leave a tensor alone whose gradient is not finite */
  ADAFACTOR_STOCHASTIC_ROUNDING = 32, /* of a bfloat16 or float16 parameter; see random.h */
  ADAFACTOR_Q_KNOWN = 64,           /* Q holds the sums of x^2 already: measure does not read x. Where they are not
                                       true, the step is mended, unless target is grad, which is gone then */
  ADAFACTOR_COLUMNS_FIRST = 128,    /* a factored tensor with inner = 1 only */
  /* Of a shard of which neither rows nor columns are whole, measure reads g twice, with a sum over shards in between: */
  ADAFACTOR_ROW_SUMS = 256,         /* finished = sums of g^2 along the rows, S and Q; W = 0 */
  ADAFACTOR_ROWS_SUMMED = 512,      /* finished holds these sums, complete: finish the rows, and W; S and Q stay */
  /* What lies on other shards of a matrix or of a slice, finish leaves out and then takes: */
  ADAFACTOR_MATRIX_SUMS = 1024,     /* stop at matrix_sums, which add up over shards */
  ADAFACTOR_TOTALS = 2048           /* after MATRIX_SUMS: take mu and u2 as they are */
};

enum { ADAFACTOR_BASELINE, ADAFACTOR_AVX2, ADAFACTOR_AVX512, ADAFACTOR_ISAS };

/* One parameter in one update. Every field is eight bytes wide. */
typedef struct adafactor_tensor {
  void* param;
  void* target;      /* where apply leaves the new param, or NULL for param itself, which is only read otherwise. It may be
                        grad, of the same dtype: the gradient is spent then. No other overlap */
  const void* grad;
  void* row;         /* T[outer][rows][inner], or the second moment T[outer][columns] if not factored */
  void* column;      /* T[outer][inner][columns]; unused if not factored */
  void* momentum;    /* of momentum_dtype, or NULL for none */
  void* momentum_target; /* where apply leaves the new momentum, or NULL for momentum itself */
  void* residual;    /* bfloat16, like param: what rounding the bfloat16 or float16 param has cut off, or NULL for none.
                        Not with STOCHASTIC_ROUNDING */
  double* Q;         /* [slices], eq. 6. measure: sums of x^2 (unless known). apply: those of the new x, as stored.
                        Needed with SCALE_PARAMETER only */
  void* finished;    /* T, like row (eq. 2): held here until apply commits it. Factored only. COLUMNS_FIRST: apply
                        overwrites it */
  void* S;           /* T, like column (eq. 4); T[slices], sums of g^2, if not factored. finish: sqrt(mu) column^(-1/2) */
  void* W;           /* T, like column (eq. 5); T[slices], sums of u^2 (eq. 11), if not factored. finish: the finished
                        column, which apply commits */
  double* step_size; /* [slices][2]. finish: the step (eq. 9), and 1 / what clipping divides by (eq. 10).
                        step takes NULL for finished, S, W and step_size, and keeps them to itself */
  double* matrix_sums; /* [outer * inner][2]: of each matrix the sum of its finished columns, and of W / column */
  double* mu;        /* [outer * inner]: means of the finished columns, with TOTALS */
  double* u2;        /* [slices]: sums of u^2 (eq. 7), with TOTALS */
  int64_t* count;    /* updates made so far, or NULL: apply adds 1 to it if it makes one */
  double* diagnostics; /* [slices][4], or NULL for none: of the update made RMS(u) before clipping (eq. 7),
                        what clipping divides by (eq. 10) and the parameter scale (eq. 9); if it makes none it adds 1
                        to the fourth. Filled by finish */
  int64_t outer, rows, inner, columns, slices;
  int64_t global_rows;      /* rows of the whole matrix, of which a shard holds some; 1 if not factored */
  int64_t global_size;      /* elements behind one clip factor, over all shards */
  int64_t global_columns;   /* columns of the whole matrix; of a whole slice if not factored */
  int64_t row_offset;       /* first row and column of the shard: they number elements for stochastic rounding only */
  int64_t column_offset;
  int64_t param_dtype, grad_dtype, momentum_dtype;
  uint64_t flags;
  double rho;        /* step size before the parameter scale, eq. 8 */
  double ema_weight; /* 1 - beta(t), eq. 1 */
  double eps1, eps2;
  double clip;       /* d of eq. 10; infinity switches clipping off */
  double decay_factor; /* x is multiplied by this before the step: 1 - learning_rate * weight_decay */
  double beta1;      /* momentum, eq. 12 */
  uint64_t seed, step, rng_stream; /* name the random numbers of this tensor in this update */
  int64_t skipped;   /* finish: 1 where SKIP_NONFINITE leaves the tensor alone, else 0 */
} adafactor_tensor;

/* Each returns 0, or 1: out of memory, 2: an unknown dtype, 3: a missing buffer, 4: an instruction set that this
 * machine or this build does not have, 5: COLUMNS_FIRST where it cannot be, 6: a residual beside stochastic rounding or
 * of a param that needs none, 7: a target that is grad, of another dtype. Nothing has been written then, except after 1. The result has the same bits for every
 * instruction set and every number of threads. */

/* Fills finished, S, W and Q, which add up over shards (all but finished). Commits nothing. */
ADAFACTOR_API int adafactor_measure(adafactor_tensor* tensors, int64_t count, int64_t threads, int64_t isa);
/* Equations 3, 7, 9 and 10: numbers per column, matrix and slice. Sets skipped. Commits nothing. */
ADAFACTOR_API int adafactor_finish(adafactor_tensor* tensors, int64_t count, int64_t threads, int64_t isa);
/* Commits the statistics and moves the parameters that are not skipped. */
ADAFACTOR_API int adafactor_apply(adafactor_tensor* tensors, int64_t count, int64_t threads, int64_t isa);
/* All three, on one device. */
ADAFACTOR_API int adafactor_step(adafactor_tensor* tensors, int64_t count, int64_t threads, int64_t isa);

/* Sets step of every tensor to the number of this update: one more than count. */
ADAFACTOR_API void adafactor_number(adafactor_tensor* tensors, int64_t count);

/* The addresses of GOMP_parallel and omp_get_max_threads in the OpenMP runtime that this process computes with: calls
 * that want no more threads than it has use those. Two null pointers: threads of our own, as before. */
ADAFACTOR_API void adafactor_use_openmp(void* parallel, void* most_threads);

/* answers[f][k] = what function f, of the C interface of a framework that returns 0, says of what is `offset` bytes
 * behind objects[k]; 0 where that is `none`. Returns what it returned instead of 0, if it did: not all is answered then. */
ADAFACTOR_API int adafactor_ask(int (*const* functions)(void*, int64_t*), int64_t function_count, char* const* objects,
                                int64_t count, int64_t offset, const void* none, int64_t* answers);

ADAFACTOR_API int64_t adafactor_abi(void);            /* ADAFACTOR_ABI * 65536 + sizeof(adafactor_tensor) */
ADAFACTOR_API int adafactor_built(int64_t isa);       /* whether the library holds this instruction set */
ADAFACTOR_API int adafactor_supported(int64_t isa);   /* whether this processor and system run it */

#ifdef __cplusplus
}
#endif
#endif
