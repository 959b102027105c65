/* The primitives of a KNConv for CPUs, in plain C, called through ctypes on raw pointers.
 *
 * Large tensors have shape (samples, channels, pixels) and three strides, in elements. Maps and
 * vectors are contiguous. The binding checks every shape and stride before it calls.
 *
 * The loops are in loops.h, which is compiled once per dtype. They run over tiles of at most TILE
 * pixels of one sample. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* One source for several instruction sets; the loader picks the best that the processor has. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(KERNELNORM_ONE_TARGET)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#define TILE 64
#define FEW_CHANNELS 8 /* below, loops run along the pixels */
#define HASH_MULTIPLIER 0x7FEB352Du

enum { FLOAT32, FLOAT64, BFLOAT16 };

typedef struct {
  int64_t sample, pixel, channel;
} Strides;

/* Everything about a call that is not a pointer. Dimensions are aligned to the right: an image is
 * (1, height, width). library.py has the same fields. */
typedef struct {
  int64_t dtype, threads, dims, samples, channels, groups;
  int64_t sizes[3], positions[3], kernel[3], stride[3], padding[3], dilation[3];
  int64_t scratch; /* doubles of scratch memory for each thread */
  int64_t relu, keep_threshold;
  double mean, square, dropout_variance, eps, grad_mean, grad_var;
} Call;

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t volume(const int64_t *sizes) { return sizes[0] * sizes[1] * sizes[2]; }

/* ---- threads: those of PyTorch's own OpenMP runtime, by pointer, so that there is only one ---- */

typedef void (*Body)(void *task, int64_t begin, int64_t end, int64_t thread);
typedef struct {
  Body body;
  void *task;
  int64_t size;
} Job;

static void (*run_team)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_number)(void);
static int (*team_size)(void);

void kernelnorm_set_threads(void *parallel, void *number, void *size) {
  run_team = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
  thread_number = (int (*)(void))number;
  team_size = (int (*)(void))size;
}

static void run_share(void *argument) {
  Job *job = argument;
  int64_t thread = thread_number(), team = team_size();
  int64_t begin = job->size * thread / team, end = job->size * (thread + 1) / team;
  if (begin < end) job->body(job->task, begin, end, thread);
}

/* Shares the range [0, size) out over at most `threads` threads. */
static void parallel_for(Body body, void *task, int64_t size, int64_t threads) {
  Job job = {body, task, size};
  if (threads > 1 && run_team)
    run_team(run_share, &job, (unsigned)threads, 0);
  else if (size > 0)
    body(task, 0, size, 0);
}

/* ---- masks ---- */

typedef struct {
  const uint32_t *channels, *first, *second, *third; /* keys of channels and of each dimension */
} Keys;

static Keys split_keys(const Call *call, const int32_t *keys) {
  Keys split = {0};
  if (!keys) return split;
  const uint32_t *k = (const uint32_t *)keys;
  const int64_t *sizes = call->sizes;
  split.channels = k;
  split.first = k + call->channels;
  if (call->dims == 2) split.third = split.first + call->samples * sizes[1];
  if (call->dims == 3) {
    split.second = split.first + call->samples * sizes[0];
    split.third = split.second + sizes[1];
  }
  return split;
}

/* The keys of `count` pixels of a sample from `pixel` on. */
static void pixel_keys(const Call *call, Keys keys, int64_t sample, int64_t pixel, int64_t count,
                       uint32_t *out) {
  int64_t height = call->sizes[1], width = call->sizes[2];
  int64_t w = pixel % width, h = pixel / width % height, d = pixel / width / height;
  for (int64_t j = 0; j < count; j++) {
    int64_t first = call->dims == 1   ? sample * width + w
                    : call->dims == 2 ? sample * height + h
                                      : sample * call->sizes[0] + d;
    uint32_t key = keys.first[first] | 1;
    if (keys.second) key *= keys.second[h] | 1;
    if (keys.third) key *= keys.third[w] | 1;
    out[j] = key;
    if (++w == width) {
      w = 0;
      if (++h == height) h = 0, d++;
    }
  }
}

INLINE int is_kept(uint32_t pixel_key, uint32_t channel_key, int32_t threshold) {
  uint32_t element = pixel_key * (channel_key | 1);
  element = (element ^ (element >> 15)) * HASH_MULTIPLIER;
  return (int32_t)element >= threshold;
}

/* ---- sums over windows, of maps in double precision ---- */

/* Adds the sums over `count` windows of a line, from window `begin` on, to `out`: first the rows of
 * the windows into `row`, then along it. `line` is the window's index in the first two dimensions.
 */
CLONES static void box_sum(const Call *call, const double *map, int64_t line, int64_t begin,
                           int64_t count, double *row, double *out) {
  const int64_t *sizes = call->sizes, *dilation = call->dilation, *kernel = call->kernel;
  int64_t step = call->stride[2], start = begin * step - call->padding[2];
  int64_t span = (count - 1) * step + dilation[2] * (kernel[2] - 1) + 1;
  int64_t low = max64(0, start), high = min64(sizes[2], start + span);
  int64_t d0 = line / call->positions[1] * call->stride[0] - call->padding[0];
  int64_t h0 = line % call->positions[1] * call->stride[1] - call->padding[1];
  memset(row, 0, sizeof(double) * (size_t)span);
  for (int64_t i = 0; i < kernel[0]; i++) {
    int64_t d = d0 + i * dilation[0];
    if (d < 0 || d >= sizes[0]) continue;
    for (int64_t k = 0; k < kernel[1]; k++) {
      int64_t h = h0 + k * dilation[1];
      if (h < 0 || h >= sizes[1]) continue;
      const double *source = map + (d * sizes[1] + h) * sizes[2];
      for (int64_t w = low; w < high; w++) row[w - start] += source[w];
    }
  }
  for (int64_t j = 0; j < count; j++) out[j] = 0;
  for (int64_t k = 0; k < kernel[2]; k++) {
    const double *tap = row + k * dilation[2];
    if (step == 1)
      for (int64_t j = 0; j < count; j++) out[j] += tap[j];
    else
      for (int64_t j = 0; j < count; j++) out[j] += tap[j * step];
  }
}

/* ---- the loops of each dtype ---- */

typedef uint16_t bfloat16;

INLINE float load_float32(float x) { return x; }
INLINE float store_float32(float x) { return x; }
INLINE double load_float64(double x) { return x; }
INLINE double store_float64(double x) { return x; }

INLINE float load_bfloat16(bfloat16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE bfloat16 store_bfloat16(float x) { /* rounds to nearest, ties to even */
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return (bfloat16)(x != x ? 0x7FC0 : rounded);
}

#define T float
#define A float
#define NAME(name) name##_float32
#include "loops.h"
#define T double
#define A double
#define NAME(name) name##_float64
#include "loops.h"
#define T bfloat16
#define A float
#define NAME(name) name##_bfloat16
#include "loops.h"

#define DISPATCH(name, ...)                                    \
  do {                                                         \
    switch (call->dtype) {                                     \
      case FLOAT32: name##_float32(__VA_ARGS__); break;        \
      case FLOAT64: name##_float64(__VA_ARGS__); break;        \
      default: name##_bfloat16(__VA_ARGS__);                   \
    }                                                          \
  } while (0)

/* Mean and inverse standard deviation of all windows.
 * maps: workspace of (2 + groups) maps of the input's pixels, and `scratch` doubles per thread.
 * offset and means: (samples, groups, positions), or null. */
void kernelnorm_window_statistics(const Call *call, const void *x, const Strides *strides,
                                  const int32_t *keys, double *maps, void *mu, void *rstd,
                                  void *offset, void *means) {
  DISPATCH(window_statistics, call, x, strides, keys, maps, mu, rstd, offset, means);
}

/* The output from the convolution, in place if y is null; otherwise z keeps the numerator.
 * map_1 and map_2: (samples, groups, pixels); vector_1 and vector_2: (channels). */
void kernelnorm_epilogue(const Call *call, void *z, const Strides *z_strides, void *y,
                         const Strides *y_strides, const void *map_1, const void *vector_1,
                         const void *map_2, const void *vector_2, const void *rstd,
                         const void *bias) {
  DISPATCH(epilogue, call, z, z_strides, y, y_strides, map_1, vector_1, map_2, vector_2, rstd,
           bias);
}

/* pair: (samples, 2, pixels); sums: workspace of threads * 4 * channels doubles. */
void kernelnorm_epilogue_backward(const Call *call, const void *grad, const Strides *grad_strides,
                                  const void *kept, const Strides *kept_strides, void *grad_z,
                                  const Strides *z_strides, const void *mu, const void *rstd,
                                  const void *filter_sums, const void *bias, void *pair,
                                  void *grad_bias, void *grad_sums, double *sums) {
  DISPATCH(epilogue_backward, call, grad, grad_strides, kept, kept_strides, grad_z, z_strides, mu,
           rstd, filter_sums, bias, pair, grad_bias, grad_sums, sums);
}

/* Adds in place to grad. scratch: `scratch` doubles per thread. */
void kernelnorm_statistics_backward(const Call *call, void *grad, const Strides *grad_strides,
                                    const void *x, const Strides *x_strides, const void *pair,
                                    const int32_t *keys, double *scratch) {
  DISPATCH(statistics_backward, call, grad, grad_strides, x, x_strides, pair, keys, scratch);
}
