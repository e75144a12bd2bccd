// SPDX-License-Identifier: Apache-2.0
// Block-diagonal 1x1 convolutions on [pixels][groups * width] rows: products with a matrix per group, and sums of
// outer products.
#pragma once

#include "kernels.h"

// out[p][g, o] (+)= bias[g, o] + sum_i in[p][g, i] x matrix[g][i][o]; bias may be null.
template <typename T, int W>
static void multiply_fixed(
    const T* in, const T* matrix, const T* bias, int groups, int width, int64_t pixels, bool add, T* out) {
    const int c = W ? W : width;
    for (int g = 0; g < groups; g++) {
        const T* m = matrix + (size_t)g * c * c;
        for (int64_t p = 0; p < pixels; p++) {
            const T* x = in + (p * groups + g) * c;
            T* to = out + (p * groups + g) * c;
            if (W) {
                T sum[W ? W : 1];
                for (int o = 0; o < W; o++) sum[o] = (add ? to[o] : (T)0) + (bias ? bias[g * c + o] : (T)0);
                for (int i = 0; i < W; i++)
                    for (int o = 0; o < W; o++) sum[o] += x[i] * m[i * W + o];
                for (int o = 0; o < W; o++) to[o] = sum[o];
            } else {
                for (int o = 0; o < c; o++) to[o] = (add ? to[o] : (T)0) + (bias ? bias[g * c + o] : (T)0);
                for (int i = 0; i < c; i++)
                    for (int o = 0; o < c; o++) to[o] += x[i] * m[i * c + o];
            }
        }
    }
}
// Where a group fits into a vector, several groups (and pixels) are computed side by side: the i-th factor of every
// lane is its group's i-th value, a permutation of the vector.
template <typename T, int W>
struct SideBySide {
    typedef typename Vec<T>::index index;
    static constexpr int L = Vec<T>::lanes;
    index from[W];
    SideBySide() {
        for (int i = 0; i < W; i++)
            for (int l = 0; l < L; l++) from[i][l] = l / W * W + i;
    }
};

template <typename T, int W>
static void multiply_side_by_side(
    const T* in, const T* matrix, const T* bias, int groups, int64_t pixels, bool add, T* out) {
    constexpr int L = Vec<T>::lanes;
    const int C = groups * W, period = std::lcm(C, L);
    const SideBySide<T, W> side;
    const int64_t whole = pixels * C / period * period;
    for (int v = 0; v < period; v += L) {
        vec<T> factor[W], start = vec<T>{};
        for (int l = 0; l < L; l++) {
            const int g = (v + l) % C / W, o = (v + l) % W;
            for (int i = 0; i < W; i++) factor[i][l] = matrix[((size_t)g * W + i) * W + o];
            if (bias) start[l] = bias[g * W + o];
        }
        for (int64_t f = v; f < whole; f += period) {
            const vec<T> x = load(in + f);
            vec<T> sum = add ? load(out + f) + start : start, other = vec<T>{};
#pragma GCC unroll 16
            for (int i = 0; i < W; i += 2) {
                sum += __builtin_shuffle(x, side.from[i]) * factor[i];
                other += __builtin_shuffle(x, side.from[i + 1]) * factor[i + 1];
            }
            store(out + f, sum + other);
        }
    }
    const int64_t done = whole / C;
    multiply_fixed<T, W>(in + done * C, matrix, bias, groups, W, pixels - done, add, out + done * C);
}

// Where a group fills whole vectors: four pixels at a time, so that a row of the matrix is loaded once for all of them
// and four sums grow side by side.
template <typename T, int P>
static inline void multiply_pixels(
    const T* in, const T* m, const T* start, int c, int64_t pitch, bool add, T* out) {
    vec<T> sum[P];
    for (int p = 0; p < P; p++) sum[p] = (start ? load(start) : vec<T>{}) + (add ? load(out + p * pitch) : vec<T>{});
    for (int i = 0; i < c; i++) {
        const vec<T> row = load(m + (int64_t)i * c);
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) sum[p] += in[p * pitch + i] * row;
    }
    for (int p = 0; p < P; p++) store(out + p * pitch, sum[p]);
}

template <typename T>
static void multiply_wide(
    const T* in, const T* matrix, const T* bias, int groups, int c, int64_t pixels, bool add, T* out) {
    const int64_t C = (int64_t)groups * c;
    for (int g = 0; g < groups; g++)
        for (int o = 0; o < c; o += Vec<T>::lanes) {
            const T *m = matrix + (size_t)g * c * c + o, *start = bias ? bias + g * c + o : nullptr;
            int64_t p = 0;
            for (; p + 4 <= pixels; p += 4)
                multiply_pixels<T, 4>(in + p * C + g * c, m, start, c, C, add, out + p * C + g * c + o);
            for (; p < pixels; p++)
                multiply_pixels<T, 1>(in + p * C + g * c, m, start, c, C, add, out + p * C + g * c + o);
        }
}

template <typename T>
static void multiply(
    const T* in, const T* matrix, const T* bias, int groups, int width, int64_t pixels, bool add, T* out) {
    constexpr int L = Vec<T>::lanes;
    if (width == 2 && L >= 2) return multiply_side_by_side<T, 2>(in, matrix, bias, groups, pixels, add, out);
    if (width == 4 && L >= 4) return multiply_side_by_side<T, 4>(in, matrix, bias, groups, pixels, add, out);
    if (width == 8 && L >= 8) return multiply_side_by_side<T, 8>(in, matrix, bias, groups, pixels, add, out);
    if (width % Vec<T>::lanes == 0) return multiply_wide(in, matrix, bias, groups, width, pixels, add, out);
    return multiply_fixed<T, 0>(in, matrix, bias, groups, width, pixels, add, out);
}

// sum[g][i][o] += sum_p a[p][g, i] x b[p][g, o]
template <typename T, int W>
static void outer_fixed(const T* a, const T* b, int groups, int width, int64_t pixels, T* sum) {
    const int c = W ? W : width;
    for (int g = 0; g < groups; g++) {
        T* to = sum + (size_t)g * c * c;
        if (W) {
            T acc[W ? W : 1][W ? W : 1];
            for (int i = 0; i < W; i++)
                for (int o = 0; o < W; o++) acc[i][o] = to[i * W + o];
            for (int64_t p = 0; p < pixels; p++) {
                const T *x = a + (p * groups + g) * c, *y = b + (p * groups + g) * c;
#pragma GCC unroll 16
                for (int i = 0; i < W; i++)
                    for (int o = 0; o < W; o++) acc[i][o] += x[i] * y[o];
            }
            for (int i = 0; i < W; i++)
                for (int o = 0; o < W; o++) to[i * W + o] = acc[i][o];
        } else {
            for (int64_t p = 0; p < pixels; p++) {
                const T *x = a + (p * groups + g) * c, *y = b + (p * groups + g) * c;
                for (int i = 0; i < c; i++)
                    for (int o = 0; o < c; o++) to[i * c + o] += x[i] * y[o];
            }
        }
    }
}
template <typename T, int W>
static void outer_side_by_side(const T* a, const T* b, int groups, int64_t pixels, T* sum) {
    constexpr int L = Vec<T>::lanes;
    const int C = groups * W, period = std::lcm(C, L);
    const SideBySide<T, W> side;
    const int64_t whole = pixels * C / period * period;
    for (int v = 0; v < period; v += L) {
        vec<T> acc[W] = {};
        for (int64_t f = v; f < whole; f += period) {
            const vec<T> x = load(a + f), y = load(b + f);
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) acc[i] += __builtin_shuffle(x, side.from[i]) * y;
        }
        for (int l = 0; l < L; l++)
            for (int i = 0; i < W; i++) sum[((size_t)((v + l) % C / W) * W + i) * W + (v + l) % W] += acc[i][l];
    }
    const int64_t done = whole / C;
    outer_fixed<T, W>(a + done * C, b + done * C, groups, W, pixels - done, sum);
}

// Where a group fills whole vectors: eight rows of the sums stay in registers over all pixels.
template <typename T>
static void outer_wide(const T* a, const T* b, int groups, int c, int64_t pixels, T* sum) {
    constexpr int rows = 8;
    const int64_t C = (int64_t)groups * c;
    for (int g = 0; g < groups; g++)
        for (int i = 0; i < c; i += rows)
            for (int o = 0; o < c; o += Vec<T>::lanes) {
                vec<T> acc[rows] = {};
                const T *x = a + g * c + i, *y = b + g * c + o;
                for (int64_t p = 0; p < pixels; p++, x += C, y += C) {
                    const vec<T> here = load(y);
#pragma GCC unroll 8
                    for (int r = 0; r < rows; r++) acc[r] += x[r] * here;
                }
                for (int r = 0; r < rows; r++) {
                    T* to = sum + ((size_t)g * c + i + r) * c + o;
                    store(to, load(to) + acc[r]);
                }
            }
}

template <typename T>
static void outer(const T* a, const T* b, int groups, int width, int64_t pixels, T* sum) {
    if (width == 2 && Vec<T>::lanes >= 2) return outer_side_by_side<T, 2>(a, b, groups, pixels, sum);
    if (width == 4 && Vec<T>::lanes >= 4) return outer_side_by_side<T, 4>(a, b, groups, pixels, sum);
    if (width == 8 && Vec<T>::lanes >= 8) return outer_side_by_side<T, 8>(a, b, groups, pixels, sum);
    if (width % 8 == 0 && width % Vec<T>::lanes == 0) return outer_wide(a, b, groups, width, pixels, sum);
    return outer_fixed<T, 0>(a, b, groups, width, pixels, sum);
}

// sum[j] += sum_p a[p][j]
template <typename T>
static void column_sums(const T* a, int channels, int64_t pixels, T* sum) {
    for (int64_t p = 0; p < pixels; p++)
        for (int j = 0; j < channels; j++) sum[j] += a[p * channels + j];
}
