// SPDX-License-Identifier: Apache-2.0
// What edges share: a state's 3x3 poolings and the state itself, added to every edge with weights of its own; and the
// sum of a node's edges beside the channels that bypass them.
#include "depthwise.h"
#include "normalisation.h"

namespace {

// 3x3 poolings with padding 1 of an image [H][W][c], and their gradients.
template <typename T>
struct Pools {
    Window w;
    std::vector<T> share;  // 1 / pixels under the window, [Ho][Wo * c]
    std::vector<T> zeros_buffer, low_buffer, back_buffer;
    T *zeros, *low;

    Pools(int H, int W, int c, int stride) : w(H, W, c, 3, stride, 1, 1), share((size_t)w.Ho * w.Wo * c) {
        zeros = aligned(zeros_buffer, w.padded()), low = aligned(low_buffer, w.padded());
        for (int y = 0; y < w.Ho; y++)
            for (int x = 0; x < w.Wo; x++) {
                const int top = std::max(0, y * stride - 1), bottom = std::min(H, y * stride + 2);
                const int left = std::max(0, x * stride - 1), right = std::min(W, x * stride + 2);
                for (int i = 0; i < c; i++)
                    share[((size_t)y * w.Wo + x) * c + i] = (T)1 / (T)((bottom - top) * (right - left));
            }
    }

    // max [Ho][Wo][c], the tap that it came from (first of equals), and mean; each may be null.
    void forward(const T* image, T* max, T* tap, T* mean) {
        const int length = w.Wo * w.C;
        if (mean) pad_image(w, image, zeros);
        if (max) {
            pad_image(w, image, low);
            const T least = -std::numeric_limits<T>::infinity();
            for (int y = 0; y < w.rows; y++)
                for (int x = 0; x < w.columns * w.stride; x++)
                    if (y < w.pad || y >= w.pad + w.H || x < w.pad || x >= w.pad + w.W)
                        std::fill_n(low + w.place(y, x), w.C, least);
        }
        for (int y = 0; y < w.Ho; y++) {
            T* to = max ? max + (int64_t)y * length : nullptr;
            T* where = tap ? tap + (int64_t)y * length : nullptr;
            T* average = mean ? mean + (int64_t)y * length : nullptr;
            for (int t = 0; t < 9; t++) {
                const int64_t at = w.tap(y, t / 3, t % 3);
                if (to) {
                    const T* from = low + at;
                    if (t == 0) std::fill_n(to, length, -std::numeric_limits<T>::infinity());
                    if (t == 0 && where) std::fill_n(where, length, (T)0);
                    for (int j = 0; j < length; j++) {
                        const bool better = from[j] > to[j] || from[j] != from[j];
                        to[j] = better ? from[j] : to[j];
                        if (where) where[j] = better ? (T)t : where[j];
                    }
                }
                if (average) {
                    const T* from = zeros + at;
                    for (int j = 0; j < length; j++) average[j] = (t ? average[j] : (T)0) + from[j];
                }
            }
            if (average) {
                const T* scale = share.data() + (size_t)y * length;
                for (int j = 0; j < length; j++) average[j] *= scale[j];
            }
        }
    }

    // Adds to out [H][W][c] what the gradients of max (with its taps) and of mean say; each may be null.
    void backward(const T* d_max, const T* tap, const T* d_mean, T* out) {
        const int length = w.Wo * w.C;
        T* padded = aligned(back_buffer, w.padded());
        std::memset(padded, 0, sizeof(T) * w.padded());
        for (int y = 0; y < w.Ho; y++) {
            const T* g = d_max ? d_max + (int64_t)y * length : nullptr;
            const T* where = d_max ? tap + (int64_t)y * length : nullptr;
            const T *h = d_mean ? d_mean + (int64_t)y * length : nullptr, *scale = share.data() + (size_t)y * length;
            for (int t = 0; t < 9; t++) {
                T* to = padded + w.tap(y, t / 3, t % 3);
                if (g)
                    for (int j = 0; j < length; j++) to[j] += where[j] == (T)t ? g[j] : (T)0;
                if (h)
                    for (int j = 0; j < length; j++) to[j] += h[j] * scale[j];
            }
        }
        for (int y = 0; y < w.H; y++)
            for (int x = 0; x < w.W; x++) {
                const T* from = padded + w.place(y + 1, x + 1);
                T* to = out + ((int64_t)y * w.W + x) * w.C;
                for (int i = 0; i < w.C; i++) to[i] += from[i];
            }
    }
};

constexpr int KINDS = 3;  // maximum, mean, the state itself

// Means over all pixels of u and of u^2 for both poolings: [2][c] each.
template <typename T>
void pool_moments(
    const T* x, int64_t images, int H, int W, int c, int stride, double* mean, double* second, int threads) {
    const int tasks = tasks_of(images);
    std::vector<std::vector<double>> sums(tasks, std::vector<double>(2 * c));
    std::vector<std::vector<double>> squares(tasks, std::vector<double>(2 * c));
    int64_t count = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tasks; t++) {
        Pools<T> pools(H, W, c, stride);
        const int64_t after = (int64_t)pools.w.Ho * pools.w.Wo;
        if (t == 0) count = after * images;
        std::vector<T> u(2 * after * c), sum(2 * c), square(2 * c);
        for (int64_t n = bound(images, tasks, t); n < bound(images, tasks, t + 1); n++) {
            pools.forward(x + n * H * W * c, u.data(), nullptr, u.data() + after * c);
            std::fill(sum.begin(), sum.end(), (T)0), std::fill(square.begin(), square.end(), (T)0);
            for (int kind = 0; kind < 2; kind++)
                for (int64_t p = 0; p < after; p++)
                    for (int i = 0; i < c; i++) {
                        const T value = u[(kind * after + p) * c + i];
                        sum[kind * c + i] += value, square[kind * c + i] += value * value;
                    }
            for (int k = 0; k < 2 * c; k++) sums[t][k] += sum[k], squares[t][k] += square[k];
        }
    }
    add_tasks(sums, mean), add_tasks(squares, second);
    for (int k = 0; k < 2 * c; k++) mean[k] /= count, second[k] /= count;
}

int64_t pixels_after(int H, int W, int stride) { return (int64_t)((H - 1) / stride + 1) * ((W - 1) / stride + 1); }

// out [pixels'][groups * c] = bias + sum over kinds of scale [kind][groups][c] x u_kind; `kinds` has a bit for each.
template <typename T>
void shared_forward(
    const T* x, int64_t images, int H, int W, int c, int stride, int groups, int kinds, const T* scale, const T* bias,
    T* out, int threads) {
    const int tasks = tasks_of(images), C = groups * c;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tasks; t++) {
        Pools<T> pools(H, W, c, stride);
        const int64_t after = (int64_t)pools.w.Ho * pools.w.Wo;
        std::vector<T> u(2 * after * c);
        for (int64_t n = bound(images, tasks, t); n < bound(images, tasks, t + 1); n++) {
            const T* image = x + n * H * W * c;
            pools.forward(image, kinds & 1 ? u.data() : nullptr, nullptr, kinds & 2 ? u.data() + after * c : nullptr);
            T* to = out + n * after * C;
            for (int64_t p = 0; p < after; p++) std::memcpy(to + p * C, bias, sizeof(T) * C);
            for (int kind = 0; kind < KINDS; kind++) {
                if (!(kinds >> kind & 1)) continue;
                const T* from = kind == 2 ? image : u.data() + kind * after * c;
                const T* by = scale + (size_t)kind * C;
                for (int64_t p = 0; p < after; p++)
                    for (int g = 0; g < groups; g++)
                        for (int i = 0; i < c; i++) to[p * C + g * c + i] += by[g * c + i] * from[p * c + i];
            }
        }
    }
}

// products [kind][groups][c]: sums over pixels of g x u_kind; sums [groups][c]: of g.
template <typename T>
void shared_sums(
    const T* x, const T* g, int64_t images, int H, int W, int c, int stride, int groups, int kinds, double* products,
    double* sums, int threads) {
    const int tasks = tasks_of(images), C = groups * c;
    std::vector<std::vector<double>> all(tasks, std::vector<double>((KINDS + 1) * C));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tasks; t++) {
        Pools<T> pools(H, W, c, stride);
        const int64_t after = (int64_t)pools.w.Ho * pools.w.Wo;
        std::vector<T> u(2 * after * c), part((KINDS + 1) * C);
        for (int64_t n = bound(images, tasks, t); n < bound(images, tasks, t + 1); n++) {
            const T* image = x + n * H * W * c;
            pools.forward(image, kinds & 1 ? u.data() : nullptr, nullptr, kinds & 2 ? u.data() + after * c : nullptr);
            const T* d = g + n * after * C;
            std::fill(part.begin(), part.end(), (T)0);
            for (int kind = 0; kind < KINDS; kind++) {
                if (!(kinds >> kind & 1)) continue;
                const T* from = kind == 2 ? image : u.data() + kind * after * c;
                T* to = part.data() + kind * C;
                for (int64_t p = 0; p < after; p++)
                    for (int e = 0; e < groups; e++)
                        for (int i = 0; i < c; i++) to[e * c + i] += d[p * C + e * c + i] * from[p * c + i];
            }
            T* to = part.data() + KINDS * C;
            for (int64_t p = 0; p < after; p++)
                for (int j = 0; j < C; j++) to[j] += d[p * C + j];
            for (size_t k = 0; k < part.size(); k++) all[t][k] += part[k];
        }
    }
    std::vector<double> total((KINDS + 1) * C);
    add_tasks(all, total.data());
    std::copy(total.begin(), total.begin() + KINDS * C, products);
    std::copy(total.begin() + KINDS * C, total.end(), sums);
}

// out [pixels][c]: the gradient of the state, where that of u_kind is constant [kind][c] + linear [kind][c] x u_kind
// + the sum over groups of scale x g.
template <typename T>
void shared_backward(
    const T* x, const T* g, int64_t images, int H, int W, int c, int stride, int groups, int kinds, const T* scale,
    const T* constant, const T* linear, T* out, int threads) {
    const int tasks = tasks_of(images), C = groups * c;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tasks; t++) {
        Pools<T> pools(H, W, c, stride);
        const int64_t after = (int64_t)pools.w.Ho * pools.w.Wo, size = after * c;
        std::vector<T> u(2 * size), tap(size), d(2 * size);
        for (int64_t n = bound(images, tasks, t); n < bound(images, tasks, t + 1); n++) {
            const T* image = x + n * H * W * c;
            const T* from = g + n * after * C;
            T* to = out + n * H * W * c;
            pools.forward(image, kinds & 1 ? u.data() : nullptr, kinds & 1 ? tap.data() : nullptr,
                          kinds & 2 ? u.data() + size : nullptr);
            for (int kind = 0; kind < KINDS; kind++) {
                T* here = kind == 2 ? to : d.data() + kind * size;
                if (!(kinds >> kind & 1)) {
                    if (kind == 2) std::memset(to, 0, sizeof(T) * H * W * c);
                    continue;
                }
                const T* by = scale + (size_t)kind * C;
                for (int64_t p = 0; p < after; p++)
                    for (int i = 0; i < c; i++) {
                        T sum = 0;
                        for (int e = 0; e < groups; e++) sum += by[e * c + i] * from[p * C + e * c + i];
                        here[p * c + i] = sum;
                        if (kind < 2)
                            here[p * c + i] +=
                                constant[kind * c + i] + linear[kind * c + i] * u[kind * size + p * c + i];
                    }
            }
            pools.backward(kinds & 1 ? d.data() : nullptr, tap.data(), kinds & 2 ? d.data() + size : nullptr, to);
        }
    }
}

int kinds_of(const int* columns) { return (columns[0] >= 0) | (columns[1] >= 0) << 1 | (columns[2] >= 0) << 2; }

// The shared candidates' whole way forth and back. `coefficients` holds scale [kind][groups][c] and bias [groups][c],
// `statistics` the poolings' mean and inverse deviation [2][c] each. `known`: the poolings' moments (mean [2][c], then
// second) over `ranks` times as many pixels; null: this tensor's own.
template <typename T>
void share(
    const T* x, int64_t images, int H, int W, int c, int stride, int groups, const Running<T>* running,
    Strength<T> strengths, const int* columns, const double* known, int ranks, T* coefficients, double* statistics,
    T* out, int threads) {
    const int kinds = kinds_of(columns);
    std::vector<double> own(4 * c);
    if (!known && kinds & 3 && running[kinds & 1 ? 0 : 1].training)
        pool_moments(x, images, H, W, c, stride, own.data(), own.data() + 2 * c, threads);
    const double* mean = known ? known : own.data();
    T* bias = coefficients + (size_t)KINDS * groups * c;
    fold_shared(
        mean, mean + 2 * c, running, strengths, columns, images * pixels_after(H, W, stride) * ranks, groups, c,
        coefficients, bias, statistics, statistics + 2 * c);
    shared_forward(x, images, H, W, c, stride, groups, kinds, coefficients, bias, out, threads);
}

// Back, first part: the strengths' gradients, and `through` (constant, then linear, [kind][c] each), by which the
// poolings' gradients depend on their statistics.
template <typename T>
void share_sums(
    const T* x, const T* g, int64_t images, int H, int W, int c, int stride, int groups, bool training,
    Strength<T> strengths, const int* columns, const double* statistics, Strength<T> d_strengths, T* through,
    int threads) {
    const int C = groups * c;
    std::vector<double> products((size_t)KINDS * C), sums(C);
    shared_sums(x, g, images, H, W, c, stride, groups, kinds_of(columns), products.data(), sums.data(), threads);
    fold_shared_backward(
        products.data(), sums.data(), strengths, columns, statistics, statistics + 2 * c, training,
        images * pixels_after(H, W, stride), groups, c, d_strengths, through, through + KINDS * c);
}

// One node of a cell with partial channels: out [pixels][width * parts], whose channel i * parts is the sum over edges
// of head_e [i] and whose channel i * parts + 1 + r is the sum of beta_e x rest_e [r * width + i]. A head has
// `head_pitch[e]` values a pixel, a rest `rest_pitch[e]`.
template <typename T>
void join_forward(
    int edges, const T* const* heads, const int64_t* head_pitch, const T* const* rests, const int64_t* rest_pitch,
    const T* beta, int64_t pixels, int width, int parts, T* out, int threads) {
    const int C = width * parts;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < pixels; block += 64) {
        T total[1024];
        for (int64_t p = block; p < std::min(pixels, block + 64); p++) {
            std::memset(total, 0, sizeof(T) * C);
            for (int e = 0; e < edges; e++) {
                const T *head = heads[e] + p * head_pitch[e], *rest = rests[e] + p * rest_pitch[e];
                for (int i = 0; i < width; i++) total[i] += head[i];
                for (int i = 0; i < C - width; i++) total[width + i] += beta[e] * rest[i];
            }
            T* to = out + p * C;
            for (int j = 0; j < parts; j++)
                for (int i = 0; i < width; i++) to[i * parts + j] = total[j * width + i];
        }
    }
}

// head [pixels][width]: the gradient of every head; rests: beta_e x the rest's, each of its own contiguous
// [pixels][C - width] (null: not wanted); d_beta [edges].
template <typename T>
void join_backward(
    int edges, const T* g, const T* const* rests, const int64_t* rest_pitch, const T* beta, int64_t pixels, int width,
    int parts, T* head, T* const* d_rests, double* d_beta, int threads) {
    const int C = width * parts, others = C - width, tasks = tasks_of((pixels + 63) / 64);
    std::vector<std::vector<double>> sums(tasks, std::vector<double>(edges));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tasks; t++) {
        T plain[1024];
        for (int64_t p = bound(pixels, tasks, t); p < bound(pixels, tasks, t + 1); p++) {
            const T* from = g + p * C;
            for (int j = 0; j < parts; j++)
                for (int i = 0; i < width; i++) plain[j * width + i] = from[i * parts + j];
            std::memcpy(head + p * width, plain, sizeof(T) * width);
            for (int e = 0; e < edges; e++) {
                const T* rest = rests[e] + p * rest_pitch[e];
                T* to = d_rests[e] ? d_rests[e] + p * others : nullptr;
                T sum = 0;
                for (int i = 0; i < others; i++) sum += plain[width + i] * rest[i];
                if (to)
                    for (int i = 0; i < others; i++) to[i] = beta[e] * plain[width + i];
                sums[t][e] += sum;
            }
        }
    }
    add_tasks(sums, d_beta);
}

}  // namespace

#define ENTRIES(T, S)                                                                                                  \
    extern "C" void share_##S(                                                                                         \
        const T* x, int64_t images, int H, int W, int c, int stride, int groups, const Running<T>* running,            \
        Strength<T> strengths, const int* columns, const double* known, int ranks, T* coefficients,                    \
        double* statistics, T* out, int threads) {                                                                     \
        share(                                                                                                         \
            x, images, H, W, c, stride, groups, running, strengths, columns, known, ranks, coefficients, statistics,   \
            out, threads);                                                                                             \
    }                                                                                                                  \
    extern "C" void pool_moments_##S(                                                                                  \
        const T* x, int64_t images, int H, int W, int c, int stride, double* out, int threads) {                       \
        pool_moments(x, images, H, W, c, stride, out, out + 2 * c, threads);                                           \
    }                                                                                                                  \
    extern "C" void share_sums_##S(                                                                                    \
        const T* x, const T* g, int64_t images, int H, int W, int c, int stride, int groups, int training,             \
        Strength<T> strengths, const int* columns, const double* statistics, Strength<T> d_strengths, T* through,      \
        int threads) {                                                                                                 \
        share_sums(                                                                                                    \
            x, g, images, H, W, c, stride, groups, training != 0, strengths, columns, statistics, d_strengths,         \
            through, threads);                                                                                         \
    }                                                                                                                  \
    extern "C" void share_spread_##S(                                                                                  \
        const T* x, const T* g, int64_t images, int H, int W, int c, int stride, int groups, const int* columns,       \
        const T* coefficients, const T* through, T* out, int threads) {                                                \
        shared_backward(                                                                                               \
            x, g, images, H, W, c, stride, groups, kinds_of(columns), coefficients, through, through + KINDS * c, out, \
            threads);                                                                                                  \
    }                                                                                                                  \
    extern "C" void join_##S(                                                                                          \
        int edges, const T* const* heads, const int64_t* head_pitch, const T* const* rests, const int64_t* rest_pitch, \
        const T* beta, int64_t pixels, int width, int parts, T* out, int threads) {                                    \
        join_forward(edges, heads, head_pitch, rests, rest_pitch, beta, pixels, width, parts, out, threads);           \
    }                                                                                                                  \
    extern "C" void join_backward_##S(                                                                                 \
        int edges, const T* g, const T* const* rests, const int64_t* rest_pitch, const T* beta, int64_t pixels,        \
        int width, int parts, T* head, T* const* d_rests, double* d_beta, int threads) {                               \
        join_backward(                                                                                                 \
            edges, g, rests, rest_pitch, beta, pixels, width, parts, head, d_rests, d_beta, threads);                  \
    }

ENTRIES(float, f32)
ENTRIES(double, f64)
