/* The loops of kernels.c for one dtype: tensors of T, arithmetic in A. Included once per dtype.
 *
 * Each loop has two forms: along the channels of a pixel if they lie side by side (rows), and along
 * the pixels of a channel otherwise (calles), for any strides. */

#ifndef LOAD
#define LOAD(x) NAME(load)(x)
#define STORE(x) NAME(store)(x)
#endif

/* ---- statistics of each pixel ---- */

typedef struct {
  const Call *call;
  const T *x;
  Strides strides;
  Keys keys;
  double *maps; /* mean, mean square, and the plain mean of each group: (map, sample, pixel) */
  int with_means;
} NAME(PixelTask);

/* Sums differences to the pixel's first channel, which are small where the mean is large. */
INLINE void NAME(finish_pixel)(double first, double sum, double square, double kept, double n,
                               double *mean, double *mean_square) {
  double shift = first * (kept / n);
  *mean = sum / n + shift;
  *mean_square = square / n + (2 * (sum / n) + shift) * first;
}

CLONES static void NAME(pixel_rows)(const NAME(PixelTask) *task, const T *x, int64_t count,
                                    const uint32_t *pixel_key, double *mean, double *square,
                                    double *means, int64_t map) {
  const Call *call = task->call;
  int64_t channels = call->channels, per_group = channels / call->groups;
  int32_t threshold = (int32_t)call->keep_threshold;
  const uint32_t *channel_key = task->keys.channels;
  for (int64_t j = 0; j < count; j++) {
    const T *row = x + j * task->strides.pixel;
    A first = LOAD(row[0]), s = 0, q = 0, n = (A)channels;
    if (task->with_means)
      for (int64_t g = 0; g < call->groups; g++) {
        const T *part = row + g * per_group;
        A t = 0;
#pragma omp simd reduction(+ : t)
        for (int64_t c = 0; c < per_group; c++) t += LOAD(part[c]) - first;
        means[g * map + j] = (double)t / (double)per_group + first;
      }
    if (channel_key) {
      uint32_t key = pixel_key[j];
      n = 0;
#pragma omp simd reduction(+ : s, q, n)
      for (int64_t c = 0; c < channels; c++) {
        A kept = is_kept(key, channel_key[c], threshold) ? 1 : 0;
        A d = (LOAD(row[c]) - first) * kept;
        s += d, q += d * d, n += kept;
      }
    } else {
#pragma omp simd reduction(+ : s, q)
      for (int64_t c = 0; c < channels; c++) {
        A d = LOAD(row[c]) - first;
        s += d, q += d * d;
      }
    }
    NAME(finish_pixel)(first, s, q, n, (double)channels, mean + j, square + j);
  }
}

CLONES static void NAME(pixel_planes)(const NAME(PixelTask) *task, const T *x, int64_t count,
                                      const uint32_t *pixel_key, double *mean, double *square,
                                      double *means, int64_t map) {
  const Call *call = task->call;
  int64_t channels = call->channels, per_group = channels / call->groups;
  int64_t step = task->strides.pixel;
  int32_t threshold = (int32_t)call->keep_threshold;
  A first[TILE], s[TILE] = {0}, q[TILE] = {0}, n[TILE] = {0}, t[TILE] = {0}, value[TILE];
  for (int64_t j = 0; j < count; j++) first[j] = LOAD(x[j * step]);
  for (int64_t c = 0; c < channels; c++) {
    const T *plane = x + c * task->strides.channel;
    if (step == 1)
      for (int64_t j = 0; j < count; j++) value[j] = LOAD(plane[j]) - first[j];
    else
      for (int64_t j = 0; j < count; j++) value[j] = LOAD(plane[j * step]) - first[j];
    if (task->with_means) {
      for (int64_t j = 0; j < count; j++) t[j] += value[j];
      if ((c + 1) % per_group == 0)
        for (int64_t j = 0; j < count; j++) {
          means[c / per_group * map + j] = (double)t[j] / (double)per_group + first[j];
          t[j] = 0;
        }
    }
    if (task->keys.channels) {
      uint32_t channel_key = task->keys.channels[c];
      for (int64_t j = 0; j < count; j++) {
        A kept = is_kept(pixel_key[j], channel_key, threshold) ? 1 : 0;
        A d = value[j] * kept;
        s[j] += d, q[j] += d * d, n[j] += kept;
      }
    } else {
      for (int64_t j = 0; j < count; j++) s[j] += value[j], q[j] += value[j] * value[j];
    }
  }
  for (int64_t j = 0; j < count; j++)
    NAME(finish_pixel)(first[j], s[j], q[j], task->keys.channels ? n[j] : (A)channels,
                       (double)channels, mean + j, square + j);
}

static void NAME(pixels)(void *argument, int64_t begin, int64_t end, int64_t thread) {
  const NAME(PixelTask) *task = argument;
  const Call *call = task->call;
  int64_t size = volume(call->sizes), map = call->samples * size;
  int rows = task->strides.channel == 1 && call->channels >= FEW_CHANNELS;
  uint32_t keys[TILE];
  (void)thread;
  for (int64_t p = begin; p < end;) {
    int64_t sample = p / size, pixel = p % size;
    int64_t count = min64(TILE, min64(size - pixel, end - p));
    const T *x = task->x + sample * task->strides.sample + pixel * task->strides.pixel;
    if (task->keys.channels) pixel_keys(call, task->keys, sample, pixel, count, keys);
    (rows ? NAME(pixel_rows) : NAME(pixel_planes))(task, x, count, keys, task->maps + p,
                                                   task->maps + map + p,
                                                   task->maps + 2 * map + p, map);
    p += count;
  }
}

/* ---- statistics of each window ---- */

typedef struct {
  const Call *call;
  const double *maps;
  double *scratch;
  A *mu, *rstd, *offset, *means;
} NAME(WindowTask);

static void NAME(windows)(void *argument, int64_t begin, int64_t end, int64_t thread) {
  const NAME(WindowTask) *task = argument;
  const Call *call = task->call;
  int64_t size = volume(call->sizes), map = call->samples * size;
  int64_t positions = volume(call->positions), width = call->positions[2];
  double pixels = (double)volume(call->kernel);
  double mean[TILE], square[TILE], *row = task->scratch + thread * call->scratch;
  for (int64_t p = begin; p < end;) {
    int64_t sample = p / positions, position = p % positions;
    int64_t line = position / width, first = position % width;
    int64_t count = min64(TILE, min64(width - first, end - p));
    const double *maps = task->maps + sample * size;
    box_sum(call, maps, line, first, count, row, mean);
    box_sum(call, maps + map, line, first, count, row, square);
    for (int64_t j = 0; j < count; j++) {
      double mu = mean[j] * call->mean;
      double var = square[j] * call->square * (1 + call->dropout_variance) - mu * mu;
      mean[j] = mu;
      task->mu[p + j] = (A)mu;
      task->rstd[p + j] = (A)(1 / sqrt((var < 0 ? 0 : var) + call->eps));
    }
    if (task->means)
      for (int64_t g = 0; g < call->groups; g++) {
        int64_t place = (sample * call->groups + g) * positions + position;
        box_sum(call, maps + (2 + g) * map, line, first, count, row, square);
        for (int64_t j = 0; j < count; j++) {
          task->means[place + j] = (A)(square[j] / pixels);
          task->offset[place + j] = (A)(mean[j] - square[j] / pixels);
        }
      }
    p += count;
  }
}

static void NAME(window_statistics)(const Call *call, const T *x, const Strides *strides,
                                    const int32_t *keys, double *maps, A *mu, A *rstd, A *offset,
                                    A *means) {
  int64_t size = call->samples * volume(call->sizes);
  NAME(PixelTask) pixels = {call, x, *strides, split_keys(call, keys), maps, means != NULL};
  parallel_for(NAME(pixels), &pixels, size, call->threads);
  double *scratch = maps + (2 + call->groups) * size;
  NAME(WindowTask) windows = {call, maps, scratch, mu, rstd, offset, means};
  parallel_for(NAME(windows), &windows, call->samples * volume(call->positions), call->threads);
}

/* ---- epilogue ---- */

typedef struct {
  const Call *call;
  T *z, *y;
  Strides z_strides, y_strides;
  const A *map_1, *vector_1, *map_2, *vector_2, *rstd, *bias;
} NAME(EpilogueTask);

INLINE A NAME(activate)(A x, int relu) { return relu && x < 0 ? 0 : x; } /* keeps NaN */

/* `maps` is the place of the tile in a map of one channel, `place` in one of a channel per group. */
CLONES static void NAME(epilogue_rows)(const NAME(EpilogueTask) *task, T *z, T *y, int64_t count,
                                       int64_t maps, int64_t place) {
  const Call *call = task->call;
  int64_t pixels = volume(call->positions), per_group = call->channels / call->groups;
  for (int64_t g = 0; g < call->groups; g++) {
    int64_t c = g * per_group;
    const A *vector_1 = task->vector_1 + c, *bias = task->bias ? task->bias + c : NULL;
    const A *vector_2 = task->vector_2 ? task->vector_2 + c : NULL;
    for (int64_t j = 0; j < count; j++) {
      T *restrict in = z + j * task->z_strides.pixel + c;
      T *restrict out = y ? y + j * task->y_strides.pixel + c : in;
      A m = task->map_1[place + g * pixels + j], r = task->rstd[maps + j];
      A m2 = task->map_2 ? task->map_2[place + g * pixels + j] : 0;
      if (y || !bias || vector_2) {
#pragma omp simd
        for (int64_t k = 0; k < per_group; k++) {
          A value = LOAD(in[k]) - m * vector_1[k] - (vector_2 ? m2 * vector_2[k] : 0);
          if (y) in[k] = STORE(value);
          out[k] = STORE(NAME(activate)(value * r + (bias ? bias[k] : 0), !y));
        }
      } else {
#pragma omp simd
        for (int64_t k = 0; k < per_group; k++)
          in[k] = STORE(NAME(activate)((LOAD(in[k]) - m * vector_1[k]) * r + bias[k], 1));
      }
    }
  }
}

CLONES static void NAME(epilogue_planes)(const NAME(EpilogueTask) *task, T *z, T *y, int64_t count,
                                         int64_t maps, int64_t place) {
  const Call *call = task->call;
  int64_t pixels = volume(call->positions), per_group = call->channels / call->groups;
  int64_t in_step = task->z_strides.pixel, out_step = task->y_strides.pixel;
  for (int64_t k = 0; k < call->channels; k++) {
    T *in = z + k * task->z_strides.channel, *out = y ? y + k * task->y_strides.channel : NULL;
    const A *m = task->map_1 + place + k / per_group * pixels, *r = task->rstd + maps;
    const A *m2 = task->map_2 ? task->map_2 + place + k / per_group * pixels : NULL;
    A s = task->vector_1[k], s2 = m2 ? task->vector_2[k] : 0, b = task->bias ? task->bias[k] : 0;
    A value[TILE];
    if (in_step == 1)
      for (int64_t j = 0; j < count; j++) value[j] = LOAD(in[j]) - m[j] * s;
    else
      for (int64_t j = 0; j < count; j++) value[j] = LOAD(in[j * in_step]) - m[j] * s;
    if (m2)
      for (int64_t j = 0; j < count; j++) value[j] -= m2[j] * s2;
    if (out) {
      for (int64_t j = 0; j < count; j++) in[j * in_step] = STORE(value[j]);
      for (int64_t j = 0; j < count; j++) out[j * out_step] = STORE(value[j] * r[j] + b);
    } else if (in_step == 1) {
      for (int64_t j = 0; j < count; j++) in[j] = STORE(NAME(activate)(value[j] * r[j] + b, 1));
    } else {
      for (int64_t j = 0; j < count; j++)
        in[j * in_step] = STORE(NAME(activate)(value[j] * r[j] + b, 1));
    }
  }
}

static void NAME(epilogues)(void *argument, int64_t begin, int64_t end, int64_t thread) {
  const NAME(EpilogueTask) *task = argument;
  const Call *call = task->call;
  int64_t size = volume(call->positions);
  int rows = task->z_strides.channel == 1 && call->channels >= FEW_CHANNELS * call->groups &&
             (!task->y || task->y_strides.channel == 1);
  (void)thread;
  for (int64_t p = begin; p < end;) {
    int64_t sample = p / size, pixel = p % size;
    int64_t count = min64(TILE, min64(size - pixel, end - p));
    T *z = task->z + sample * task->z_strides.sample + pixel * task->z_strides.pixel;
    T *y = task->y ? task->y + sample * task->y_strides.sample + pixel * task->y_strides.pixel : 0;
    int64_t place = task->call->groups * sample * size + pixel;
    (rows ? NAME(epilogue_rows) : NAME(epilogue_planes))(task, z, y, count, p, place);
    p += count;
  }
}

static void NAME(epilogue)(const Call *call, T *z, const Strides *z_strides, T *y,
                           const Strides *y_strides, const A *map_1, const A *vector_1,
                           const A *map_2, const A *vector_2, const A *rstd, const A *bias) {
  NAME(EpilogueTask) task = {call,     z,     y,        *z_strides, y ? *y_strides : *z_strides, map_1,
                             vector_1, map_2, vector_2, rstd,       bias};
  parallel_for(NAME(epilogues), &task, call->samples * volume(call->positions), call->threads);
}

/* ---- backward of the epilogue ---- */

typedef struct {
  const Call *call;
  const T *grad, *kept;
  T *grad_z;
  Strides grad_strides, kept_strides, z_strides;
  const A *mu, *rstd, *filter_sums, *bias;
  A *pair;
  double *sums; /* of each thread: totals of bias and filter sums, then those of the tile */
} NAME(BackwardTask);

INLINE void NAME(finish_window)(const NAME(BackwardTask) *task, int64_t p, int64_t place, A product,
                                A dot) {
  const Call *call = task->call;
  A r = task->rstd[p], grad_var = (A)-0.5 * r * (call->relu ? product : product * r);
  task->pair[place] = (A)((-dot - 2 * task->mu[p] * grad_var) * call->grad_mean);
  task->pair[place + volume(call->positions)] = (A)(grad_var * call->grad_var);
}

CLONES static void NAME(backward_rows)(const NAME(BackwardTask) *task, const T *grad, const T *kept,
                                       T *grad_z, int64_t count, int64_t p, int64_t place,
                                       double *totals) {
  const Call *call = task->call;
  int64_t channels = call->channels;
  A *restrict of_bias = (A *)(totals + 2 * channels), *restrict of_sums = of_bias + channels;
  const A *filter_sums = task->filter_sums, *bias = call->relu ? task->bias : NULL;
  memset(of_bias, 0, sizeof(A) * 2 * (size_t)channels);
  for (int64_t j = 0; j < count; j++) {
    const T *restrict g_in = grad + j * task->grad_strides.pixel;
    const T *restrict k_in = kept + j * task->kept_strides.pixel;
    T *restrict out = grad_z + j * task->z_strides.pixel;
    A m = task->mu[p + j], r = task->rstd[p + j], product = 0, dot = 0;
    if (call->relu && bias) {
#pragma omp simd reduction(+ : product, dot)
      for (int64_t k = 0; k < channels; k++) {
        A y = LOAD(k_in[k]), g = y <= 0 ? 0 : LOAD(g_in[k]), s = g * r;
        product += s * (y - bias[k]), dot += s * filter_sums[k];
        T rounded = STORE(s);
        out[k] = rounded;
        of_bias[k] += g, of_sums[k] += LOAD(rounded) * m;
      }
    } else {
#pragma omp simd reduction(+ : product, dot)
      for (int64_t k = 0; k < channels; k++) {
        A y = LOAD(k_in[k]), g = call->relu && y <= 0 ? 0 : LOAD(g_in[k]), s = g * r;
        product += s * y, dot += s * filter_sums[k];
        T rounded = STORE(s);
        out[k] = rounded;
        of_bias[k] += g, of_sums[k] += LOAD(rounded) * m;
      }
    }
    NAME(finish_window)(task, p + j, place + j, product, dot);
  }
  for (int64_t k = 0; k < channels; k++) {
    totals[k] += of_bias[k];
    totals[channels + k] += of_sums[k];
  }
}

CLONES static void NAME(backward_planes)(const NAME(BackwardTask) *task, const T *grad,
                                         const T *kept, T *grad_z, int64_t count, int64_t p,
                                         int64_t place, double *totals) {
  const Call *call = task->call;
  int64_t grad_step = task->grad_strides.pixel, kept_step = task->kept_strides.pixel;
  int64_t z_step = task->z_strides.pixel;
  const A *m = task->mu + p, *r = task->rstd + p;
  A product[TILE] = {0}, dot[TILE] = {0}, g[TILE], y[TILE], s[TILE];
  for (int64_t k = 0; k < call->channels; k++) {
    const T *g_in = grad + k * task->grad_strides.channel;
    const T *k_in = kept + k * task->kept_strides.channel;
    T *out = grad_z + k * task->z_strides.channel;
    A b = call->relu && task->bias ? task->bias[k] : 0, sum = task->filter_sums[k];
    A of_bias = 0, of_sums = 0;
    if (grad_step == 1 && kept_step == 1)
      for (int64_t j = 0; j < count; j++) y[j] = LOAD(k_in[j]), g[j] = LOAD(g_in[j]);
    else
      for (int64_t j = 0; j < count; j++)
        y[j] = LOAD(k_in[j * kept_step]), g[j] = LOAD(g_in[j * grad_step]);
#pragma omp simd reduction(+ : of_bias)
    for (int64_t j = 0; j < count; j++) {
      g[j] = call->relu && y[j] <= 0 ? 0 : g[j];
      s[j] = g[j] * r[j];
      product[j] += s[j] * (y[j] - b), dot[j] += s[j] * sum;
      of_bias += g[j];
    }
    if (z_step == 1) {
#pragma omp simd reduction(+ : of_sums)
      for (int64_t j = 0; j < count; j++)
        out[j] = STORE(s[j]), of_sums += LOAD(STORE(s[j])) * m[j];
    } else {
      for (int64_t j = 0; j < count; j++)
        out[j * z_step] = STORE(s[j]), of_sums += LOAD(STORE(s[j])) * m[j];
    }
    totals[k] += of_bias;
    totals[call->channels + k] += of_sums;
  }
  for (int64_t j = 0; j < count; j++)
    NAME(finish_window)(task, p + j, place + j, product[j], dot[j]);
}

static void NAME(backwards)(void *argument, int64_t begin, int64_t end, int64_t thread) {
  const NAME(BackwardTask) *task = argument;
  const Call *call = task->call;
  int64_t size = volume(call->positions);
  int rows = task->kept_strides.channel == 1 && task->grad_strides.channel == 1 &&
             task->z_strides.channel == 1 && call->channels >= FEW_CHANNELS;
  double *totals = task->sums + thread * 4 * call->channels;
  for (int64_t p = begin; p < end;) {
    int64_t sample = p / size, pixel = p % size;
    int64_t count = min64(TILE, min64(size - pixel, end - p));
    const Strides *g = &task->grad_strides, *k = &task->kept_strides, *z = &task->z_strides;
    (rows ? NAME(backward_rows) : NAME(backward_planes))(
        task, task->grad + sample * g->sample + pixel * g->pixel,
        task->kept + sample * k->sample + pixel * k->pixel,
        task->grad_z + sample * z->sample + pixel * z->pixel, count, p, p + sample * size, totals);
    p += count;
  }
}

static void NAME(epilogue_backward)(const Call *call, const T *grad, const Strides *grad_strides,
                                    const T *kept, const Strides *kept_strides, T *grad_z,
                                    const Strides *z_strides, const A *mu, const A *rstd,
                                    const A *filter_sums, const A *bias, A *pair, A *grad_bias,
                                    A *grad_sums, double *sums) {
  int64_t channels = call->channels;
  NAME(BackwardTask) task = {call,        grad,          kept, grad_z, *grad_strides,
                             *kept_strides, *z_strides,  mu,   rstd,   filter_sums,
                             bias,        pair,          sums};
  memset(sums, 0, sizeof(double) * (size_t)(call->threads * 4 * channels));
  parallel_for(NAME(backwards), &task, call->samples * volume(call->positions), call->threads);
  for (int64_t k = 0; k < channels; k++) {
    double of_bias = 0, of_sums = 0;
    for (int64_t thread = 0; thread < call->threads; thread++) {
      of_bias += sums[thread * 4 * channels + k];
      of_sums += sums[(thread * 4 + 1) * channels + k];
    }
    grad_bias[k] = (A)of_bias;
    grad_sums[k] = (A)of_sums;
  }
}

/* ---- backward of the statistics ---- */

typedef struct {
  const Call *call;
  T *grad;
  const T *x;
  Strides grad_strides, x_strides;
  const A *pair;
  Keys keys;
  A *scratch;
} NAME(ThroughTask);

/* The sums of a map over the windows that contain each of `count` pixels of a line. */
CLONES static void NAME(box_sum_transpose)(const Call *call, const A *map, int64_t line,
                                           int64_t first, int64_t count, A *row, A *out) {
  const int64_t *positions = call->positions, *dilation = call->dilation, *kernel = call->kernel;
  int64_t step = call->stride[2], start = first + call->padding[2];
  int64_t reach = dilation[2] * (kernel[2] - 1);
  int64_t low = max64(0, start - reach + step - 1) / step; /* the windows that reach the pixels */
  int64_t high = min64(positions[2], (start + count - 1) / step + 1);
  int64_t d0 = line / call->sizes[1] + call->padding[0];
  int64_t h0 = line % call->sizes[1] + call->padding[1];
  for (int64_t j = 0; j < count; j++) out[j] = 0;
  if (low >= high) return;
  memset(row, 0, sizeof(A) * (size_t)(high - low));
  for (int64_t i = 0; i < kernel[0]; i++) {
    int64_t d = d0 - i * dilation[0];
    if (d < 0 || d % call->stride[0] || d / call->stride[0] >= positions[0]) continue;
    for (int64_t k = 0; k < kernel[1]; k++) {
      int64_t h = h0 - k * dilation[1];
      if (h < 0 || h % call->stride[1] || h / call->stride[1] >= positions[1]) continue;
      const A *source =
          map + (d / call->stride[0] * positions[1] + h / call->stride[1]) * positions[2];
      for (int64_t w = low; w < high; w++) row[w - low] += source[w];
    }
  }
  for (int64_t k = 0; k < kernel[2]; k++) {
    int64_t shift = k * dilation[2] - start; /* the pixel of window w is w * step + shift */
    int64_t from = max64(low, (max64(0, -shift) + step - 1) / step);
    int64_t to = count - shift <= 0 ? low : min64(high, (count - shift + step - 1) / step);
    if (step == 1)
      for (int64_t w = from; w < to; w++) out[w + shift] += row[w - low];
    else
      for (int64_t w = from; w < to; w++) out[w * step + shift] += row[w - low];
  }
}

CLONES static void NAME(through_rows)(const NAME(ThroughTask) *task, T *grad, const T *x,
                                      int64_t count, const uint32_t *pixel_key, const A *a,
                                      const A *b) {
  const uint32_t *channel_key = task->keys.channels;
  int32_t threshold = (int32_t)task->call->keep_threshold;
  int64_t channels = task->call->channels;
  for (int64_t j = 0; j < count; j++) {
    T *restrict out = grad + j * task->grad_strides.pixel;
    const T *restrict in = x + j * task->x_strides.pixel;
    A aj = a[j], bj = b[j];
    if (channel_key) {
      uint32_t key = pixel_key[j];
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) {
        A kept = is_kept(key, channel_key[c], threshold) ? 1 : 0;
        out[c] = STORE(LOAD(out[c]) + kept * (aj + bj * LOAD(in[c])));
      }
    } else {
#pragma omp simd
      for (int64_t c = 0; c < channels; c++)
        out[c] = STORE(LOAD(out[c]) + (aj + bj * LOAD(in[c])));
    }
  }
}

CLONES static void NAME(through_planes)(const NAME(ThroughTask) *task, T *grad, const T *x,
                                        int64_t count, const uint32_t *pixel_key, const A *a,
                                        const A *b) {
  int64_t grad_step = task->grad_strides.pixel, x_step = task->x_strides.pixel;
  int32_t threshold = (int32_t)task->call->keep_threshold;
  A value[TILE];
  for (int64_t c = 0; c < task->call->channels; c++) {
    T *out = grad + c * task->grad_strides.channel;
    const T *in = x + c * task->x_strides.channel;
    if (x_step == 1)
      for (int64_t j = 0; j < count; j++) value[j] = a[j] + b[j] * LOAD(in[j]);
    else
      for (int64_t j = 0; j < count; j++) value[j] = a[j] + b[j] * LOAD(in[j * x_step]);
    if (task->keys.channels) {
      uint32_t channel_key = task->keys.channels[c];
      for (int64_t j = 0; j < count; j++)
        value[j] *= is_kept(pixel_key[j], channel_key, threshold) ? 1 : 0;
    }
    if (grad_step == 1)
      for (int64_t j = 0; j < count; j++) out[j] = STORE(LOAD(out[j]) + value[j]);
    else
      for (int64_t j = 0; j < count; j++)
        out[j * grad_step] = STORE(LOAD(out[j * grad_step]) + value[j]);
  }
}

static void NAME(through)(void *argument, int64_t begin, int64_t end, int64_t thread) {
  const NAME(ThroughTask) *task = argument;
  const Call *call = task->call;
  int64_t size = volume(call->sizes), width = call->sizes[2];
  int64_t positions = volume(call->positions);
  int rows = task->x_strides.channel == 1 && task->grad_strides.channel == 1 &&
             call->channels >= FEW_CHANNELS;
  A a[TILE], b[TILE], *row = task->scratch + thread * call->scratch;
  uint32_t keys[TILE];
  for (int64_t p = begin; p < end;) {
    int64_t sample = p / size, pixel = p % size, line = pixel / width, first = pixel % width;
    int64_t count = min64(TILE, min64(width - first, end - p));
    const A *pair = task->pair + 2 * sample * positions;
    NAME(box_sum_transpose)(call, pair, line, first, count, row, a);
    NAME(box_sum_transpose)(call, pair + positions, line, first, count, row, b);
    if (task->keys.channels) pixel_keys(call, task->keys, sample, pixel, count, keys);
    const Strides *g = &task->grad_strides, *x = &task->x_strides;
    (rows ? NAME(through_rows) : NAME(through_planes))(
        task, task->grad + sample * g->sample + pixel * g->pixel,
        task->x + sample * x->sample + pixel * x->pixel, count, keys, a, b);
    p += count;
  }
}

static void NAME(statistics_backward)(const Call *call, T *grad, const Strides *grad_strides,
                                      const T *x, const Strides *x_strides, const A *pair,
                                      const int32_t *keys, double *scratch) {
  NAME(ThroughTask) task = {call,       grad, x,    *grad_strides,
                            *x_strides, pair, split_keys(call, keys), (A *)scratch};
  parallel_for(NAME(through), &task, call->samples * volume(call->sizes), call->threads);
}

#undef T
#undef A
#undef NAME
