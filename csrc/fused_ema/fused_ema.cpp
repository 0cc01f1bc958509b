// EMA of many tensors with per-layer distances, one pass over memory, on the CPU.
//
// In: raw addresses of sources (theta), targets (theta_bar) and optional copies, cut once into chunks of fixed size.
// Out: targets moved in place, and per layer ||theta - theta_bar||^2, ||theta||^2 and the count of non-finite theta.
// Every chunk leaves its sums in a slot of its own and the slots are added in order, in double precision: the result
// has the same bits for any number of threads.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

constexpr int kAbi = 4;
constexpr int64_t kChunk = 16384;  // elements a thread takes at a time
constexpr int64_t kBlock = 256;    // elements summed in float32 before double takes over
constexpr int64_t kStep = 32;  // elements handled at once, each with a sum of its own: no addition waits for the last
// So an element passes 8 float32 additions in its lane and 5 that join the lanes: at most 13 2^-24 = 8e-7 is lost.

struct Partial {
    double distance_sq = 0, source_sq = 0;
    int64_t nonfinite = 0;
};

// The nearer of the two ends is the base. Equal operands keep it as it is, and so do weights 0 and 1: signed zeros and
// infinities too.
struct Step {
    bool from_target;
    float factor;
    explicit Step(double weight)
        : from_target(weight < 0.5), factor(static_cast<float>(from_target ? weight : weight - 1.0)) {}
};

using Pass = void (*)(const void* source, void* target, int64_t n, Step step, Partial* out);
using Convert = void (*)(const void* from, void* to, int64_t n);

// By type (0 float32, 1 bfloat16, 2 float16): of theta and theta_bar, or of theta_bar and its copy.
struct Passes {
    Pass write[3][3], measure[3][3], move[3][3];
    Convert convert[3][3];
};
constexpr int64_t kWidth[3] = {4, 2, 2};

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

#define NAMESPACE baseline
#define TARGET
#define LANES 4
#include "pass.h"

// The compiler's baseline, and on x86-64 three more: the widest that the processor has is picked when loaded.
#if defined(__x86_64__)
#define NAMESPACE v2
#define TARGET __attribute__((target("sse4.2")))
#define LANES 4
#include "pass.h"
#define NAMESPACE v3
#define TARGET __attribute__((target("avx2,fma,bmi2")))
#define LANES 8
#include "pass.h"
#define NAMESPACE v4
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,bmi2")))
#define LANES 16
#include "pass.h"
#endif

// {name, passes} of what this processor has, best last.
std::vector<std::pair<std::string, const Passes*>> instruction_sets() {
    std::vector<std::pair<std::string, const Passes*>> found = {{"baseline", &baseline::kPasses}};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2")) found.emplace_back("x86-64-v2", &v2::kPasses);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
        found.emplace_back("x86-64-v3", &v3::kPasses);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            found.emplace_back("x86-64-v4", &v4::kPasses);
    }
#endif
    return found;
}

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
    Plan(const std::vector<Row>& rows, int64_t layers, const std::string& instructions) : layers_(layers) {
        for (const auto& [name, passes] : instruction_sets())
            if (instructions.empty() || name == instructions) passes_ = passes;
        if (!passes_) throw std::invalid_argument("this processor has no " + instructions);
        for (const auto& [source, target, copy, count, source_type, target_type, copy_type, layer] : rows) {
            for (int type : {source_type, target_type, copy_type})
                if (type < 0 || type > 2) throw std::invalid_argument("unknown element type");
            if (count < 0 || count > std::numeric_limits<int64_t>::max() / 8 || (count && (!source || !target)))
                throw std::invalid_argument("a tensor without memory");
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
    void run_chunk(const Chunk& c, Step step, bool gate, bool measure, Partial* out) const {
        const auto& table = !measure ? passes_->move : gate ? passes_->write : passes_->measure;
        table[c.source_type][c.target_type](c.source, c.target, c.count, step, out);
        // The chunk of theta_bar is still in cache: the copy costs its own bytes only.
        if (c.copy && gate) passes_->convert[c.target_type][c.copy_type](c.target, c.copy, c.count);
    }

    const Passes* passes_ = nullptr;
    std::vector<Chunk> chunks_;
    int64_t layers_;
};

}  // namespace

PYBIND11_MODULE(fused_ema_C, m) {
    m.doc() = "EMA with per-layer distances on the CPU; use it through the package fused_ema.";
    m.attr("ABI") = kAbi;
    py::class_<Plan>(m, "Plan")
        .def(py::init<const std::vector<Row>&, int64_t, const std::string&>(), py::arg("rows"), py::arg("layers"),
             py::arg("instructions") = "")  // by name; default the best there is
        .def("run", &Plan::run, py::arg("weight"), py::arg("gate"), py::arg("stats"), py::arg("threads"));
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const auto& set : instruction_sets()) names.push_back(set.first);
        return names;
    });
}
