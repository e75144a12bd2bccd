// SPDX-License-Identifier: Apache-2.0
// Batch normalisation (no scale and shift) folded into what it follows, and back.
#pragma once

#include "kernels.h"

// A factor per group: `at` lies in a matrix of `pitch` columns; null stands for ones (and takes no gradient).
template <typename T>
struct Strength {
    T* at;
    int64_t pitch;
    double operator[](int g) const { return at ? (double)at[g * pitch] : 1.0; }
};

// A normalisation's running statistics [channels] and how they move; in evaluation they are what it normalises with.
template <typename T>
struct Running {
    T *mean, *var;
    int64_t* batches;
    double momentum, eps;
    int training;
    void move(int channel, double new_mean, double new_var, int64_t count) const {
        const double unbiased = new_var * count / (double)std::max<int64_t>(count - 1, 1);
        mean[channel] = (T)(mean[channel] + momentum * (new_mean - mean[channel]));
        var[channel] = (T)(var[channel] + momentum * (unbiased - var[channel]));
    }
};

// Batch normalisation without scale and shift after a 1x1 of weight [groups][out][in], times strength [groups], as
// matrix m + bias. Statistics of the 1x1's output follow from the moments of its input (mean and second, per pixel),
// or are the running ones. `by_in` is matrix as [groups][in][out].
template <typename T>
void fold_normalisation(
    const T* weight, const double* mean, const double* second, const Running<T>& running, Strength<T> strength,
    int64_t count, int groups, int c, T* matrix, T* by_in, T* bias, double* out_mean, double* out_var) {
    if (running.training) ++*running.batches;
    for (int g = 0; g < groups; g++)
        for (int o = 0; o < c; o++) {
            const T* row = weight + ((size_t)g * c + o) * c;
            double mu = 0, var = 0;
            if (!running.training) {
                mu = running.mean[g * c + o], var = running.var[g * c + o];
            } else {
                for (int i = 0; i < c; i++) mu += row[i] * mean[g * c + i];
                for (int i = 0; i < c; i++)
                    for (int j = 0; j < c; j++)
                        var += row[i] * (double)row[j] *
                               (second[((size_t)g * c + i) * c + j] - mean[g * c + i] * mean[g * c + j]);
                var = var < 0 ? 0 : var;  // rounding; NaN stays
                running.move(g * c + o, mu, var, count);
            }
            const double scale = strength[g] / std::sqrt(var + running.eps);
            for (int i = 0; i < c; i++) {
                matrix[((size_t)g * c + o) * c + i] = (T)(scale * row[i]);
                by_in[((size_t)g * c + i) * c + o] = (T)(scale * row[i]);
            }
            bias[g * c + o] = (T)(-scale * mu);
            out_mean[g * c + o] = mu, out_var[g * c + o] = var;
        }
}

// The gradients of what fold_normalisation reads, from those of matrix (d_matrix [groups][out][in]) and bias. mean_out
// [groups][in] and second_out [groups][in][in] say how m's own gradient depends on m: mean_out + second_out m.
template <typename T>
void fold_normalisation_backward(
    const T* weight, const double* mean, const double* second, const double* mu, const double* var,
    Strength<T> strength, double eps, bool training, int64_t count, int groups, int c, const double* d_matrix,
    const double* d_bias, T* d_weight, Strength<T> d_strength, T* mean_out, T* second_out) {
    std::vector<double> covariance((size_t)c * c), d_covariance((size_t)c * c), d_mean(c);
    for (int g = 0; g < groups; g++) {
        const double* m1 = training ? mean + g * c : nullptr;
        if (m1)
            for (int i = 0; i < c; i++)
                for (int j = 0; j < c; j++)
                    covariance[i * c + j] = second[((size_t)g * c + i) * c + j] - m1[i] * m1[j];
        std::fill(d_covariance.begin(), d_covariance.end(), 0.0), std::fill(d_mean.begin(), d_mean.end(), 0.0);
        double ds = 0;
        for (int o = 0; o < c; o++) {
            const size_t at = ((size_t)g * c + o) * c;
            const T* row = weight + at;
            const double r = 1 / std::sqrt(var[g * c + o] + eps), s = strength[g];
            double dot = -d_bias[g * c + o] * mu[g * c + o];
            for (int i = 0; i < c; i++) dot += d_matrix[at + i] * row[i];
            ds += r * dot;
            // where rounding clamped the variance at zero the derivative is that of the unclamped one
            const double d_var = -0.5 * r * r * r * s * dot, d_mu = -s * r * d_bias[g * c + o];
            for (int i = 0; i < c; i++) {
                double d = s * r * d_matrix[at + i];
                if (m1) {
                    double cw = 0;
                    for (int j = 0; j < c; j++) cw += covariance[i * c + j] * row[j];
                    d += d_mu * m1[i] + 2 * d_var * cw;
                    d_mean[i] += d_mu * row[i];
                    for (int j = 0; j < c; j++) d_covariance[i * c + j] += d_var * row[i] * row[j];
                }
                d_weight[at + i] = (T)d;
            }
        }
        if (d_strength.at) d_strength.at[g * d_strength.pitch] = (T)ds;
        if (m1)
            for (int i = 0; i < c; i++) {
                double d = d_mean[i];
                for (int j = 0; j < c; j++) {
                    d -= 2 * d_covariance[i * c + j] * m1[j];
                    second_out[((size_t)g * c + i) * c + j] = (T)(2 * d_covariance[i * c + j] / count);
                }
                mean_out[g * c + i] = (T)(d / count);
            }
    }
}

// Poolings normalised, and the state itself, as scale [kind][groups][c] x u_kind + bias [groups][c]. Columns of the
// strengths by kind (-1: absent); mean and second [2][c] are the poolings' moments; mu and rate [2][c] are kept for the
// way back.
template <typename T>
void fold_shared(
    const double* mean, const double* second, const Running<T>* running, Strength<T> strengths, const int* columns,
    int64_t count, int groups, int c, T* scale, T* bias, double* mu, double* rate) {
    std::vector<double> sum((size_t)groups * c);
    for (int kind = 0; kind < 3; kind++)
        for (int i = 0; i < c; i++) {
            double r = columns[kind] >= 0 ? 1 : 0, m = 0;
            if (kind < 2 && columns[kind] >= 0) {
                const Running<T>& own = running[kind];
                if (own.training && i == 0) ++*own.batches;
                double v;
                if (own.training) {
                    m = mean[kind * c + i], v = second[kind * c + i] - m * m;
                    v = v < 0 ? 0 : v;
                    own.move(i, m, v, count);
                } else {
                    m = own.mean[i], v = own.var[i];
                }
                r = 1 / std::sqrt(v + own.eps);
            }
            if (kind < 2) mu[kind * c + i] = m, rate[kind * c + i] = r;
            for (int g = 0; g < groups; g++) {
                const double s = columns[kind] >= 0 ? r * strengths.at[g * strengths.pitch + columns[kind]] : 0;
                scale[((size_t)kind * groups + g) * c + i] = (T)s;
                sum[(size_t)g * c + i] -= s * m;
            }
        }
    for (size_t k = 0; k < sum.size(); k++) bias[k] = (T)sum[k];
}

// From products [kind][groups][c] and sums [groups][c] (gradients of scale and bias): d_strengths, and constant and
// linear [kind][c], by which u_kind's gradient depends on the statistics.
template <typename T>
void fold_shared_backward(
    const double* products, const double* sums, Strength<T> strengths, const int* columns, const double* mu,
    const double* rate, bool training, int64_t count, int groups, int c, Strength<T> d_strengths, T* constant,
    T* linear) {
    for (int kind = 0; kind < 3; kind++) {
        std::vector<double> total(groups);
        for (int i = 0; i < c; i++) {
            constant[kind * c + i] = linear[kind * c + i] = 0;
            if (columns[kind] < 0) continue;
            const double r = kind < 2 ? rate[kind * c + i] : 1, m = kind < 2 ? mu[kind * c + i] : 0;
            double weighted = 0, weighted_sums = 0;
            for (int g = 0; g < groups; g++) {
                const double s = strengths.at[g * strengths.pitch + columns[kind]], d_bias = sums[(size_t)g * c + i];
                const double slope = products[((size_t)kind * groups + g) * c + i] - m * d_bias;
                total[g] += r * slope, weighted += s * slope, weighted_sums += s * d_bias;
            }
            if (kind == 2 || !training) continue;
            const double d_var = -0.5 * r * r * r * weighted;
            constant[kind * c + i] = (T)((-r * weighted_sums - 2 * m * d_var) / count);
            linear[kind * c + i] = (T)(2 * d_var / count);
        }
        if (columns[kind] >= 0)
            for (int g = 0; g < groups; g++) d_strengths.at[g * d_strengths.pitch + columns[kind]] = (T)total[g];
    }
}
