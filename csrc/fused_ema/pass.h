// The passes over one chunk: update with or without sums, sums alone, conversion of the average to its copy.
//
// Included once for each instruction set, with TARGET, LANES and NAMESPACE set. Sums are kept in kStep lanes and joined
// in an order that does not depend on the width of a vector.

namespace NAMESPACE {

#include "element.h"

constexpr int kVectors = kStep / LANES;

// A second look, only where the sum says that there is something to count.
template <class S>
INLINE int64_t count_nonfinite(const typename S::Stored* source, int64_t n) {
    Words count = {};
    for (int64_t i = 0; i < n; i += LANES) {
        typename S::Stored values[LANES] = {};
        std::copy(source + i, source + std::min(i + LANES, n), values);
        count -= ((Words)S::load(values) & 0x7f800000) == 0x7f800000;  // true is -1
    }
    int64_t total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += count[lane];
    return total;
}

// Joined in halves: the order is that of element numbers modulo kStep, whatever the vector's width.
INLINE double join(Floats (&sums)[kVectors]) {
    UNROLL
    for (int half = kVectors / 2; half; half /= 2)
        for (int v = 0; v < half; ++v) sums[v] += sums[v + half];
    Floats lanes = sums[0];
    UNROLL
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

template <class Stored>
INLINE void ask_for(const Stored* block) {
    for (size_t byte = 0; byte < kStep * sizeof(Stored); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(block) + byte);
}

// At most kBlock elements, a multiple of kStep, and their sums into *total.
template <class S, class T, bool Write, bool Measure>
INLINE void block(const typename S::Stored* source, typename T::Stored* target, int64_t n, Step step, Partial* total) {
    Floats distance[kVectors] = {}, norm[kVectors] = {};
    const Words ends = step.factor == 0 ? ~Words{} : Words{};
    for (int64_t i = 0; i < n; i += kStep) {
        ask_for(source + i + kBlock);  // the arithmetic keeps the core from running that far ahead by itself
        ask_for(target + i + kBlock);
        UNROLL
        for (int v = 0; v < kVectors; ++v) {
            const int64_t at = i + v * LANES;
            const Floats theta = S::load(source + at);
            Floats average = T::load(target + at);
            if (Write) {
                const Floats base = step.from_target ? average : theta;
                const Words stays = (Words)(theta == average) | ends;
                average = T::store(stays ? base : base + step.factor * (theta - average), target + at);
            }
            if (Measure) {
                const Floats gap = theta - average;
                distance[v] += gap * gap;
                norm[v] += theta * theta;
            }
        }
    }
    if (Measure) {
        total->distance_sq += join(distance);
        total->source_sq += join(norm);
    }
}

// One chunk: n elements of any number.
template <class S, class T, bool Write, bool Measure>
TARGET void pass(const void* source_, void* target_, int64_t n, Step step, Partial* out) {
    const auto* source = static_cast<const typename S::Stored*>(source_);
    auto* target = static_cast<typename T::Stored*>(target_);
    Partial total;
    const int64_t whole = n - n % kBlock, rest = n - whole;
    for (int64_t i = 0; i < whole; i += kBlock)
        block<S, T, Write, Measure>(source + i, target + i, kBlock, step, &total);
    if (rest) {  // padded with zeros, which add nothing
        typename S::Stored theta[kBlock];
        typename T::Stored average[kBlock];
        const int64_t padded = (rest + kStep - 1) / kStep * kStep;
        std::fill(std::copy(source + whole, source + n, theta), theta + padded, 0);
        std::fill(std::copy(target + whole, target + n, average), average + padded, 0);
        block<S, T, Write, Measure>(theta, average, padded, step, &total);
        if (Write) std::copy(average, average + rest, target + whole);
    }
    if (Measure && !std::isfinite(total.source_sq)) total.nonfinite = count_nonfinite<S>(source, n);
    *out = total;
}

template <class T, class C>
TARGET void convert(const void* from_, void* to_, int64_t n) {
    const auto* from = static_cast<const typename T::Stored*>(from_);
    auto* to = static_cast<typename C::Stored*>(to_);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) C::store(T::load(from + i), to + i);
    if (i < n) {
        typename T::Stored values[LANES] = {};
        typename C::Stored converted[LANES];
        std::copy(from + i, from + n, values);
        C::store(T::load(values), converted);
        std::copy(converted, converted + (n - i), to + i);
    }
}

#define OF_TYPES(F)                                                                \
    {                                                                              \
        {F(Float32, Float32), F(Float32, BFloat16), F(Float32, Float16)},          \
            {F(BFloat16, Float32), F(BFloat16, BFloat16), F(BFloat16, Float16)}, { \
            F(Float16, Float32), F(Float16, BFloat16), F(Float16, Float16)         \
        }                                                                          \
    }
#define WRITE(S, T) pass<S, T, true, true>
#define MEASURE(S, T) pass<S, T, false, true>
#define MOVE(S, T) pass<S, T, true, false>
#define CONVERT(T, C) convert<T, C>
const Passes kPasses = {OF_TYPES(WRITE), OF_TYPES(MEASURE), OF_TYPES(MOVE), OF_TYPES(CONVERT)};

#undef OF_TYPES
#undef WRITE
#undef MEASURE
#undef MOVE
#undef CONVERT
#undef INLINE

}  // namespace NAMESPACE

#undef NAMESPACE
#undef TARGET
#undef LANES
