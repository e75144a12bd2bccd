// SPDX-License-Identifier: Apache-2.0
// The entries: encode, decode, depthwise-separable stacks and their gradients, normalisation folded into the 1x1.
#include "depthwise.h"
#include "pointwise.h"

namespace {

constexpr int BLOCK = 128;  // pixels decoded at a time where no neighbour is needed

// Sums of all tasks, in the order of the tasks.
void add_tasks(const std::vector<std::vector<double>>& parts, double* out) {
    if (parts.empty() || !out) return;
    for (size_t k = 0; k < parts[0].size(); k++) {
        double sum = 0;
        for (const auto& part : parts) sum += part[k];
        out[k] = sum;
    }
}

template <typename T>
void widen_add(const std::vector<T>& from, std::vector<double>& to) {
    for (size_t k = 0; k < from.size(); k++) to[k] += from[k];
}

// Calls body(first pixel, pixels) over blocks of the pixels [from, to).
template <typename Body>
void blocks(int64_t from, int64_t to, Body body) {
    for (int64_t p = from; p < to; p += BLOCK) body(p, std::min<int64_t>(BLOCK, to - p));
}

template <typename T>
void encode_all(
    const Encoding<T>& e, const T* x, int64_t images, int64_t pixels, int groups, int width, uint8_t* codes,
    uint8_t* codes8, int threads) {
    const int tasks = tasks_of(images), C = groups * width;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tasks; t++) {
        const int64_t from = bound(images, tasks, t) * pixels, to = bound(images, tasks, t + 1) * pixels;
        encode(e, x + from * C, to - from, groups, width, codes + from * C, codes8 ? codes8 + from * C : nullptr);
    }
}

template <typename T>
void decode_all(const Source<T>& s, int64_t images, int64_t pixels, T* out, int threads) {
    const int tasks = tasks_of(images);
    const Pattern<T> pattern(s);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tasks; t++) {
        Scratch<T>& scratch = Scratch<T>::of_thread();
        blocks(bound(images, tasks, t) * pixels, bound(images, tasks, t + 1) * pixels, [&](int64_t p, int64_t n) {
            decode(s, pattern, rows_of(s, p, n, scratch, scratch.a), n, out + p * s.channels());
        });
    }
}

// Gradients d [pixels][channels] of what a shared source decodes to, as those of what it stores: [pixels][width].
template <typename T>
void gather(const Source<T>& s, const T* d, int64_t pixels, T* out) {
    const int C = s.channels();
    for (int64_t q = 0; q < pixels; q++)
        for (int i = 0; i < s.width; i++) {
            T sum = 0;
            for (int g = 0; g < s.groups; g++) sum += d[q * C + g * s.width + i];
            out[q * s.width + i] = sum;
        }
}

// d [pixels][channels] -> out [pixels][in]; p [groups][columns] or null.
template <typename T>
void decode_backward_all(
    const Source<T>& s, const T* d, int64_t images, int64_t pixels, T* out, double* p, int threads) {
    const int tasks = tasks_of(images), C = s.channels(), columns = s.mixture.columns();
    const Pattern<T> pattern(s);
    std::vector<std::vector<double>> parts(p ? tasks : 0, std::vector<double>(p ? s.groups * columns : 0));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tasks; t++) {
        Scratch<T>& scratch = Scratch<T>::of_thread();
        std::vector<T> p_sum((size_t)columns * pattern.period);
        blocks(bound(images, tasks, t) * pixels, bound(images, tasks, t + 1) * pixels, [&](int64_t first, int64_t n) {
            T* to = out + first * s.in();
            T* rows = s.shared ? aligned(scratch.b, n * C) : to;
            const Rows<T> r = rows_of(s, first, n, scratch, scratch.a);
            decode_backward(s, pattern, r, n, d + first * C, rows, p ? p_sum.data() : nullptr);
            if (s.shared) gather(s, rows, n, to);
        });
        if (p) fold_p(s, pattern, p_sum.data(), parts[t].data());
    }
    add_tasks(parts, p);
}

template <typename T>
void depthwise_forward(
    const Source<T>& s, int64_t images, const Window& w, const T* weight, T* out, int threads) {
    const int tasks = tasks_of(images);
    const int64_t pixels = (int64_t)w.H * w.W;
    const Pattern<T> pattern(s);
    const std::vector<T> taps = spread_weight(weight, w.C, w.taps(), false);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tasks; t++) {
        Scratch<T>& scratch = Scratch<T>::of_thread();
        T* padded = aligned(scratch.c, w.padded());
        for (int64_t n = bound(images, tasks, t); n < bound(images, tasks, t + 1); n++) {
            decode_padded(w, s, pattern, rows_of(s, n * pixels, pixels, scratch, scratch.a), scratch.b, padded);
            convolve(w, padded, taps.data(), out + n * w.Ho * w.Wo * w.C);
        }
    }
}

// mean [channels] and second [groups][width][width]: means over all pixels of m and of m m^T, m the decoded tensor.
template <typename T>
void moments(const Source<T>& s, int64_t images, int64_t pixels, double* mean, double* second, int threads) {
    const int tasks = tasks_of(images), C = s.channels(), square = C * s.width;
    const Pattern<T> pattern(s);
    std::vector<std::vector<double>> means(tasks, std::vector<double>(C)), seconds(tasks, std::vector<double>(square));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tasks; t++) {
        Scratch<T>& scratch = Scratch<T>::of_thread();
        std::vector<T> sum(C), products(square);
        blocks(bound(images, tasks, t) * pixels, bound(images, tasks, t + 1) * pixels, [&](int64_t p, int64_t n) {
            T* m = aligned(scratch.b, n * C);
            decode(s, pattern, rows_of(s, p, n, scratch, scratch.a), n, m);
            std::fill(sum.begin(), sum.end(), (T)0), std::fill(products.begin(), products.end(), (T)0);
            column_sums(m, C, n, sum.data());
            outer(m, m, s.groups, s.width, n, products.data());
            widen_add(sum, means[t]), widen_add(products, seconds[t]);
        });
    }
    add_tasks(means, mean), add_tasks(seconds, second);
    const double count = (double)images * pixels;
    for (int j = 0; j < C; j++) mean[j] /= count;
    for (int j = 0; j < square; j++) second[j] /= count;
}

// out (+)= bias + matrix m, matrix [groups][in][out].
template <typename T>
void pointwise_forward(
    const Source<T>& s, int64_t images, int64_t pixels, const T* matrix, const T* bias, bool add, T* out, int threads) {
    const int tasks = tasks_of(images), C = s.channels();
    const Pattern<T> pattern(s);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tasks; t++) {
        Scratch<T>& scratch = Scratch<T>::of_thread();
        blocks(bound(images, tasks, t) * pixels, bound(images, tasks, t + 1) * pixels, [&](int64_t p, int64_t n) {
            T* m = aligned(scratch.b, n * C);
            decode(s, pattern, rows_of(s, p, n, scratch, scratch.a), n, m);
            multiply(m, matrix, bias, s.groups, s.width, n, add, out + p * C);
        });
    }
}

// products [groups][out][in]: sums of g m^T; sum [channels]: of g.
template <typename T>
void pointwise_sums(
    const Source<T>& s, const T* g, int64_t images, int64_t pixels, double* products, double* sum, int threads) {
    const int tasks = tasks_of(images), C = s.channels(), square = C * s.width;
    const Pattern<T> pattern(s);
    std::vector<std::vector<double>> sums(tasks, std::vector<double>(C)), squares(tasks, std::vector<double>(square));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tasks; t++) {
        Scratch<T>& scratch = Scratch<T>::of_thread();
        std::vector<T> part(C), outer_part(square);
        blocks(bound(images, tasks, t) * pixels, bound(images, tasks, t + 1) * pixels, [&](int64_t p, int64_t n) {
            T* m = aligned(scratch.b, n * C);
            decode(s, pattern, rows_of(s, p, n, scratch, scratch.a), n, m);
            std::fill(part.begin(), part.end(), (T)0), std::fill(outer_part.begin(), outer_part.end(), (T)0);
            column_sums(g + p * C, C, n, part.data());
            outer(g + p * C, m, s.groups, s.width, n, outer_part.data());
            widen_add(part, sums[t]), widen_add(outer_part, squares[t]);
        });
    }
    add_tasks(sums, sum), add_tasks(squares, products);
}

// What one task keeps on its way back through a depthwise convolution of `image`; asked for by `weights`, `probabilities`.
template <typename T>
struct DepthwiseBack {
    const Source<T>& image;
    const Pattern<T>& pattern;
    const Window& w;
    const T* taps;  // spread, flipped where stride is 1
    std::vector<T> p_sum, w_buffer;
    T *w_sum = nullptr, *p = nullptr;
    DepthwiseBack(
        const Source<T>& image, const Pattern<T>& pattern, const Window& w, const T* taps, bool weights,
        bool probabilities)
        : image(image), pattern(pattern), w(w), taps(taps) {
        if (weights) {
            w_sum = aligned(w_buffer, (int64_t)pattern.period * w.taps());
            std::memset(w_sum, 0, sizeof(T) * pattern.period * w.taps());
        }
        p_sum.resize((size_t)image.mixture.columns() * pattern.period);
        p = probabilities ? p_sum.data() : nullptr;
    }
    // Image n, from the gradient dy [Ho][Wo][C] of its output; uses the buffers c, d and e, and a. out may be null.
    void step(int64_t n, const T* dy, Scratch<T>& scratch, T* out) {
        const int64_t pixels = (int64_t)w.H * w.W;
        const Rows<T> rows = rows_of(image, n * pixels, pixels, scratch, scratch.a);
        if (w_sum) {
            T* padded = aligned(scratch.d, w.padded());
            decode_padded(w, image, pattern, rows, scratch.c, padded);
            convolve_weight_gradient(w, padded, dy, w_sum);
        }
        if (!out && !p) return;
        T* to = out ? out + n * pixels * image.in() : nullptr;
        T* d_image = to && !image.shared ? to : aligned(scratch.c, pixels * w.C);
        convolve_input_gradient(w, dy, taps, scratch.e, d_image);
        decode_backward(image, pattern, rows, pixels, d_image, d_image, p);
        if (to && image.shared) gather(image, d_image, pixels, to);
    }
    void fold(double* weight, double* probabilities) const {
        constexpr int L = Vec<T>::lanes;
        const int taps = w.taps();
        if (p) fold_p(image, pattern, p, probabilities);
        if (w_sum)
            for (int j = 0; j < pattern.period; j++)
                for (int k = 0; k < taps; k++)
                    weight[(size_t)(j % w.C) * taps + k] += w_sum[((size_t)(j / L) * taps + k) * L + j % L];
    }
};

// Depthwise convolution of `image`, whose output's gradient is dy: back through it and image's quantiser.
template <typename T>
void depthwise_backward(
    const Source<T>& image, int64_t images, const Window& w, const T* weight, const T* dy, T* out, double* weight_out,
    double* p_image, int threads) {
    const int tasks = tasks_of(images), columns = image.mixture.columns();
    const Pattern<T> pattern(image);
    const std::vector<T> taps = spread_weight(weight, w.C, w.taps(), w.stride == 1);
    std::vector<std::vector<double>> p(p_image ? tasks : 0, std::vector<double>(p_image ? image.groups * columns : 0));
    std::vector<std::vector<double>> weights(
        weight_out ? tasks : 0, std::vector<double>(weight_out ? (size_t)w.C * w.taps() : 0));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tasks; t++) {
        Scratch<T>& scratch = Scratch<T>::of_thread();
        DepthwiseBack<T> back(image, pattern, w, taps.data(), weight_out != nullptr, p_image != nullptr);
        for (int64_t n = bound(images, tasks, t); n < bound(images, tasks, t + 1); n++)
            back.step(n, dy + n * w.Ho * w.Wo * w.C, scratch, out);
        back.fold(weight_out ? weights[t].data() : nullptr, p_image ? p[t].data() : nullptr);
    }
    add_tasks(p, p_image), add_tasks(weights, weight_out);
}

// Depthwise convolution of `image` followed by `mid` (its output, quantised) and a 1x1 whose output's gradient is g:
// dm = matrix^T g + mean + second m, then back through mid's quantiser, the depthwise convolution and image's quantiser.
template <typename T>
void separable_backward(
    const Source<T>& mid, const T* g, const T* matrix, const T* mean, const T* second, const Source<T>& image,
    int64_t images, const Window& w, const T* weight, T* out, double* weight_out, double* p_mid, double* p_image,
    int threads) {
    const int tasks = tasks_of(images), C = w.C, taps = w.taps();
    const int64_t after = (int64_t)w.Ho * w.Wo;
    const Pattern<T> mid_pattern(mid), image_pattern(image);
    const std::vector<T> spread_taps = spread_weight(weight, C, taps, w.stride == 1);
    const int mid_columns = mid.mixture.columns(), image_columns = image.mixture.columns();
    std::vector<std::vector<double>> p1(p_mid ? tasks : 0, std::vector<double>(p_mid ? mid.groups * mid_columns : 0));
    std::vector<std::vector<double>> p2(
        p_image ? tasks : 0, std::vector<double>(p_image ? image.groups * image_columns : 0));
    std::vector<std::vector<double>> weights(
        weight_out ? tasks : 0, std::vector<double>(weight_out ? (size_t)C * taps : 0));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tasks; t++) {
        Scratch<T>& scratch = Scratch<T>::of_thread();
        std::vector<T> mid_p((size_t)mid_columns * mid_pattern.period);
        DepthwiseBack<T> back(
            image, image_pattern, w, spread_taps.data(), weight_out != nullptr, p_image != nullptr);
        T* dy = aligned(scratch.b, after * C);
        for (int64_t n = bound(images, tasks, t); n < bound(images, tasks, t + 1); n++) {
            blocks(0, after, [&](int64_t q, int64_t count) {
                const Rows<T> rows = rows_of(mid, n * after + q, count, scratch, scratch.a);
                T* to = dy + q * C;
                multiply(g + (n * after + q) * C, matrix, mean, mid.groups, mid.width, count, false, to);
                if (second) {
                    T* m = aligned(scratch.d, count * C);
                    decode(mid, mid_pattern, rows, count, m);
                    multiply(m, second, (const T*)nullptr, mid.groups, mid.width, count, true, to);
                }
                decode_backward(mid, mid_pattern, rows, count, to, to, p_mid ? mid_p.data() : nullptr);
            });
            back.step(n, dy, scratch, out);
        }
        if (p_mid) fold_p(mid, mid_pattern, mid_p.data(), p1[t].data());
        back.fold(weight_out ? weights[t].data() : nullptr, p_image ? p2[t].data() : nullptr);
    }
    add_tasks(p1, p_mid), add_tasks(p2, p_image), add_tasks(weights, weight_out);
}

// Batch normalisation without scale and shift after a 1x1 of weight [groups][out][in], times strength [groups], as
// matrix m + bias. Statistics of the 1x1's output follow from the moments of its input (mean and second, per pixel),
// or are given (running_mean, running_var). `by_in` is matrix as [groups][in][out].
template <typename T>
void fold_normalisation(
    const T* weight, const double* mean, const double* second, const T* given_mean, const T* given_var, const T* strength,
    double eps, int groups, int c, T* matrix, T* by_in, T* bias, double* out_mean, double* out_var) {
    for (int g = 0; g < groups; g++)
        for (int o = 0; o < c; o++) {
            const T* row = weight + ((size_t)g * c + o) * c;
            double mu = 0, var = 0;
            if (given_mean) {
                mu = given_mean[g * c + o], var = given_var[g * c + o];
            } else {
                for (int i = 0; i < c; i++) mu += row[i] * mean[g * c + i];
                for (int i = 0; i < c; i++)
                    for (int j = 0; j < c; j++)
                        var += row[i] * (double)row[j] *
                               (second[((size_t)g * c + i) * c + j] - mean[g * c + i] * mean[g * c + j]);
                var = var < 0 ? 0 : var;  // rounding; NaN stays
            }
            const double scale = strength[g] / std::sqrt(var + eps);
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
    const T* weight, const double* mean, const double* second, const double* mu, const double* var, const T* strength,
    double eps, int64_t count, int groups, int c, const double* d_matrix, const double* d_bias, T* d_weight,
    double* d_strength, T* mean_out, T* second_out) {
    std::vector<double> covariance((size_t)c * c), d_covariance((size_t)c * c), d_mean(c);
    for (int g = 0; g < groups; g++) {
        const double* m1 = mean ? mean + g * c : nullptr;
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
        d_strength[g] = ds;
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

}  // namespace

#define ENTRIES(T, S)                                                                                                  \
    extern "C" void encode_##S(                                                                                        \
        const Encoding<T>* e, const T* x, int64_t images, int64_t pixels, int groups, int width, uint8_t* codes,       \
        uint8_t* codes8, int threads) {                                                                                \
        encode_all(*e, x, images, pixels, groups, width, codes, codes8, threads);                                      \
    }                                                                                                                  \
    extern "C" void decode_##S(const Source<T>* s, int64_t images, int64_t pixels, T* out, int threads) {              \
        decode_all(*s, images, pixels, out, threads);                                                                  \
    }                                                                                                                  \
    extern "C" void decode_backward_##S(                                                                               \
        const Source<T>* s, const T* d, int64_t images, int64_t pixels, T* out, double* p, int threads) {              \
        decode_backward_all(*s, d, images, pixels, out, p, threads);                                                   \
    }                                                                                                                  \
    extern "C" void depthwise_##S(                                                                                     \
        const Source<T>* s, int64_t images, const int* w, const T* weight, T* out, int threads) {                      \
        depthwise_forward(*s, images, Window(w[0], w[1], w[2], w[3], w[4], w[5], w[6]), weight, out, threads);         \
    }                                                                                                                  \
    extern "C" void depthwise_backward_##S(                                                                            \
        const Source<T>* s, int64_t images, const int* w, const T* weight, const T* dy, T* out, double* weight_out,    \
        double* p, int threads) {                                                                                      \
        depthwise_backward(                                                                                            \
            *s, images, Window(w[0], w[1], w[2], w[3], w[4], w[5], w[6]), weight, dy, out, weight_out, p, threads);    \
    }                                                                                                                  \
    extern "C" void moments_##S(                                                                                       \
        const Source<T>* s, int64_t images, int64_t pixels, double* mean, double* second, int threads) {               \
        moments(*s, images, pixels, mean, second, threads);                                                            \
    }                                                                                                                  \
    extern "C" void pointwise_##S(                                                                                     \
        const Source<T>* s, int64_t images, int64_t pixels, const T* matrix, const T* bias, int add, T* out,           \
        int threads) {                                                                                                 \
        pointwise_forward(*s, images, pixels, matrix, bias, add != 0, out, threads);                                   \
    }                                                                                                                  \
    extern "C" void pointwise_sums_##S(                                                                                \
        const Source<T>* s, const T* g, int64_t images, int64_t pixels, double* products, double* sum, int threads) {  \
        pointwise_sums(*s, g, images, pixels, products, sum, threads);                                                 \
    }                                                                                                                  \
    extern "C" void separable_backward_##S(                                                                            \
        const Source<T>* mid, const T* g, const T* matrix, const T* mean, const T* second, const Source<T>* image,     \
        int64_t images, const int* w, const T* weight, T* out, double* weight_out, double* p_mid, double* p_image,     \
        int threads) {                                                                                                 \
        separable_backward(                                                                                            \
            *mid, g, matrix, mean, second, *image, images, Window(w[0], w[1], w[2], w[3], w[4], w[5], w[6]), weight,   \
            out, weight_out, p_mid, p_image, threads);                                                                 \
    }                                                                                                                  \
    extern "C" void fold_##S(                                                                                          \
        const T* weight, const double* mean, const double* second, const T* given_mean, const T* given_var,            \
        const T* strength, double eps, int groups, int c, T* matrix, T* by_in, T* bias, double* mu, double* var) {     \
        fold_normalisation(                                                                                            \
            weight, mean, second, given_mean, given_var, strength, eps, groups, c, matrix, by_in, bias, mu, var);      \
    }                                                                                                                  \
    extern "C" void fold_backward_##S(                                                                                 \
        const T* weight, const double* mean, const double* second, const double* mu, const double* var,                \
        const T* strength, double eps, int64_t count, int groups, int c, const double* d_matrix,                       \
        const double* d_bias, T* d_weight, double* d_strength, T* mean_out, T* second_out) {                           \
        fold_normalisation_backward(                                                                                   \
            weight, mean, second, mu, var, strength, eps, count, groups, c, d_matrix, d_bias, d_weight, d_strength,    \
            mean_out, second_out);                                                                                     \
    }

ENTRIES(float, f32)
ENTRIES(double, f64)
