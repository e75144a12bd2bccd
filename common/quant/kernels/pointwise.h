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
template <typename T>
static void multiply(
    const T* in, const T* matrix, const T* bias, int groups, int width, int64_t pixels, bool add, T* out) {
    switch (width) {
        case 2: return multiply_fixed<T, 2>(in, matrix, bias, groups, width, pixels, add, out);
        case 4: return multiply_fixed<T, 4>(in, matrix, bias, groups, width, pixels, add, out);
        case 8: return multiply_fixed<T, 8>(in, matrix, bias, groups, width, pixels, add, out);
        case 16: return multiply_fixed<T, 16>(in, matrix, bias, groups, width, pixels, add, out);
        default: return multiply_fixed<T, 0>(in, matrix, bias, groups, width, pixels, add, out);
    }
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
template <typename T>
static void outer(const T* a, const T* b, int groups, int width, int64_t pixels, T* sum) {
    switch (width) {
        case 2: return outer_fixed<T, 2>(a, b, groups, width, pixels, sum);
        case 4: return outer_fixed<T, 4>(a, b, groups, width, pixels, sum);
        case 8: return outer_fixed<T, 8>(a, b, groups, width, pixels, sum);
        case 16: return outer_fixed<T, 16>(a, b, groups, width, pixels, sum);
        default: return outer_fixed<T, 0>(a, b, groups, width, pixels, sum);
    }
}

// sum[j] += sum_p a[p][j]
template <typename T>
static void column_sums(const T* a, int channels, int64_t pixels, T* sum) {
    for (int64_t p = 0; p < pixels; p++)
        for (int j = 0; j < channels; j++) sum[j] += a[p * channels + j];
}
