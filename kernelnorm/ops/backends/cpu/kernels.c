/* The primitives of a KNConv for CPUs, in plain C, called through ctypes on raw pointers.
 *
 * Large tensors have shape (samples, channels, pixels). Threads share the work on their pixels, in
 * tiles of at most TILE pixels; loops.h has a function for each kind of tile and is compiled once
 * per dtype. The caller has checked every shape and stride. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* One source for several instruction sets: the loader picks the best one of the processor. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(KERNELNORM_ONE_TARGET)
#if __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#endif
#else
#define CLONES
#endif

#define TILE 256
#define FEW_CHANNELS 8 /* below, loops run along the pixels even where channels are adjacent */
enum { NONE, RELU, LEAKY }; /* activations */

#define HASH_MULTIPLIER 0x7FEB352Du

typedef struct {
  void *data;
  int64_t sample, pixel, channel; /* strides, in elements */
} Tensor;

/* The arguments of all functions; library.py has the same fields. Dimensions are aligned to the
 * right: an image is (1, height, width). Maps and vectors are contiguous. In the epilogue mu and
 * sums are the first term; means and rest are the second, or NULL. */
typedef struct {
  int64_t dtype, threads, dims, samples, channels, scratch, activation, threshold;
  int64_t sizes[3], positions[3], kernel[3], stride[3], padding[3], dilation[3];
  double mean, square, eps, grad_mean, grad_var, slope; /* see settings.py */
  Tensor x, grad, out;
  const int32_t *keys;
  void *mu, *rstd, *offset, *means;              /* maps */
  const void *sums, *rest, *bias;                /* vectors */
  void *pair, *grad_bias, *grad_sums;            /* (samples, 2, positions), and vectors */
  double *workspace;
} Call;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t volume(const int64_t *sizes) { return sizes[0] * sizes[1] * sizes[2]; }

/* ---- threads of PyTorch's OpenMP runtime, by pointer: the process has only one runtime ---- */

typedef void (*Tile)(const Call *call, int64_t sample, int64_t pixel, int64_t count,
                     int64_t thread);
typedef struct {
  const Call *call;
  Tile tile;
  const int64_t *sizes;
} Job;

static void (*run_team)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_number)(void);
static int (*team_size)(void);

void kernelnorm_set_threads(void *parallel, void *number, void *size) {
  run_team = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
  thread_number = (int (*)(void))number;
  team_size = (int (*)(void))size;
}

static void run_share(const Job *job, int64_t thread, int64_t team) {
  int64_t size = volume(job->sizes), all = job->call->samples * size;
  int64_t end = all * (thread + 1) / team;
  for (int64_t p = all * thread / team, count; p < end; p += count) {
    int64_t pixel = p % size;
    count = least(TILE, least(size - pixel, end - p));
    job->tile(job->call, p / size, pixel, count, thread);
  }
}

static void run_thread(void *job) { run_share(job, thread_number(), team_size()); }

static void run(const Call *call, Tile tile, const int64_t *sizes) {
  Job job = {call, tile, sizes};
  if (call->threads > 1 && run_team)
    run_team(run_thread, &job, (unsigned)call->threads, 0);
  else
    run_share(&job, 0, 1);
}

/* ---- masks: see mask.py ---- */

/* The keys of `count` pixels of a sample from `pixel` on. */
static void pixel_keys(const Call *call, int64_t sample, int64_t pixel, int64_t count,
                       uint32_t *out) {
  int64_t dims = call->dims, height = call->sizes[1], width = call->sizes[2];
  int64_t firsts = call->sizes[3 - dims];
  const uint32_t *first = (const uint32_t *)call->keys + call->channels + sample * firsts;
  const uint32_t *second = (const uint32_t *)call->keys + call->channels + call->samples * firsts;
  const uint32_t *third = dims == 3 ? second + height : second;
  int64_t w = pixel % width, h = pixel / width % height, d = pixel / width / height;
  for (int64_t j = 0; j < count; j++) {
    uint32_t key = first[dims == 1 ? w : dims == 2 ? h : d] | 1;
    if (dims == 3) key *= second[h] | 1;
    if (dims > 1) key *= third[w] | 1;
    out[j] = key;
    if (++w == width) w = 0, h++;
    if (h == height) h = 0, d++;
  }
}

INLINE int is_kept(uint32_t pixel_key, uint32_t channel_key, int32_t threshold) {
  uint32_t element = pixel_key * (channel_key | 1);
  element = (element ^ (element >> 15)) * HASH_MULTIPLIER;
  return (int32_t)element >= threshold;
}

/* ---- sums over windows ---- */

/* The sums of a map over `count` windows of a line, from window `first` on. Adds up the lines that
 * the windows span into `row`, then sums along `row`. */
CLONES static void box_sum(const Call *call, const double *map, int64_t line, int64_t first,
                           int64_t count, double *row, double *out) {
  const int64_t *sizes = call->sizes, *dilation = call->dilation, *kernel = call->kernel;
  int64_t step = call->stride[2], start = first * step - call->padding[2];
  int64_t span = (count - 1) * step + dilation[2] * (kernel[2] - 1) + 1;
  int64_t low = most(0, start), high = least(sizes[2], start + span);
  int64_t d0 = line / call->positions[1] * call->stride[0] - call->padding[0];
  int64_t h0 = line % call->positions[1] * call->stride[1] - call->padding[1];
  memset(row, 0, sizeof(double) * (size_t)span);
  for (int64_t i = 0; i < kernel[0] * kernel[1]; i++) {
    int64_t d = d0 + i / kernel[1] * dilation[0], h = h0 + i % kernel[1] * dilation[1];
    if (d < 0 || d >= sizes[0] || h < 0 || h >= sizes[1]) continue;
    const double *source = map + (d * sizes[1] + h) * sizes[2];
    for (int64_t w = low; w < high; w++) row[w - start] += source[w];
  }
  memset(out, 0, sizeof(double) * (size_t)count);
  for (int64_t k = 0; k < kernel[2]; k++) {
    const double *tap = row + k * dilation[2];
    if (step == 1)
      for (int64_t j = 0; j < count; j++) out[j] += tap[j];
    else
      for (int64_t j = 0; j < count; j++) out[j] += tap[j * step];
  }
}

/* ---- the tiles of each dtype: tensors of T, arithmetic in A ---- */

INLINE float load_float32(float x) { return x; }
INLINE float store_float32(float x) { return x; }
INLINE double load_float64(double x) { return x; }
INLINE double store_float64(double x) { return x; }

INLINE float load_bfloat16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE uint16_t store_bfloat16(float x) { /* rounds to nearest, ties to even */
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return (uint16_t)(x != x ? 0x7FC0 : rounded);
}

#define LOAD(x) NAME(load)(x)
#define STORE(x) NAME(store)(x)

#define T float
#define A float
#define NAME(name) name##_float32
#include "loops.h"
#define T double
#define A double
#define NAME(name) name##_float64
#include "loops.h"
#define T uint16_t
#define A float
#define NAME(name) name##_bfloat16
#include "loops.h"

#define OF_DTYPE(name) \
  (call->dtype == 0 ? name##_float32 : call->dtype == 1 ? name##_float64 : name##_bfloat16)

/* A checksum of the sources, from setup.py. */
#ifndef KERNELNORM_SOURCES
#define KERNELNORM_SOURCES 0
#endif
uint32_t kernelnorm_sources(void) { return KERNELNORM_SOURCES; }

/* Computes mu, rstd and, if asked for, offset and means of all windows of x.
 * workspace: three maps of the pixels, and `scratch` doubles per thread. */
void kernelnorm_window_statistics(const Call *call) {
  run(call, OF_DTYPE(pixel_tile), call->sizes);
  run(call, OF_DTYPE(window_tile), call->positions);
}

/* The output from the convolution's result x. With an activation, writes the output into x; else
 * the output into out and the numerator into x. */
void kernelnorm_epilogue(const Call *call) {
  run(call, OF_DTYPE(epilogue_tile), call->positions);
}

/* Computes out, pair, grad_bias and grad_sums from grad and x; x is the output or the numerator.
 * workspace: 4 * channels doubles per thread. */
void kernelnorm_epilogue_backward(const Call *call) {
  memset(call->workspace, 0, sizeof(double) * (size_t)(call->threads * 4 * call->channels));
  run(call, OF_DTYPE(backward_tile), call->positions);
  OF_DTYPE(sum_threads)(call);
}

/* Adds the gradient through the statistics to grad, in place.
 * workspace: `scratch` doubles per thread. */
void kernelnorm_statistics_backward(const Call *call) {
  run(call, OF_DTYPE(through_tile), call->sizes);
}
