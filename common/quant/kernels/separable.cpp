// SPDX-License-Identifier: Apache-2.0
// The entries: encode, decode, depthwise-separable stacks and their gradients, normalisation folded into the 1x1.
#include "depthwise.h"
#include "normalisation.h"
#include "pointwise.h"

namespace {

constexpr int BLOCK = 128;  // pixels decoded at a time where no neighbour is needed

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

// What one task keeps on its way back through a depthwise convolution of `image`; asked for by `weights` and
// `probabilities`.
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
// dm = matrix^T g + mean + second m (`through` holds mean, then second), then back through mid's quantiser, the
// depthwise convolution and image's quantiser.
template <typename T>
void separable_backward(
    const Source<T>& mid, const T* g, const T* matrix, const T* through, const Source<T>& image, int64_t images,
    const Window& w, const T* weight, T* out, T* weight_out, T* p_out, int threads) {
    const int tasks = tasks_of(images), C = w.C, taps = w.taps();
    const T *mean = through, *second = through ? through + C : nullptr;
    const int p_size = p_out && !mid.floats ? mid.groups * mid.mixture.columns() : 0;
    std::vector<double> p_sums(2 * p_size), w_sums(weight_out ? (size_t)C * taps : 0);
    double *p_mid = p_size ? p_sums.data() : nullptr, *p_image = p_size ? p_sums.data() + p_size : nullptr;
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
    add_tasks(p1, p_mid), add_tasks(p2, p_image), add_tasks(weights, weight_out ? w_sums.data() : nullptr);
    for (int k = 0; k < p_size; k++) p_out[k] += (T)(p_sums[k] + p_sums[p_size + k]);
    for (size_t k = 0; k < w_sums.size(); k++) weight_out[k] = (T)w_sums[k];
}

// Statistics of the 1x1's output from the moments of its input, and both folded: see fold_normalisation. `values` holds
// matrix [groups][out][in], the same as [groups][in][out], and bias [groups][out]; `statistics` the 1x1's mean and
// variance [groups][out] and its input's moments, which `known` says are there already (of `ranks` times as many pixels).
template <typename T>
void normalise(
    const Source<T>& s, int64_t images, int64_t pixels, const T* weight, const Running<T>& running,
    Strength<T> strength, bool known, int ranks, T* values, double* statistics, int threads) {
    const int C = s.channels(), square = C * s.width;
    if (running.training && !known) moments(s, images, pixels, statistics + 2 * C, statistics + 3 * C, threads);
    fold_normalisation(
        weight, statistics + 2 * C, statistics + 3 * C, running, strength, images * pixels * ranks, s.groups, s.width,
        values, values + square, values + 2 * square, statistics, statistics + C);
}

// Back through the folded 1x1: see fold_normalisation_backward.
template <typename T>
void pointwise_backward(
    const Source<T>& s, const T* g, int64_t images, int64_t pixels, const T* weight, double eps, bool training,
    Strength<T> strength, const double* statistics, T* d_weight, Strength<T> d_strength, T* through, int threads) {
    const int C = s.channels();
    std::vector<double> products((size_t)C * s.width), sums(C);
    pointwise_sums(s, g, images, pixels, products.data(), sums.data(), threads);
    fold_normalisation_backward(
        weight, statistics + 2 * C, statistics + 3 * C, statistics, statistics + C, strength, eps, training,
        images * pixels, s.groups, s.width, products.data(), sums.data(), d_weight, d_strength, through, through + C);
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
    extern "C" void pointwise_##S(                                                                                     \
        const Source<T>* s, int64_t images, int64_t pixels, const T* matrix, const T* bias, int add, T* out,           \
        int threads) {                                                                                                 \
        pointwise_forward(*s, images, pixels, matrix, bias, add != 0, out, threads);                                   \
    }                                                                                                                  \
    extern "C" void normalise_##S(                                                                                     \
        const Source<T>* s, int64_t images, int64_t pixels, const T* weight, const Running<T>* running,                \
        Strength<T> strength, int known, int ranks, T* values, double* statistics, int threads) {                      \
        normalise(*s, images, pixels, weight, *running, strength, known != 0, ranks, values, statistics, threads);     \
    }                                                                                                                  \
    extern "C" void moments_##S(const Source<T>* s, int64_t images, int64_t pixels, double* out, int threads) {        \
        moments(*s, images, pixels, out, out + s->channels(), threads);                                                \
    }                                                                                                                  \
    extern "C" void pointwise_backward_##S(                                                                            \
        const Source<T>* s, const T* g, int64_t images, int64_t pixels, const T* weight, double eps, int training,     \
        Strength<T> strength, const double* statistics, T* d_weight, Strength<T> d_strength, T* through, int threads) {\
        pointwise_backward(                                                                                            \
            *s, g, images, pixels, weight, eps, training != 0, strength, statistics, d_weight, d_strength, through,    \
            threads);                                                                                                  \
    }                                                                                                                  \
    extern "C" void separable_backward_##S(                                                                            \
        const Source<T>* mid, const T* g, const T* matrix, const T* through, int training, const Source<T>* image,     \
        int64_t images, const int* w, const T* weight, T* out, T* weight_out, T* p_out, int threads) {                 \
        separable_backward(                                                                                            \
            *mid, g, matrix, training ? through : nullptr, *image, images,                                             \
            Window(w[0], w[1], w[2], w[3], w[4], w[5], w[6]), weight, out, weight_out, p_out, threads);                \
    }

ENTRIES(float, f32)
ENTRIES(double, f64)
