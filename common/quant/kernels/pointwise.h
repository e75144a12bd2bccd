// SPDX-License-Identifier: Apache-2.0
// Block-diagonal 1x1 convolutions on [pixels][groups * width] rows: products with a matrix per group, and sums of
// outer products.
#pragma once

#include "kernels.h"

// Any width: four pixels at a time, so that a row of the matrix is loaded once for all of them and four sums grow
// side by side. `m` is a column block of the matrix, [width][pitch]; of the sums `lanes` are wanted.
template <typename T, int P>
static inline void multiply_pixels(
    const T* in, const T* m, int64_t pitch, const T* start, int c, int lanes, int64_t C, bool add, T* out) {
    vec<T> sum[P];
    for (int p = 0; p < P; p++) sum[p] = load(start);
    for (int i = 0; i < c; i++) {
        const vec<T> row = load(m + i * pitch);
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) sum[p] += in[p * C + i] * row;
    }
    for (int p = 0; p < P; p++) {
        T* to = out + p * C;
        if (lanes == Vec<T>::lanes) {
            store(to, add ? load(to) + sum[p] : sum[p]);
        } else {
            for (int l = 0; l < lanes; l++) to[l] = (add ? to[l] : (T)0) + sum[p][l];
        }
    }
}

template <typename T>
static void multiply_any(
    const T* in, const T* matrix, const T* bias, int groups, int c, int64_t pixels, bool add, T* out) {
    constexpr int L = Vec<T>::lanes;
    const int64_t C = (int64_t)groups * c, pitch = (c + L - 1) / L * L;
    std::vector<T> rows((size_t)c * pitch), start(pitch);  // a group's matrix and bias, filled up with zeros
    for (int g = 0; g < groups; g++) {
        for (int i = 0; i < c; i++) std::memcpy(&rows[i * pitch], matrix + ((size_t)g * c + i) * c, sizeof(T) * c);
        if (bias) std::memcpy(start.data(), bias + g * c, sizeof(T) * c);
        for (int o = 0; o < c; o += L) {
            const int lanes = std::min(L, c - o);
            const T *from = in + g * c, *m = rows.data() + o, *first = start.data() + o;
            T* to = out + g * c + o;
            int64_t p = 0;
            for (; p + 4 <= pixels; p += 4)
                multiply_pixels<T, 4>(from + p * C, m, pitch, first, c, lanes, C, add, to + p * C);
            for (; p < pixels; p++)
                multiply_pixels<T, 1>(from + p * C, m, pitch, first, c, lanes, C, add, to + p * C);
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
    multiply_any(in + done * C, matrix, bias, groups, W, pixels - done, add, out + done * C);
}

// out[p][g, o] (+)= bias[g, o] + sum_i in[p][g, i] x matrix[g][i][o]; bias may be null.
template <typename T>
static void multiply(
    const T* in, const T* matrix, const T* bias, int groups, int width, int64_t pixels, bool add, T* out) {
    constexpr int L = Vec<T>::lanes;
    if (width == 2 && L >= 2) return multiply_side_by_side<T, 2>(in, matrix, bias, groups, pixels, add, out);
    if (width == 4 && L >= 4) return multiply_side_by_side<T, 4>(in, matrix, bias, groups, pixels, add, out);
    if (width == 8 && L >= 8) return multiply_side_by_side<T, 8>(in, matrix, bias, groups, pixels, add, out);
    return multiply_any(in, matrix, bias, groups, width, pixels, add, out);
}

// Any width: some rows of the sums stay in registers over all pixels. Of a vector of b `lanes` are b's own group's;
// at the last pixel nothing is read beyond them.
template <typename T, int R>
static inline void outer_rows(const T* x, const T* y, int lanes, int64_t C, int64_t pixels, T* sum, int pitch) {
    vec<T> acc[R] = {};
    for (int64_t p = 0; p < pixels; p++, x += C, y += C) {
        vec<T> here = vec<T>{};
        if (lanes == Vec<T>::lanes || p + 1 < pixels - Vec<T>::lanes / C)
            here = load(y);
        else
            std::memcpy(&here, y, sizeof(T) * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[r] += x[r] * here;
    }
    for (int r = 0; r < R; r++)
        for (int l = 0; l < lanes; l++) sum[r * pitch + l] += acc[r][l];
}

template <typename T>
static void outer_any(const T* a, const T* b, int groups, int c, int64_t pixels, T* sum) {
    const int64_t C = (int64_t)groups * c;
    for (int g = 0; g < groups; g++)
        for (int o = 0; o < c; o += Vec<T>::lanes) {
            const int lanes = std::min(Vec<T>::lanes, c - o);
            const T *x = a + g * c, *y = b + g * c + o;
            T* to = sum + (size_t)g * c * c + o;
            int i = 0;
            for (; i + 8 <= c; i += 8) outer_rows<T, 8>(x + i, y, lanes, C, pixels, to + (size_t)i * c, c);
            for (; i + 2 <= c; i += 2) outer_rows<T, 2>(x + i, y, lanes, C, pixels, to + (size_t)i * c, c);
            for (; i < c; i++) outer_rows<T, 1>(x + i, y, lanes, C, pixels, to + (size_t)i * c, c);
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
    outer_any(a + done * C, b + done * C, groups, W, pixels - done, sum);
}

// sum[g][i][o] += sum_p a[p][g, i] x b[p][g, o]
template <typename T>
static void outer(const T* a, const T* b, int groups, int width, int64_t pixels, T* sum) {
    if (width == 2 && Vec<T>::lanes >= 2) return outer_side_by_side<T, 2>(a, b, groups, pixels, sum);
    if (width == 4 && Vec<T>::lanes >= 4) return outer_side_by_side<T, 4>(a, b, groups, pixels, sum);
    if (width == 8 && Vec<T>::lanes >= 8) return outer_side_by_side<T, 8>(a, b, groups, pixels, sum);
    return outer_any(a, b, groups, width, pixels, sum);
}

// sum[j] += sum_p a[p][j]
template <typename T>
static void column_sums(const T* a, int channels, int64_t pixels, T* sum) {
    for (int64_t p = 0; p < pixels; p++)
        for (int j = 0; j < channels; j++) sum[j] += a[p * channels + j];
}
