// SPDX-License-Identifier: Apache-2.0
// Depthwise convolution of one image in channels-last layout, and its two gradients.
#pragma once

#include "kernels.h"

// Geometry of a depthwise convolution of [H][W][C] to [Ho][Wo][C].
//
// The padded image is kept with the columns of one residue modulo the stride side by side, so that every tap reads
// a whole output row's inputs from consecutive memory at any stride.
struct Window {
    int H, W, C, kernel, stride, pad, dilation;
    int Ho, Wo, rows, columns;  // of the output, and of the padded image (columns per residue)
    Window(int H, int W, int C, int kernel, int stride, int pad, int dilation)
        : H(H), W(W), C(C), kernel(kernel), stride(stride), pad(pad), dilation(dilation) {
        const int reach = dilation * (kernel - 1) + 1;
        Ho = (H + 2 * pad - reach) / stride + 1;
        Wo = (W + 2 * pad - reach) / stride + 1;
        rows = std::max(H + 2 * pad, (Ho - 1) * stride + reach);
        columns = (std::max(W + 2 * pad, (Wo - 1) * stride + reach) + stride - 1) / stride;
    }
    int64_t row_length() const { return (int64_t)stride * columns * C; }
    int64_t padded() const { return rows * row_length(); }
    int64_t place(int row, int column) const {
        return row * row_length() + ((int64_t)(column % stride) * columns + column / stride) * C;
    }
    int64_t tap(int row, int dy, int dx) const { return place(row * stride + dy * dilation, dx * dilation); }
    int taps() const { return kernel * kernel; }
};

// The padded layout of an image [H][W][C] whose row y is written by fill(y, to); zeros around. Stride 1.
template <typename T, typename Fill>
static void pad_rows(const Window& w, T* padded, Fill fill) {
    const int64_t length = w.row_length(), left = (int64_t)w.pad * w.C, inner = (int64_t)w.W * w.C;
    std::memset(padded, 0, sizeof(T) * w.pad * length);
    for (int y = 0; y < w.H; y++) {
        T* row = padded + (y + w.pad) * length;
        std::memset(row, 0, sizeof(T) * left);
        fill(y, row + left);
        std::memset(row + left + inner, 0, sizeof(T) * (length - left - inner));
    }
    std::memset(padded + (w.H + w.pad) * length, 0, sizeof(T) * (w.rows - w.H - w.pad) * length);
}

// image [H][W][C] into the padded layout (zeros around).
template <typename T>
static void pad_image(const Window& w, const T* image, T* padded) {
    const int64_t inner = (int64_t)w.W * w.C;
    if (w.stride == 1)
        return pad_rows(w, padded, [&](int y, T* to) { std::memcpy(to, image + y * inner, sizeof(T) * inner); });
    std::memset(padded, 0, sizeof(T) * w.padded());
    for (int y = 0; y < w.H; y++)
        for (int x = 0; x < w.W; x++)
            std::memcpy(padded + w.place(y + w.pad, x + w.pad), image + y * inner + (int64_t)x * w.C, sizeof(T) * w.C);
}

// The decoded image in the padded layout; `buffer` is for an image where the stride is not 1.
template <typename T>
static void decode_padded(
    const Window& w, const Source<T>& s, const Pattern<T>& pattern, const Rows<T>& r, std::vector<T>& buffer,
    T* padded) {
    const int64_t inner = (int64_t)w.W * w.C;
    if (w.stride != 1) {
        T* image = aligned(buffer, w.H * inner);
        decode(s, pattern, r, (int64_t)w.H * w.W, image);
        return pad_image(w, image, padded);
    }
    pad_rows(w, padded, [&](int y, T* to) {
        const int64_t at = y * inner;
        const Rows<T> row{r.floats ? r.floats + at : nullptr, r.codes ? r.codes + at : nullptr,
                          r.codes8 ? r.codes8 + at : nullptr};
        decode(s, pattern, row, w.W, to);
    });
}

template <typename T>
static void unpad_image(const Window& w, const T* padded, T* image) {
    for (int y = 0; y < w.H; y++)
        for (int x = 0; x < w.W; x++)
            std::memcpy(
                image + ((int64_t)y * w.W + x) * w.C, padded + w.place(y + w.pad, x + w.pad), sizeof(T) * w.C);
}

// Weights [C][taps] laid out over the period of flat vectors: [period / lanes][taps][lanes].
template <typename T>
static std::vector<T> spread_weight(const T* weight, int C, int taps, bool flipped) {
    constexpr int L = Vec<T>::lanes;
    const int period = std::lcm(C, L);
    std::vector<T> out((size_t)period * taps);
    for (int j = 0; j < period; j++)
        for (int t = 0; t < taps; t++)
            out[((size_t)(j / L) * taps + t) * L + j % L] = weight[(j % C) * taps + (flipped ? taps - 1 - t : t)];
    return out;
}

template <typename T, int K>
static void convolve_rows(const Window& w, const T* padded, const T* weight, T* out) {
    constexpr int L = Vec<T>::lanes;
    const int taps = K * K, length = w.Wo * w.C, period = std::lcm(w.C, L);
    for (int y = 0; y < w.Ho; y++) {
        const T* from[K];
        int64_t shift[K];
        for (int d = 0; d < K; d++) from[d] = padded + w.tap(y, d, 0), shift[d] = w.tap(0, 0, d);
        T* to = out + (int64_t)y * length;
        for (int v = 0; v < period / L; v++) {
            vec<T> tap[K * K];  // read once: the compiler cannot know that `out` is no weight
            for (int t = 0; t < taps; t++) tap[t] = load(weight + ((size_t)v * taps + t) * L);
            for (int j = v * L; j + L <= length; j += period) {
                vec<T> sum = vec<T>{}, other = vec<T>{};
#pragma GCC unroll 7
                for (int dy = 0; dy < K; dy++)
#pragma GCC unroll 7
                    for (int dx = 0; dx < K; dx++) {
                        const vec<T> term = load(from[dy] + shift[dx] + j) * tap[dy * K + dx];
                        if ((dy * K + dx) % 2) other += term; else sum += term;
                    }
                store(to + j, sum + other);
            }
        }
        for (int j = length / L * L; j < length; j++) {
            T sum = 0;
            for (int t = 0; t < taps; t++)
                sum += from[t / K][shift[t % K] + j] * weight[((size_t)(j % period / L) * taps + t) * L + j % L];
            to[j] = sum;
        }
    }
}

// out [Ho][Wo][C] from a padded image and spread weights.
template <typename T>
static void convolve(const Window& w, const T* padded, const T* weight, T* out) {
    switch (w.kernel) {
        case 1: return convolve_rows<T, 1>(w, padded, weight, out);
        case 3: return convolve_rows<T, 3>(w, padded, weight, out);
        case 5: return convolve_rows<T, 5>(w, padded, weight, out);
        default: return convolve_rows<T, 7>(w, padded, weight, out);
    }
}

// The gradient of the image [H][W][C] from that of the output [Ho][Wo][C]; weights spread, flipped where stride is 1.
// `buffer` holds the padded image's gradient (stride > 1), or the padded gradient (stride 1).
template <typename T>
static void convolve_input_gradient(
    const Window& w, const T* gradient, const T* weight, std::vector<T>& buffer, T* out) {
    constexpr int L = Vec<T>::lanes;
    const int taps = w.taps(), length = w.Wo * w.C, period = std::lcm(w.C, L);
    if (w.stride == 1) {  // the convolution of the padded gradient with the flipped kernel
        const Window back(w.Ho, w.Wo, w.C, w.kernel, 1, w.dilation * (w.kernel - 1) - w.pad, w.dilation);
        T* padded = aligned(buffer, back.padded());
        pad_image(back, gradient, padded);
        return convolve(back, padded, weight, out);
    }
    T* padded = aligned(buffer, w.padded());
    std::memset(padded, 0, sizeof(T) * w.padded());
    for (int y = 0; y < w.Ho; y++)
        for (int t = 0; t < taps; t++) {
            T* to = padded + w.tap(y, t / w.kernel, t % w.kernel);
            const T* from = gradient + (int64_t)y * length;
            int j = 0;
            for (int v = 0; j + L <= length; j += L, v = (v + 1) * L == period ? 0 : v + 1)
                store(to + j, load(to + j) + load(from + j) * load(weight + ((size_t)v * taps + t) * L));
            for (; j < length; j++) to[j] += from[j] * weight[((size_t)(j % period / L) * taps + t) * L + j % L];
        }
    unpad_image(w, padded, out);
}

template <typename T, int K>
static void weight_gradient_rows(const Window& w, const T* padded, const T* gradient, T* sum) {
    constexpr int L = Vec<T>::lanes;
    const int taps = K * K, length = w.Wo * w.C, period = std::lcm(w.C, L);
    for (int v = 0; v < period / L; v++)
        for (int dy = 0; dy < K; dy++) {
            vec<T> acc[K];
            T* into = sum + ((size_t)v * taps + dy * K) * L;
            for (int dx = 0; dx < K; dx++) acc[dx] = load(into + dx * L);
            int64_t shift[K];
            for (int dx = 0; dx < K; dx++) shift[dx] = w.tap(0, 0, dx);
            for (int y = 0; y < w.Ho; y++) {
                const T* from = padded + w.tap(y, dy, 0);
                const T* g = gradient + (int64_t)y * length;
                for (int j = v * L; j + L <= length; j += period) {
                    const vec<T> here = load(g + j);
#pragma GCC unroll 7
                    for (int dx = 0; dx < K; dx++) acc[dx] += here * load(from + shift[dx] + j);
                }
            }
            for (int dx = 0; dx < K; dx++) store(into + dx * L, acc[dx]);
        }
    for (int y = 0; y < w.Ho; y++)
        for (int j = length / L * L; j < length; j++)
            for (int t = 0; t < taps; t++)
                sum[((size_t)(j % period / L) * taps + t) * L + j % L] +=
                    gradient[(int64_t)y * length + j] * padded[w.tap(y, t / K, t % K) + j];
}

// Adds to sum [period / lanes][taps][lanes].
template <typename T>
static void convolve_weight_gradient(const Window& w, const T* padded, const T* gradient, T* sum) {
    switch (w.kernel) {
        case 1: return weight_gradient_rows<T, 1>(w, padded, gradient, sum);
        case 3: return weight_gradient_rows<T, 3>(w, padded, gradient, sum);
        case 5: return weight_gradient_rows<T, 5>(w, padded, gradient, sum);
        default: return weight_gradient_rows<T, 7>(w, padded, gradient, sum);
    }
}
