// SPDX-License-Identifier: Apache-2.0
// What the kernels share: vectors, mixtures of bit-widths, tensors given as codes, tasks over images.
//
// Layout: every tensor is [pixels][channels], channels dense (channels_last); channels are groups x width.
//
// Bounds: codes are exact. A decoded value is a sum over the bit-widths, in any order: within bits x 2^-24 of the sum
// of their sizes in float. Sums over pixels run in T over a block of 128 pixels (moments, products of a 1x1) or over the
// images of a task (weights of a depthwise convolution, probabilities, poolings), then in double: within terms x 2^-24
// of the sum of sizes, terms being those of the block or task. A variance is E[m^2] - E[m]^2 in double, of such sums:
// it loses (mean / deviation)^2 of their precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

constexpr int TABLE = 64;        // entries of a table by code
constexpr uint8_t CODE = 63;     // the bits of a code that index a table
constexpr uint8_t INSIDE8 = 64;  // set where the 8-bit quantiser passes its gradient

// As many bytes as the machine's vectors have: the compiler takes longer ones apart element by element.
#if defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX2__)
#define VECTOR 32
#else
#define VECTOR 16
#endif
template <typename T>
struct Vec;
template <>
struct Vec<float> {
    typedef float type __attribute__((vector_size(VECTOR), aligned(4), may_alias));
    typedef int32_t index __attribute__((vector_size(VECTOR)));
    typedef uint8_t bytes __attribute__((vector_size(VECTOR / 4), aligned(1), may_alias));
    static constexpr int lanes = VECTOR / 4;
    static constexpr float round = 12582912.0f;  // adding and taking it away rounds half to even below 2^22
};
template <>
struct Vec<double> {
    typedef double type __attribute__((vector_size(VECTOR), aligned(8), may_alias));
    typedef int64_t index __attribute__((vector_size(VECTOR)));
    typedef uint8_t bytes __attribute__((vector_size(VECTOR / 8), aligned(1), may_alias));
    static constexpr int lanes = VECTOR / 8;
    static constexpr double round = 6755399441055744.0;
};
template <typename T>
using vec = typename Vec<T>::type;

template <typename T>
static inline vec<T> load(const T* p) {
    return *reinterpret_cast<const vec<T>*>(p);
}
template <typename T>
static inline void store(T* p, vec<T> v) {
    *reinterpret_cast<vec<T>*>(p) = v;
}
template <typename T>
static inline T* aligned(std::vector<T>& buffer, int64_t size) {
    if ((int64_t)buffer.size() < size + 64) buffer.resize(size + 64);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) & ~(uintptr_t)63);
}

// sum_b p[g][b] Q_b over `bits` bit-widths below 8, given by tables over codes, and 8 bits where scale8 is not null.
template <typename T>
struct Mixture {
    const T* p;        // [groups][bits + (8 bits ? 1 : 0)]
    const T* levels;   // [bits][TABLE]: Q_b by code
    const T* masks;    // [bits][TABLE]: 1 where Q_b passes its gradient
    const T* scale8;   // [groups]: step of 8 bits, or null
    int bits;
    int codes;         // number of different codes
    int columns() const { return bits + (scale8 ? 1 : 0); }
};

// A tensor that enters a convolution: floats, or codes with their mixture. `shared`: one group read by all groups.
template <typename T>
struct Source {
    const T* floats;        // [pixels][channels], or null
    const uint8_t* codes;   // [pixels][channels]
    const uint8_t* codes8;  // [pixels][channels], or null
    Mixture<T> mixture;
    int groups, width, shared;
    int relu;               // floats only: they left a ReLU, whose gradient stops at zero
    int channels() const { return groups * width; }
    int in() const { return shared ? width : groups * width; }
};

// A batch is cut into tasks whatever the number of threads, so that sums are the same bit for bit.
constexpr int TASKS = 32;
static inline int tasks_of(int64_t images) { return (int)std::min<int64_t>(images, TASKS); }
static inline int64_t bound(int64_t images, int tasks, int task) { return images * task / tasks; }

// Sums of all tasks, in the order of the tasks.
static inline void add_tasks(const std::vector<std::vector<double>>& parts, double* out) {
    if (parts.empty() || !out) return;
    for (size_t k = 0; k < parts[0].size(); k++) {
        double sum = 0;
        for (const auto& part : parts) sum += part[k];
        out[k] = sum;
    }
}

// Per channel and bit-width what a mixture multiplies by, laid out over whole vectors: the pattern repeats after
// `period` elements of the flat [pixels][channels] array.
template <typename T>
struct Pattern {
    int period, columns;
    std::vector<T> weight;  // [columns][period]
    std::vector<T> step8;   // [period]: p8 x scale8
    std::vector<T> scale8;  // [period]
    bool one_table;         // one group without 8 bits: value and mask are functions of the code alone
    T values[TABLE], masks[TABLE];
    Pattern(const Source<T>& s) {
        const int C = s.channels();
        one_table = !s.floats && s.groups == 1 && !s.mixture.scale8 && s.mixture.codes <= 32;
        for (int code = 0; code < 32 && one_table; code++) {
            values[code] = masks[code] = 0;
            for (int b = 0; b < s.mixture.bits; b++) {
                values[code] += s.mixture.p[b] * s.mixture.levels[b * TABLE + code];
                masks[code] += s.mixture.p[b] * s.mixture.masks[b * TABLE + code];
            }
        }
        period = std::lcm(C, Vec<T>::lanes);
        columns = s.floats ? 0 : s.mixture.columns();
        weight.resize((size_t)columns * period);
        if (!s.floats && s.mixture.scale8) step8.resize(period), scale8.resize(period);
        for (int j = 0; j < period && columns; j++) {
            const int g = j % C / s.width;
            for (int b = 0; b < columns; b++) weight[(size_t)b * period + j] = s.mixture.p[g * columns + b];
            if (s.mixture.scale8) {
                scale8[j] = s.mixture.scale8[g];
                step8[j] = scale8[j] * s.mixture.p[g * columns + s.mixture.bits];
            }
        }
    }
};

// Table entries by code: of a table of at most 32 entries, and of any.
template <typename T>
static inline vec<T> look_any(const T* table, typename Vec<T>::index code) {
    vec<T> out;
    for (int l = 0; l < Vec<T>::lanes; l++) out[l] = table[code[l]];
    return out;
}
template <typename T>
static inline vec<T> look(const T* table, typename Vec<T>::index code) {
#if VECTOR == 64
    if constexpr (sizeof(T) == 4) return __builtin_shuffle(load(table), load(table + 16), code);
#elif VECTOR == 32
    if constexpr (sizeof(T) == 4) return (vec<T>)_mm256_i32gather_ps(table, (__m256i)code, 4);
#endif
    return look_any(table, code);
}
// Of a table of TABLE entries.
template <typename T>
static inline vec<T> look_whole(const T* table, typename Vec<T>::index code) {
#if VECTOR == 64
    if constexpr (sizeof(T) == 4) return code > 31 ? look(table + 32, code & 31) : look(table, code);
#endif
    return look(table, code);
}
// The same of a table that stays in registers, where it can.
template <typename T>
struct Look {
    const T* table;
    Look(const T* table) : table(table) {}
    vec<T> operator()(typename Vec<T>::index code) const { return look(table, code); }
};
#if VECTOR == 64
template <>
struct Look<float> {
    const vec<float> low, high;
    Look(const float* table) : low(load(table)), high(load(table + 16)) {}
    vec<float> operator()(Vec<float>::index code) const { return __builtin_shuffle(low, high, code); }
};
#endif

// Bytes to indices and back. The compiler's own conversions go element by element.
template <typename T>
static inline typename Vec<T>::index widen(const uint8_t* p) {
    typedef typename Vec<T>::index index;
#if VECTOR == 64
    if constexpr (sizeof(T) == 4)
        return (index)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    else
        return (index)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p));
#elif VECTOR == 32
    if constexpr (sizeof(T) == 4) return (index)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#endif
    return __builtin_convertvector(*reinterpret_cast<const typename Vec<T>::bytes*>(p), index);
}
template <typename T>
static inline typename Vec<T>::bytes narrow(typename Vec<T>::index v) {
    typedef typename Vec<T>::bytes result;
#if VECTOR == 64
    const __m128i bytes = sizeof(T) == 4 ? _mm512_cvtepi32_epi8((__m512i)v) : _mm512_cvtepi64_epi8((__m512i)v);
    return *reinterpret_cast<const result*>(&bytes);
#elif VECTOR == 32
    if constexpr (sizeof(T) == 4) {
        const __m128i low = _mm256_castsi256_si128((__m256i)v), high = _mm256_extracti128_si256((__m256i)v, 1);
        const __m128i words = _mm_packs_epi32(low, high), bytes = _mm_packus_epi16(words, words);
        return *reinterpret_cast<const result*>(&bytes);
    }
#endif
    return __builtin_convertvector(v, result);
}

// The same codes for every group: [pixels][width] -> [pixels][groups * width].
template <typename U>
static void spread(const U* in, int groups, int width, int64_t pixels, U* out) {
    for (int64_t p = 0; p < pixels; p++)
        for (int g = 0; g < groups; g++) std::memcpy(out + (p * groups + g) * width, in + p * width, sizeof(U) * width);
}

// What one task keeps from image to image.
template <typename T>
struct Scratch {
    std::vector<uint8_t> codes, codes8;
    std::vector<T> a, b, c, d, e;
    // Kept by the thread: growing a buffer fills it with zeros, which costs as much as using it.
    static Scratch& of_thread() {
        static thread_local Scratch scratch;
        return scratch;
    }
};

// A source's pixels from `first` on, one row of codes per pixel and channel whether shared or not.
template <typename T>
struct Rows {
    const T* floats = nullptr;
    const uint8_t* codes = nullptr;
    const uint8_t* codes8 = nullptr;
};
template <typename T>
static Rows<T> rows_of(const Source<T>& s, int64_t first, int64_t pixels, Scratch<T>& scratch, std::vector<T>& buffer) {
    Rows<T> r;
    const int64_t total = pixels * s.channels();
    if (s.floats) {
        r.floats = s.floats + first * s.in();
        if (s.shared) {
            T* spreaded = aligned(buffer, total);
            spread(r.floats, s.groups, s.width, pixels, spreaded);
            r.floats = spreaded;
        }
        return r;
    }
    r.codes = s.codes + first * s.in();
    r.codes8 = s.codes8 ? s.codes8 + first * s.in() : nullptr;
    if (s.shared) {
        uint8_t* spreaded = aligned(scratch.codes, total);
        spread(r.codes, s.groups, s.width, pixels, spreaded);
        r.codes = spreaded;
        if (r.codes8) {
            spreaded = aligned(scratch.codes8, total);
            spread(r.codes8, s.groups, s.width, pixels, spreaded);
            r.codes8 = spreaded;
        }
    }
    return r;
}

// Decoded values of [pixels][channels] rows. Without a table (8 bits alone) only the code tells NaN.
template <typename T>
static void decode(const Source<T>& s, const Pattern<T>& pattern, const Rows<T>& r, int64_t pixels, T* out) {
    const int64_t total = pixels * s.channels();
    if (r.floats) {
        std::memcpy(out, r.floats, sizeof(T) * total);
        return;
    }
    constexpr int L = Vec<T>::lanes;
    const Mixture<T>& m = s.mixture;
    const int period = pattern.period;
    const bool small = m.codes <= 32;
    int64_t f = 0;
    if (pattern.one_table) {
        const Look<T> values(pattern.values);
        for (; f + L <= total; f += L) store(out + f, values(widen<T>(r.codes + f)));
    }
    for (int at = 0; f + L <= total; f += L, at = at + L == period ? 0 : at + L) {
        const auto code = widen<T>(r.codes + f) & (int)CODE;
        vec<T> value = vec<T>{};
        for (int b = 0; b < m.bits; b++)
            value += load(&pattern.weight[(size_t)b * period + at]) *
                     (small ? look(m.levels + b * TABLE, code) : look_whole(m.levels + b * TABLE, code));
        if (r.codes8)
            value += load(&pattern.step8[at]) * __builtin_convertvector(widen<T>(r.codes8 + f), vec<T>);
        if (!m.bits) value = (code == m.codes - 1) ? vec<T>{} + std::numeric_limits<T>::quiet_NaN() : value;
        store(out + f, value);
    }
    for (; f < total; f++) {
        T value = 0;
        for (int b = 0; b < m.bits; b++)
            value += pattern.weight[(size_t)b * period + f % period] * m.levels[b * TABLE + (r.codes[f] & CODE)];
        if (r.codes8) value += pattern.step8[f % period] * (T)r.codes8[f];
        if (!m.bits && (r.codes[f] & CODE) == m.codes - 1) value = std::numeric_limits<T>::quiet_NaN();
        out[f] = value;
    }
}

// From d, the gradient of the decoded rows, that of what was encoded; `out` may be d. p_sum [columns][period] receives
// the sums of d x Q_b by place in the pattern, where it is not null.
template <typename T>
static void decode_backward(
    const Source<T>& s, const Pattern<T>& pattern, const Rows<T>& r, int64_t pixels, const T* d, T* out, T* p_sum) {
    constexpr int L = Vec<T>::lanes;
    const int64_t total = pixels * s.channels();
    if (r.floats) {
        if (s.relu)
            for (int64_t f = 0; f < total; f++) out[f] = r.floats[f] <= 0 ? (T)0 : d[f];
        else if (out != d)
            std::memcpy(out, d, sizeof(T) * total);
        return;
    }
    const Mixture<T>& m = s.mixture;
    const int period = pattern.period;
    const bool small = m.codes <= 32;
    int64_t f = 0;
    if (pattern.one_table && !p_sum) {
        const Look<T> masks(pattern.masks);
        for (; f + L <= total; f += L) store(out + f, load(d + f) * masks(widen<T>(r.codes + f)));
    }
    for (int at = 0; f + L <= total; f += L, at = at + L == period ? 0 : at + L) {
        const auto raw = widen<T>(r.codes + f);
        const auto code = raw & (int)CODE;
        const vec<T> gradient = load(d + f);
        vec<T> factor = vec<T>{};
        for (int b = 0; b < m.bits; b++) {
            const T* masks = m.masks + b * TABLE;
            const vec<T> mask = small ? look(masks, code) : look_whole(masks, code);
            factor += load(&pattern.weight[(size_t)b * period + at]) * mask;
            if (p_sum) {
                const T* levels = m.levels + b * TABLE;
                T* sum = p_sum + (size_t)b * period + at;
                store(sum, load(sum) + gradient * (small ? look(levels, code) : look_whole(levels, code)));
            }
        }
        if (r.codes8) {
            const vec<T> inside = __builtin_convertvector(raw >> 6, vec<T>);
            factor += load(&pattern.weight[(size_t)m.bits * period + at]) * inside;
            if (p_sum) {
                T* sum = p_sum + (size_t)m.bits * period + at;
                const vec<T> step = load(&pattern.scale8[at]);
                const vec<T> level = __builtin_convertvector(widen<T>(r.codes8 + f), vec<T>) * step;
                store(sum, load(sum) + gradient * level);
            }
        }
        store(out + f, gradient * factor);
    }
    for (; f < total; f++) {
        const int at = f % period, code = r.codes[f] & CODE;
        T factor = 0;
        for (int b = 0; b < m.bits; b++) {
            factor += pattern.weight[(size_t)b * period + at] * m.masks[b * TABLE + code];
            if (p_sum) p_sum[(size_t)b * period + at] += d[f] * m.levels[b * TABLE + code];
        }
        if (r.codes8) {
            if (r.codes[f] & INSIDE8) factor += pattern.weight[(size_t)m.bits * period + at];
            if (p_sum) p_sum[(size_t)m.bits * period + at] += d[f] * pattern.scale8[at] * (T)r.codes8[f];
        }
        out[f] = d[f] * factor;
    }
}

// Folds p_sum into out [groups][columns].
template <typename T>
static void fold_p(const Source<T>& s, const Pattern<T>& pattern, const T* p_sum, double* out) {
    for (int b = 0; b < pattern.columns; b++)
        for (int j = 0; j < pattern.period; j++)
            out[(j % s.channels() / s.width) * pattern.columns + b] += p_sum[(size_t)b * pattern.period + j];
}

// How x becomes codes.
template <typename T>
struct Encoding {
    const T* steps;   // [bits]
    const T* tops;    // [bits]: the largest level, beyond which no gradient passes
    int bits;
    T zero;           // gradients pass above it
    int nan_code;
    const T* scale8;  // [groups], or null
    const T* top8;    // [groups]
};

template <typename T>
static void encode(
    const Encoding<T>& e, const T* x, int64_t pixels, int groups, int width, uint8_t* codes, uint8_t* codes8) {
    typedef typename Vec<T>::index index;
    typedef typename Vec<T>::bytes bytes;
    constexpr int L = Vec<T>::lanes;
    constexpr T round = Vec<T>::round;
    const int64_t total = pixels * groups * width;
    const int C = groups * width, period = std::lcm(C, L);
    std::vector<T> scales, tops;
    if (codes8) {
        scales.resize(period), tops.resize(period);
        for (int j = 0; j < period; j++) scales[j] = e.scale8[j % C / width], tops[j] = e.top8[j % C / width];
    }
    alignas(64) T last[L] = {};
    int at = 0;
    for (int64_t f = 0; f < total; f += L, at = at + L == period ? 0 : at + L) {
        const int64_t left = std::min<int64_t>(L, total - f);
        if (left < L) std::memcpy(last, x + f, sizeof(T) * left);
        const vec<T> v = left < L ? load(last) : load(x + f);
        vec<T> code = (v > e.zero) ? vec<T>{} + (T)1 : vec<T>{};
        for (int b = 0; b < e.bits; b++) {
            vec<T> q = v < (T)0 ? vec<T>{} : v;
            q = q > e.tops[b] ? vec<T>{} + e.tops[b] : q;
            q = (q / e.steps[b] + round) - round;
            code += q + ((v > e.tops[b]) ? vec<T>{} + (T)1 : vec<T>{});
        }
        code = (v == v) ? code : vec<T>{} + (T)e.nan_code;
        if (codes8) {
            const vec<T> top = load(&tops[at]);
            vec<T> q = v / load(&scales[at]);
            q = q > (T)0 ? q : vec<T>{};
            q = q < (T)255 ? q : vec<T>{} + (T)255;
            q = (q + round) - round;
            code += ((v > e.zero) & (v <= top)) ? vec<T>{} + (T)INSIDE8 : vec<T>{};
            const bytes level = narrow<T>(__builtin_convertvector(q, index));
            std::memcpy(codes8 + f, &level, left);
        }
        const bytes packed = narrow<T>(__builtin_convertvector(code, index));
        std::memcpy(codes + f, &packed, left);
    }
}
