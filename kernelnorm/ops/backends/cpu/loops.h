/* The tiles of kernels.c for one dtype: tensors of T, arithmetic in A.
 *
 * If the channels of a pixel are adjacent, loops run along the channels of each pixel (rows). Else
 * they run along the pixels of each channel, for any strides (planes). */

INLINE T *NAME(at)(const Tensor *x, int64_t sample, int64_t pixel) {
  return (T *)x->data + sample * x->sample + pixel * x->pixel;
}

INLINE void NAME(gather)(const T *x, int64_t step, int64_t count, A *out) {
  if (step == 1)
    for (int64_t j = 0; j < count; j++) out[j] = LOAD(x[j]);
  else
    for (int64_t j = 0; j < count; j++) out[j] = LOAD(x[j * step]);
}

INLINE void NAME(scatter)(const A *x, int64_t step, int64_t count, T *out) {
  if (step == 1)
    for (int64_t j = 0; j < count; j++) out[j] = STORE(x[j]);
  else
    for (int64_t j = 0; j < count; j++) out[j * step] = STORE(x[j]);
}

/* ---- statistics of pixels: sums of differences to the first channel, small even if the mean is
 * large. A first channel that the mask drops counts as 0: it may be far from the others ---- */

INLINE void NAME(statistics_row)(const T *row, int64_t channels, const uint32_t *channel_key,
                                 uint32_t key, int32_t threshold, int masked, A *sums) {
  A sum = 0, square = 0, kept = 0, plain = 0;
  A first = !masked || is_kept(key, channel_key[0], threshold) ? LOAD(row[0]) : 0;
#pragma omp simd reduction(+ : sum, square, kept, plain)
  for (int64_t c = 0; c < channels; c++) {
    A keep = !masked || is_kept(key, channel_key[c], threshold) ? 1 : 0;
    A value = LOAD(row[c]) - first, dropped = value * keep;
    sum += dropped, square += dropped * dropped, kept += keep, plain += value;
  }
  sums[0] = first, sums[TILE] = sum, sums[2 * TILE] = square, sums[3 * TILE] = kept;
  sums[4 * TILE] = plain;
}

INLINE void NAME(statistics_plane)(const A *value, int64_t count, const uint32_t *pixel_key,
                                   uint32_t key, int32_t threshold, int masked, A *sums) {
  for (int64_t j = 0; j < count; j++) {
    A keep = !masked || is_kept(pixel_key[j], key, threshold) ? 1 : 0;
    A difference = value[j] - sums[j], dropped = difference * keep;
    sums[TILE + j] += dropped, sums[2 * TILE + j] += dropped * dropped;
    sums[3 * TILE + j] += keep, sums[4 * TILE + j] += difference;
  }
}

CLONES static void NAME(pixel_tile)(const Call *call, int64_t sample, int64_t pixel, int64_t count,
                                    int64_t thread) {
  int64_t channels = call->channels, step = call->x.channel;
  int32_t threshold = (int32_t)call->threshold;
  const uint32_t *channel_key = (const uint32_t *)call->keys;
  const T *x = NAME(at)(&call->x, sample, pixel);
  uint32_t key[TILE];
  A sums[5 * TILE] = {0}, value[TILE];
  (void)thread;
  if (channel_key) pixel_keys(call, sample, pixel, count, key);
  if (step == 1 && channels >= FEW_CHANNELS) {
    for (int64_t j = 0; j < count; j++, x += call->x.pixel)
      if (channel_key)
        NAME(statistics_row)(x, channels, channel_key, key[j], threshold, 1, sums + j);
      else
        NAME(statistics_row)(x, channels, NULL, 0, 0, 0, sums + j);
  } else {
    NAME(gather)(x, call->x.pixel, count, sums);
    if (channel_key)
      for (int64_t j = 0; j < count; j++)
        if (!is_kept(key[j], channel_key[0], threshold)) sums[j] = 0;
    for (int64_t c = 0; c < channels; c++) {
      NAME(gather)(x + c * step, call->x.pixel, count, value);
      if (channel_key)
        NAME(statistics_plane)(value, count, key, channel_key[c], threshold, 1, sums);
      else
        NAME(statistics_plane)(value, count, NULL, 0, 0, 0, sums);
    }
  }
  int64_t map = call->samples * volume(call->sizes);
  double *mean = call->workspace + sample * volume(call->sizes) + pixel, n = (double)channels;
  for (int64_t j = 0; j < count; j++) {
    double first = sums[j], sum = sums[TILE + j] / n, shift = first * (sums[3 * TILE + j] / n);
    mean[j] = sum + shift;
    mean[map + j] = sums[2 * TILE + j] / n + (2 * sum + shift) * first;
    mean[2 * map + j] = sums[4 * TILE + j] / n + first;
  }
}

/* ---- statistics of windows ---- */

/* Sums of a map over `count` windows, which may lie on several lines. */
static void NAME(window_sums)(const Call *call, const double *map, int64_t window, int64_t count,
                              double *row, double *out) {
  int64_t width = call->positions[2];
  for (int64_t j = 0, part; j < count; j += part) {
    int64_t first = (window + j) % width;
    part = least(count - j, width - first);
    box_sum(call, map, (window + j) / width, first, part, row, out + j);
  }
}

static void NAME(window_tile)(const Call *call, int64_t sample, int64_t window, int64_t count,
                              int64_t thread) {
  int64_t size = volume(call->sizes), map = call->samples * size;
  int64_t place = sample * volume(call->positions) + window;
  const double *maps = call->workspace + sample * size;
  double mean[TILE], square[TILE], *row = call->workspace + 3 * map + thread * call->scratch;
  A *mu = (A *)call->mu + place, *rstd = (A *)call->rstd + place;
  NAME(window_sums)(call, maps, window, count, row, mean);
  NAME(window_sums)(call, maps + map, window, count, row, square);
  for (int64_t j = 0; j < count; j++) {
    double m = mean[j] * call->mean, var = square[j] * call->square - m * m;
    mean[j] = m;
    mu[j] = (A)m;
    rstd[j] = (A)(1 / sqrt((var < 0 ? 0 : var) + call->eps));
  }
  if (!call->means) return;
  A *means = (A *)call->means + place, *offset = (A *)call->offset + place;
  NAME(window_sums)(call, maps + 2 * map, window, count, row, square);
  for (int64_t j = 0; j < count; j++) {
    double plain = square[j] / (double)volume(call->kernel);
    means[j] = (A)plain;
    offset[j] = (A)(mean[j] - plain);
  }
}

/* ---- epilogue ---- */

INLINE A NAME(activated)(A x, int activation, A slope) { /* keeps NaN */
  return activation != NONE && x < 0 ? (activation == LEAKY ? x * slope : 0) : x;
}

INLINE void NAME(epilogue_row)(const Call *call, T *in, T *out, int64_t place, int activation,
                               int second) {
  const A *sums = call->sums, *rest = call->rest, *bias = call->bias;
  A m = ((const A *)call->mu)[place], r = ((const A *)call->rstd)[place];
  A m2 = second ? ((const A *)call->means)[place] : 0, slope = (A)call->slope;
#pragma omp simd
  for (int64_t k = 0; k < call->channels; k++) {
    A numerator = LOAD(in[k]) - m * sums[k] - (second ? m2 * rest[k] : 0);
    A y = numerator * r + bias[k];
    if (activation == NONE) in[k] = STORE(numerator);
    out[k] = STORE(NAME(activated)(y, activation, slope));
  }
}

CLONES static void NAME(epilogue_tile)(const Call *call, int64_t sample, int64_t pixel,
                                       int64_t count, int64_t thread) {
  const Tensor *z = &call->x, *y = call->activation == NONE ? &call->out : &call->x;
  int64_t place = sample * volume(call->positions) + pixel;
  T *in = NAME(at)(z, sample, pixel), *out = NAME(at)(y, sample, pixel);
  (void)thread;
  if (z->channel == 1 && y->channel == 1 && call->channels >= FEW_CHANNELS) {
    for (int64_t j = 0; j < count; j++, place++, in += z->pixel, out += y->pixel)
      switch (2 * call->activation + !!call->means) {
        case 2 * NONE: NAME(epilogue_row)(call, in, out, place, NONE, 0); break;
        case 2 * NONE + 1: NAME(epilogue_row)(call, in, out, place, NONE, 1); break;
        case 2 * RELU: NAME(epilogue_row)(call, in, out, place, RELU, 0); break;
        case 2 * RELU + 1: NAME(epilogue_row)(call, in, out, place, RELU, 1); break;
        case 2 * LEAKY: NAME(epilogue_row)(call, in, out, place, LEAKY, 0); break;
        default: NAME(epilogue_row)(call, in, out, place, LEAKY, 1);
      }
    return;
  }
  const A *m = (const A *)call->mu + place, *r = (const A *)call->rstd + place;
  const A *m2 = call->means ? (const A *)call->means + place : m;
  for (int64_t k = 0; k < call->channels; k++, in += z->channel, out += y->channel) {
    A s = ((const A *)call->sums)[k], b = ((const A *)call->bias)[k], value[TILE];
    A s2 = call->means ? ((const A *)call->rest)[k] : 0;
    NAME(gather)(in, z->pixel, count, value);
    for (int64_t j = 0; j < count; j++) value[j] -= m[j] * s + m2[j] * s2;
    if (call->activation == NONE) NAME(scatter)(value, z->pixel, count, in);
    for (int64_t j = 0; j < count; j++) {
      A v = value[j] * r[j] + b;
      value[j] = NAME(activated)(v, (int)call->activation, (A)call->slope);
    }
    NAME(scatter)(value, y->pixel, count, out);
  }
}

/* ---- backward of the epilogue ---- */

/* The gradient before the activation; y becomes the input of the activation. */
INLINE A NAME(before)(A grad, A *y, int activation, A slope) {
  A kept = *y;
  if (activation == LEAKY) *y = kept < 0 ? kept / slope : kept;
  return activation != NONE && kept <= 0 ? (activation == LEAKY ? grad * slope : 0) : grad;
}

INLINE void NAME(backward_row)(const Call *call, const T *grad, const T *kept, T *out, A m, A r,
                               int activation, A *of_bias, A *of_sums, A *product, A *dot) {
  const A *sums = call->sums, *bias = call->bias;
  A with_kept = 0, with_sums = 0, slope = (A)call->slope;
#pragma omp simd reduction(+ : with_kept, with_sums)
  for (int64_t k = 0; k < call->channels; k++) {
    A y = LOAD(kept[k]), g = LOAD(grad[k]);
    g = NAME(before)(g, &y, activation, slope);
    A scaled = g * r;
    T rounded = STORE(scaled); /* the convolution's backward gets this */
    with_kept += scaled * (activation == NONE ? y : y - bias[k]), with_sums += scaled * sums[k];
    out[k] = rounded;
    of_bias[k] += g, of_sums[k] += LOAD(rounded) * m;
  }
  *product = with_kept, *dot = with_sums;
}

/* Scales g in place. */
INLINE void NAME(backward_plane)(A *g, const A *kept, int64_t count, const A *m, const A *r, A s,
                                 A b, int activation, A slope, double *of_bias, double *of_sums,
                                 A *product, A *dot) {
  A bias = 0, sums = 0;
#pragma omp simd reduction(+ : bias, sums)
  for (int64_t j = 0; j < count; j++) {
    A y = kept[j], value = NAME(before)(g[j], &y, activation, slope), scaled = value * r[j];
    product[j] += scaled * (activation == NONE ? y : y - b), dot[j] += scaled * s;
    bias += value, sums += LOAD(STORE(scaled)) * m[j];
    g[j] = scaled;
  }
  *of_bias += bias, *of_sums += sums;
}

CLONES static void NAME(backward_tile)(const Call *call, int64_t sample, int64_t pixel,
                                       int64_t count, int64_t thread) {
  const Tensor *k_in = &call->x, *g_in = &call->grad, *z_out = &call->out;
  int64_t channels = call->channels, windows = volume(call->positions);
  const T *kept = NAME(at)(k_in, sample, pixel), *grad = NAME(at)(g_in, sample, pixel);
  T *out = NAME(at)(z_out, sample, pixel);
  const A *m = (const A *)call->mu + sample * windows + pixel;
  const A *r = (const A *)call->rstd + sample * windows + pixel;
  double *totals = call->workspace + thread * 4 * channels;
  A product[TILE] = {0}, dot[TILE] = {0}, y[TILE], g[TILE], slope = (A)call->slope;
  if (k_in->channel == 1 && g_in->channel == 1 && z_out->channel == 1 && channels >= FEW_CHANNELS) {
    A *of_bias = (A *)(totals + 2 * channels), *of_sums = of_bias + channels;
    memset(of_bias, 0, sizeof(A) * 2 * (size_t)channels);
    for (int64_t j = 0; j < count; j++) {
      switch (call->activation) {
        case NONE:
          NAME(backward_row)(call, grad, kept, out, m[j], r[j], NONE, of_bias, of_sums, product + j,
                             dot + j);
          break;
        case RELU:
          NAME(backward_row)(call, grad, kept, out, m[j], r[j], RELU, of_bias, of_sums, product + j,
                             dot + j);
          break;
        case LEAKY:
          NAME(backward_row)(call, grad, kept, out, m[j], r[j], LEAKY, of_bias, of_sums, product + j,
                             dot + j);
          break;
      }
      grad += g_in->pixel, kept += k_in->pixel, out += z_out->pixel;
    }
    for (int64_t k = 0; k < 2 * channels; k++) totals[k] += of_bias[k];
  } else {
    for (int64_t k = 0; k < channels; k++) {
      A s = ((const A *)call->sums)[k], b = ((const A *)call->bias)[k];
      NAME(gather)(kept + k * k_in->channel, k_in->pixel, count, y);
      NAME(gather)(grad + k * g_in->channel, g_in->pixel, count, g);
      switch (call->activation) {
        case NONE:
          NAME(backward_plane)(g, y, count, m, r, s, b, NONE, slope, totals + k,
                               totals + channels + k, product, dot);
          break;
        case RELU:
          NAME(backward_plane)(g, y, count, m, r, s, b, RELU, slope, totals + k,
                               totals + channels + k, product, dot);
          break;
        case LEAKY:
          NAME(backward_plane)(g, y, count, m, r, s, b, LEAKY, slope, totals + k,
                               totals + channels + k, product, dot);
          break;
      }
      NAME(scatter)(g, z_out->pixel, count, out + k * z_out->channel);
    }
  }
  A *of_mu = (A *)call->pair + 2 * sample * windows + pixel, *of_var = of_mu + windows;
  for (int64_t j = 0; j < count; j++) {
    A grad_var = (A)-0.5 * r[j] * (call->activation == NONE ? product[j] * r[j] : product[j]);
    of_mu[j] = (A)((-dot[j] - 2 * m[j] * grad_var) * call->grad_mean);
    of_var[j] = (A)(grad_var * call->grad_var);
  }
}

static void NAME(sum_threads)(const Call *call) {
  for (int64_t k = 0; k < call->channels; k++) {
    double of_bias = 0, of_sums = 0;
    for (int64_t thread = 0; thread < call->threads; thread++) {
      of_bias += call->workspace[thread * 4 * call->channels + k];
      of_sums += call->workspace[(thread * 4 + 1) * call->channels + k];
    }
    ((A *)call->grad_bias)[k] = (A)of_bias;
    ((A *)call->grad_sums)[k] = (A)of_sums;
  }
}

/* ---- backward of the statistics ---- */

/* The sums of a map over the windows that contain each of `count` pixels of a line. */
INLINE void NAME(box_sum_transpose)(const Call *call, const A *map, int64_t line, int64_t first,
                                    int64_t count, A *row, A *out) {
  const int64_t *positions = call->positions, *dilation = call->dilation, *kernel = call->kernel;
  const int64_t *stride = call->stride;
  int64_t step = stride[2], start = first + call->padding[2];
  /* The windows from low to high - 1 reach the pixels. */
  int64_t low = most(0, start - dilation[2] * (kernel[2] - 1) + step - 1) / step;
  int64_t high = least(positions[2], (start + count - 1) / step + 1);
  int64_t d0 = line / call->sizes[1] + call->padding[0];
  int64_t h0 = line % call->sizes[1] + call->padding[1];
  memset(out, 0, sizeof(A) * (size_t)count);
  if (low >= high) return;
  memset(row, 0, sizeof(A) * (size_t)(high - low));
  for (int64_t i = 0; i < kernel[0] * kernel[1]; i++) {
    int64_t d = d0 - i / kernel[1] * dilation[0], h = h0 - i % kernel[1] * dilation[1];
    if (d < 0 || d % stride[0] || d / stride[0] >= positions[0]) continue;
    if (h < 0 || h % stride[1] || h / stride[1] >= positions[1]) continue;
    const A *source = map + (d / stride[0] * positions[1] + h / stride[1]) * positions[2];
    for (int64_t w = low; w < high; w++) row[w - low] += source[w];
  }
  for (int64_t k = 0; k < kernel[2]; k++) {
    int64_t shift = k * dilation[2] - start; /* weight k of window w is at pixel w * step + shift */
    int64_t from = most(low, (most(0, -shift) + step - 1) / step);
    int64_t to = count <= shift ? low : least(high, (count - shift + step - 1) / step);
    if (step == 1)
      for (int64_t w = from; w < to; w++) out[w + shift] += row[w - low];
    else
      for (int64_t w = from; w < to; w++) out[w * step + shift] += row[w - low];
  }
}

INLINE void NAME(through_row)(T *grad, const T *x, int64_t channels, const uint32_t *channel_key,
                              uint32_t key, int32_t threshold, int masked, A a, A b) {
#pragma omp simd
  for (int64_t c = 0; c < channels; c++) {
    A keep = !masked || is_kept(key, channel_key[c], threshold) ? 1 : 0;
    grad[c] = STORE(LOAD(grad[c]) + keep * (a + b * LOAD(x[c])));
  }
}

INLINE void NAME(through_plane)(A *grad, const A *x, int64_t count, const uint32_t *pixel_key,
                                uint32_t key, int32_t threshold, int masked, const A *a,
                                const A *b) {
#pragma omp simd
  for (int64_t j = 0; j < count; j++) {
    A keep = !masked || is_kept(pixel_key[j], key, threshold) ? 1 : 0;
    grad[j] += keep * (a[j] + b[j] * x[j]);
  }
}

CLONES static void NAME(through_tile)(const Call *call, int64_t sample, int64_t pixel,
                                      int64_t count, int64_t thread) {
  int64_t channels = call->channels, width = call->sizes[2], windows = volume(call->positions);
  int32_t threshold = (int32_t)call->threshold;
  const uint32_t *channel_key = (const uint32_t *)call->keys;
  const A *pair = (const A *)call->pair + 2 * sample * windows;
  const T *x = NAME(at)(&call->x, sample, pixel);
  T *grad = NAME(at)(&call->grad, sample, pixel);
  A a[TILE], b[TILE], *row = (A *)(call->workspace + thread * call->scratch);
  uint32_t key[TILE];
  for (int64_t j = 0, part; j < count; j += part) {
    int64_t line = (pixel + j) / width, first = (pixel + j) % width;
    part = least(count - j, width - first);
    NAME(box_sum_transpose)(call, pair, line, first, part, row, a + j);
    NAME(box_sum_transpose)(call, pair + windows, line, first, part, row, b + j);
  }
  if (channel_key) pixel_keys(call, sample, pixel, count, key);
  if (call->x.channel == 1 && call->grad.channel == 1 && channels >= FEW_CHANNELS) {
    for (int64_t j = 0; j < count; j++, x += call->x.pixel, grad += call->grad.pixel)
      if (channel_key)
        NAME(through_row)(grad, x, channels, channel_key, key[j], threshold, 1, a[j], b[j]);
      else
        NAME(through_row)(grad, x, channels, NULL, 0, 0, 0, a[j], b[j]);
    return;
  }
  for (int64_t c = 0; c < channels; c++, x += call->x.channel, grad += call->grad.channel) {
    A value[TILE], total[TILE];
    NAME(gather)(x, call->x.pixel, count, value);
    NAME(gather)(grad, call->grad.pixel, count, total);
    if (channel_key)
      NAME(through_plane)(total, value, count, key, channel_key[c], threshold, 1, a, b);
    else
      NAME(through_plane)(total, value, count, NULL, 0, 0, 0, a, b);
    NAME(scatter)(total, call->grad.pixel, count, grad);
  }
}

#undef T
#undef A
#undef NAME
