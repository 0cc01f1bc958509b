// EMA of many tensors with per-layer distances, one pass over memory, on the CPU.
//
// In: raw addresses of sources (theta), targets (theta_bar) and optional copies, cut once into chunks of fixed size.
// Out: targets moved in place, and per layer ||theta - theta_bar||^2, ||theta||^2 and the count of non-finite theta.
// Every chunk leaves its sums in a slot of its own and the slots are added in order, in double precision: the result
// has the same bits for any number of threads.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "element.h"

namespace py = pybind11;

namespace {

constexpr int kAbi = 3;
constexpr int64_t kChunk = 16384;  // elements a thread takes at a time
constexpr int64_t kBlock = 1024;  // elements summed in float32 lanes before double takes over: 1e-7 on any vector width

// One binary for every x86-64: the loader picks the widest clone. Elsewhere the compiler's baseline is used.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "arch=x86-64-v2", "default")))
#else
#define MULTIVERSION
#endif

// Sums may be reordered into vector lanes, with OpenMP or (clang without it) by the loop hint.
#if defined(_OPENMP)
#define SUM_LOOP _Pragma("omp simd reduction(+ : distance, norm, bad)")
#elif defined(__clang__)
#define SUM_LOOP _Pragma("clang loop vectorize(enable) interleave(enable)")
#else
#define SUM_LOOP
#endif

#if defined(_MSC_VER)
#define INLINE __forceinline
#else
#define INLINE __attribute__((always_inline)) inline
#endif

struct Partial {
    double distance_sq = 0, source_sq = 0;
    int64_t nonfinite = 0;
};

// The nearer of the two ends is the base, so that weight 0 and weight 1 are exact and equal operands never move.
struct Step {
    bool from_target;
    float factor;
    explicit Step(double weight)
        : from_target(weight < 0.5), factor(static_cast<float>(from_target ? weight : weight - 1.0)) {}
};

template <class S, class T, bool Write>
INLINE void pass(const void* source_, void* target_, int64_t n, Step step, Partial* out) {
    const auto* source = static_cast<const typename S::Stored*>(source_);
    auto* target = static_cast<typename T::Stored*>(target_);
    Partial sum;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t end = std::min(begin + kBlock, n);
        float distance = 0, norm = 0;
        int32_t bad = 0;
        SUM_LOOP
        for (int64_t i = begin; i < end; ++i) {
            const float theta = S::load(source[i]);
            float average = T::load(target[i]);
            if (Write) {
                const float base = step.from_target ? average : theta;
                const typename T::Stored stored = T::store(base + step.factor * (theta - average));
                target[i] = stored;
                average = T::load(stored);
            }
            const float gap = theta - average;
            distance += gap * gap;
            norm += theta * theta;
            bad += (to_bits(theta) & 0x7f800000) == 0x7f800000;
        }
        sum.distance_sq += distance;
        sum.source_sq += norm;
        sum.nonfinite += bad;
    }
    *out = sum;
}

template <class S, class T>
INLINE void move(const void* source_, void* target_, int64_t n, Step step) {
    const auto* source = static_cast<const typename S::Stored*>(source_);
    auto* target = static_cast<typename T::Stored*>(target_);
    for (int64_t i = 0; i < n; ++i) {
        const float theta = S::load(source[i]), average = T::load(target[i]);
        const float base = step.from_target ? average : theta;
        target[i] = T::store(base + step.factor * (theta - average));
    }
}

template <class T, class C>
INLINE void convert(const void* from_, void* to_, int64_t n) {
    const auto* from = static_cast<const typename T::Stored*>(from_);
    auto* to = static_cast<typename C::Stored*>(to_);
    for (int64_t i = 0; i < n; ++i) to[i] = C::store(T::load(from[i]));
}

// target_clones takes no templates: each combination gets a plain function.
#define PASS(S, T)                                                                                                    \
    MULTIVERSION void write_##S##_##T(const void* s, void* t, int64_t n, Step w, Partial* p) {                        \
        pass<S, T, true>(s, t, n, w, p);                                                                              \
    }                                                                                                                 \
    MULTIVERSION void measure_##S##_##T(const void* s, void* t, int64_t n, Step w, Partial* p) {                      \
        pass<S, T, false>(s, t, n, w, p);                                                                             \
    }                                                                                                                 \
    MULTIVERSION void move_##S##_##T(const void* s, void* t, int64_t n, Step w, Partial*) { move<S, T>(s, t, n, w); } \
    MULTIVERSION void convert_##S##_##T(const void* from, void* to, int64_t n) { convert<S, T>(from, to, n); }
PASS(Float32, Float32)
PASS(Float32, BFloat16)
PASS(Float32, Float16)
PASS(BFloat16, Float32)
PASS(BFloat16, BFloat16)
PASS(BFloat16, Float16)
PASS(Float16, Float32)
PASS(Float16, BFloat16)
PASS(Float16, Float16)

// Rows: type of theta (or of theta_bar, for convert); columns: type of theta_bar (or of the copy).
#define TABLE(NAME)                                                                         \
    {                                                                                       \
        {NAME##_Float32_Float32, NAME##_Float32_BFloat16, NAME##_Float32_Float16},          \
            {NAME##_BFloat16_Float32, NAME##_BFloat16_BFloat16, NAME##_BFloat16_Float16}, { \
            NAME##_Float16_Float32, NAME##_Float16_BFloat16, NAME##_Float16_Float16         \
        }                                                                                   \
    }
using Pass = void (*)(const void*, void*, int64_t, Step, Partial*);
using Convert = void (*)(const void*, void*, int64_t);
const Pass kWrite[3][3] = TABLE(write);
const Pass kMeasure[3][3] = TABLE(measure);
const Pass kMove[3][3] = TABLE(move);
const Convert kConvert[3][3] = TABLE(convert);
constexpr int64_t kWidth[3] = {4, 2, 2};

struct Chunk {
    const char* source;
    char* target;
    char* copy;  // or null
    int64_t count;
    int source_type, target_type, copy_type, layer;
};

// source, target, copy (0: none), elements, their types (0 float32, 1 bfloat16, 2 float16), layer
using Row = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int, int, int, int>;

class Plan {
 public:
    Plan(const std::vector<Row>& rows, int64_t layers) : layers_(layers) {
        for (const auto& [source, target, copy, count, source_type, target_type, copy_type, layer] : rows) {
            for (int type : {source_type, target_type, copy_type})
                if (type < 0 || type > 2) throw std::invalid_argument("unknown element type");
            if (layer < 0 || layer >= layers) throw std::invalid_argument("layer number out of range");
            for (int64_t at = 0; at < count; at += kChunk) {
                chunks_.push_back({reinterpret_cast<const char*>(source) + at * kWidth[source_type],
                                   reinterpret_cast<char*>(target) + at * kWidth[target_type],
                                   copy ? reinterpret_cast<char*>(copy) + at * kWidth[copy_type] : nullptr,
                                   std::min(kChunk, count - at), source_type, target_type, copy_type, layer});
            }
        }
    }

    // stats: address of double [3, layers], overwritten; 0: nothing is measured.
    void run(double weight, bool gate, uintptr_t stats_address, int threads) const {
        py::gil_scoped_release release;
        const Step step(weight);
        const bool measure = stats_address != 0;
        if (!gate && !measure) return;
        const auto n = static_cast<int64_t>(chunks_.size());
        std::vector<Partial> partials(chunks_.size());
        // A parallel region of one thread would still start the pool, which a later fork hangs on.
        if (threads > 1 && n > 1) {
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
            for (int64_t c = 0; c < n; ++c) run_chunk(chunks_[c], step, gate, measure, &partials[c]);
        } else {
            for (int64_t c = 0; c < n; ++c) run_chunk(chunks_[c], step, gate, measure, &partials[c]);
        }
        if (!measure) return;
        auto* stats = reinterpret_cast<double*>(stats_address);
        std::fill(stats, stats + 3 * layers_, 0.0);
        for (int64_t c = 0; c < n; ++c) {
            const int layer = chunks_[c].layer;
            stats[layer] += partials[c].distance_sq;
            stats[layers_ + layer] += partials[c].source_sq;
            stats[2 * layers_ + layer] += static_cast<double>(partials[c].nonfinite);
        }
    }

 private:
    static void run_chunk(const Chunk& c, Step step, bool gate, bool measure, Partial* out) {
        (!measure ? kMove
         : gate   ? kWrite
                  : kMeasure)[c.source_type][c.target_type](c.source, c.target, c.count, step, out);
        // The chunk of theta_bar is still in cache: the copy costs its own bytes only.
        if (c.copy && gate) kConvert[c.target_type][c.copy_type](c.target, c.copy, c.count);
    }

    std::vector<Chunk> chunks_;
    int64_t layers_;
};

}  // namespace

PYBIND11_MODULE(fused_ema_C, m) {
    m.doc() = "EMA with per-layer distances on the CPU; use it through the package fused_ema.";
    m.attr("ABI") = kAbi;
    py::class_<Plan>(m, "Plan")
        .def(py::init<const std::vector<Row>&, int64_t>(), py::arg("rows"), py::arg("layers"))
        .def("run", &Plan::run, py::arg("weight"), py::arg("gate"), py::arg("stats"), py::arg("threads"));
}
